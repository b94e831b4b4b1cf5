"""What a document may say at a place: for error lines that name what was expected."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import inspect

_STEP = re.compile(r"\[[^\]]*\]|[^.\[]+")
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
