"""Errors that name the entry they are in."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.errors import InvalidDocument
from edgeward.fields import name_keys, split_error
from edgeward.wire.resources import parse_resource


class _Leaf(msgspec.Struct, forbid_unknown_fields=True):
    size: Annotated[int, msgspec.Meta(ge=1)] = 1


class _Root(msgspec.Struct):
    rooms: dict[str, list[dict[str, _Leaf]]]


def place(value: Any) -> str:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(value, type=_Root)
    text, path = split_error(caught.value)
    return name_keys(value, _Root, text, path)


def fleet(slots: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "edgeward.dev/v1alpha1",
        "kind": "Fleet",
        "metadata": {"name": "line"},
        "spec": {"matchLabels": {"line": "press"}, "slots": slots},
    }


def test_a_slot_with_a_wrong_policy_is_named() -> None:
    slots = {"default": {"threads": 2}, "press": {"threads": 0}, "other": {}}
    with pytest.raises(InvalidDocument, match=r"spec\.slots\.press\.threads: Expected `int` >= 1"):
        parse_resource(fleet(slots))
    with pytest.raises(InvalidDocument, match=r"spec\.slots\.press: unknown field `thread`, expected one of"):
        parse_resource(fleet({"default": {}, "press": {"thread": 1}}))


def test_entries_within_entries_are_named_in_their_order() -> None:
    fine, wrong = {"x": {"size": 1}}, {"y": {"size": 1}, "z": {"size": 0}}
    value = {"rooms": {"a": [fine, fine], "b.c": [fine, wrong], "d": [wrong]}}
    kept = msgspec.json.encode(value)
    assert place(value) == "rooms.b.c[1].z.size"
    assert msgspec.json.encode(value) == kept, "the document itself stays as it is"
    assert place({"rooms": {"a": [{"x": 1}]}}) == "rooms.a[0].x"
    assert place({"rooms": {"a": 1}}) == "rooms.a"
    assert place({"rooms": 1}) == "rooms"


anything = st.recursive(
    st.none() | st.integers(-1, 2) | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(anything)
def test_whatever_is_wrong_some_place_is_named(rooms: Any) -> None:
    value = {"rooms": rooms}
    try:
        msgspec.convert(value, type=_Root)
    except msgspec.ValidationError:
        assert place(value).startswith("rooms") and "[...]" not in place(value)
