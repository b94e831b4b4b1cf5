"""What a document may say at a place: for error lines that name what was expected."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import inspect

_STEP = re.compile(r"\[[^\]]*\]|[^.\[]+")
_ANY_KEY = "[...]"
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`")


def known_fields(type_: Any, path: str) -> list[str]:
    """The names of the fields at `path` (`waves[0].count`, `labels[...]`); empty where there is no object."""
    places = _structs_and_containers(inspect.type_info(type_))
    for step in _STEP.findall(path):
        places = [found for place in places for found in _inside(place, step)]
    return sorted(
        {
            field.encode_name
            for place in places
            if isinstance(place, inspect.StructType)
            for field in place.fields
        }
    )


def _structs_and_containers(info: inspect.Type) -> list[inspect.Type]:
    if isinstance(info, inspect.UnionType):
        return [found for one in info.types for found in _structs_and_containers(one)]
    if isinstance(info, inspect.Metadata):
        return _structs_and_containers(info.type)
    return [info]


def _inside(place: inspect.Type, step: str) -> list[inspect.Type]:
    if isinstance(place, inspect.StructType):
        return [
            found
            for field in place.fields
            if field.encode_name == step
            for found in _structs_and_containers(field.type)
        ]
    if isinstance(place, inspect.DictType):
        return _structs_and_containers(place.value_type)
    if isinstance(place, inspect.CollectionType):
        return _structs_and_containers(place.item_type)
    return []


def explain(problem: str, type_: Any, path: str) -> str:
    """msgspec's text for an unknown field, with the fields that there are instead."""
    unknown = _UNKNOWN.fullmatch(problem)
    known = known_fields(type_, path) if unknown else []
    if unknown is None or not known:
        return problem
    return f"unknown field `{unknown[1]}`, expected one of {', '.join(known)}"


def split_error(error: msgspec.ValidationError) -> tuple[str, str]:
    """msgspec's "... - at `$.a.b`" as text and path."""
    text, _, where = str(error).partition(" - at `$")
    return text, where.strip("`.")


def name_keys(value: Any, type_: Any, problem: str, path: str) -> str:
    """`slots[...].threads` as `slots.press.threads`: msgspec does not say in which entry of a mapping it is.

    The entries are converted one by one until one has the same `problem`; `value` is what could not be
    converted to `type_`.
    """
    way: list[str | int] = []
    shown = ""
    for step in _STEP.findall(path):
        if step == _ANY_KEY:
            entries = _reach(value, way)
            for key, entry in entries.items() if isinstance(entries, dict) else ():
                alone = _replaced(value, way, {key: entry})
                if _fails(alone, type_, problem, path):
                    value, step = alone, str(key)
                    way.append(key)
                    break
            else:
                return path
        else:
            way.append(int(step[1:-1]) if step.startswith("[") else step)
        shown += step if not shown or step.startswith("[") else f".{step}"
    return shown


def _reach(value: Any, way: list[str | int]) -> Any:
    for step in way:
        value = value[step]
    return value


def _replaced(value: Any, way: list[str | int], by: Any) -> Any:
    """A copy of `value` with `by` at `way`."""
    if not way:
        return by
    copy = value.copy()
    copy[way[0]] = _replaced(value[way[0]], way[1:], by)
    return copy


def _fails(value: Any, type_: Any, problem: str, path: str) -> bool:
    try:
        msgspec.convert(value, type=type_)
    except msgspec.ValidationError as error:
        return split_error(error) == (problem, path)
    return False
