"""JSON and MessagePack: the fast path and the tolerant one say the same, and bad readings cost one sample."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.streams.decode.documents import DocumentDecoder
from agent.streams.samples import Samples
from edgeward.errors import InvalidDocument
from edgeward.wire.streams import Check, MqttSource

SOURCE = MqttSource(topic="t", time="t", values="values", sequence=True)
PLAIN = MqttSource(topic="t")
NOW = 1_700_000_009.0


def decode(
    payload: bytes | list[Any] | dict[str, Any],
    features: list[str],
    quality: dict[str, Check] | None = None,
    **spec: Any,
) -> list[Samples]:
    source = MqttSource(topic="t", **spec)
    if not isinstance(payload, bytes):
        payload = (msgspec.msgpack if source.format == "msgpack" else msgspec.json).encode(payload)
    return DocumentDecoder(source, features, quality or {}).decode(payload, NOW)


def tolerant(decoder: DocumentDecoder) -> DocumentDecoder:
    decoder._strict = None
    return decoder


def same(left: list[Samples], right: list[Samples]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.event_time.tolist() == other.event_time.tolist()
        np.testing.assert_array_equal(one.values, other.values)
        assert (one.keys, one.epoch, one.problems) == (other.keys, other.epoch, other.problems)
        assert (one.seq is None) == (other.seq is None)
        if one.seq is not None and other.seq is not None:
            assert one.seq.tolist() == other.seq.tolist()


def test_samples_are_parsed_and_bad_ones_marked() -> None:
    payload = b"""[{"epoch":"e","seq":0,"t":1700000000.5,"values":{"a":1,"b":2.5,"note":"x"}},
                   {"epoch":"e","seq":1,"t":1700000001,"values":{"a":1}},
                   {"epoch":"e","seq":2,"t":"soon","values":{"a":1,"b":2}},
                   {"epoch":"e","seq":3,"t":1700000002,"values":{"a":1e999,"b":true}},
                   {"epoch":"e","seq":4,"t":1700000003,"values":{"a":NaN,"b":1}},
                   {"epoch":"e","seq":5,"t":1700000004,"values":{"a":1,"b":{"c":2}}},
                   {"epoch":"e","seq":6,"t":1700000005,"values":{"a":1,"b":null}},
                   {"epoch":"e","seq":7,"t":1700000006,"values":[1, 2]}]"""
    (samples,) = DocumentDecoder(SOURCE, ["a", "b"], {}).decode(payload, NOW)
    assert samples.event_time[0] == 1_700_000_000_500_000
    assert samples.values[0].tolist() == [1.0, 2.5]
    assert samples.seq is not None and samples.seq.tolist() == list(range(8))
    assert samples.problems == {
        1: "b: missing or not a finite number",
        2: "t: not a time in seconds since 1970",
        3: "a: missing or not a finite number",
        4: "a: missing or not a finite number",
        5: "b: missing or not a finite number",
        6: "b: missing or not a finite number",
        7: "values: not an object",
    }
    assert samples.event_time[2] == int(NOW * 1e6), "a sample without a time gets its arrival"


@pytest.mark.parametrize(
    "bad", ["null", '"x"', "true", "[1]", "{}", "1e999", "NaN", "-Infinity", "1e300", "1" * 400]
)
def test_one_bad_reading_costs_its_own_sample(bad: str) -> None:
    payload = f'[{{"a":1}},{{"a":{bad}}},{{"a":2}}]'.encode()
    (samples,) = DocumentDecoder(PLAIN, ["a"], {}).decode(payload, NOW)
    assert samples.problems == {1: "a: missing or not a finite number"}
    assert samples.values[[0, 2], 0].tolist() == [1.0, 2.0] and math.isnan(samples.values[1, 0])


def test_an_element_that_is_no_object_costs_itself_and_a_message_of_them_everything() -> None:
    (samples,) = decode(b'[{"a":1},5,{"a":2}]', ["a"])
    assert samples.problems == {1: "not an object"}
    for payload in (b"5", b"[5, 6]", b'"text"', b"nonsense", b"", b"\xff", b"null", b"[" * 100_000):
        with pytest.raises(InvalidDocument):
            decode(payload, ["a"])
    assert decode(b"[]", ["a"]) == []


def test_samples_split_where_the_epoch_changes() -> None:
    items = [{"epoch": e, "seq": n, "a": n} for e, n in [("x", 7), ("x", 8), ("y", 0), ("x", 9)]]
    parts = decode(items, ["a"], sequence=True)
    assert [(part.epoch, part.seq.tolist()) for part in parts if part.seq is not None] == [
        ("x", [7, 8]), ("y", [0]), ("x", [9]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "numbering",
    [
        {}, {"epoch": "e"}, {"seq": 0}, {"epoch": "", "seq": 0}, {"epoch": "e" * 65, "seq": 0}, {"epoch": 1, "seq": 0},
        {"epoch": "e", "seq": -1}, {"epoch": "e", "seq": 1 << 60}, {"epoch": "e", "seq": True},
        {"epoch": "e", "seq": 1.0}, {"epoch": "e", "seq": None},
    ],
)  # fmt: skip
def test_a_sequence_without_a_number_is_refused(numbering: dict[str, Any]) -> None:
    with pytest.raises(InvalidDocument, match=r"epoch|seq"):
        decode([{"epoch": "e", "seq": 0, "a": 1}, {**numbering, "a": 1}], ["a"], sequence=True)


def test_too_many_samples_are_refused() -> None:
    decode([{"a": 1}] * 10_000, ["a"])
    for broken in (1, None):
        with pytest.raises(InvalidDocument, match="at most 10000"):
            decode([{"a": broken}] * 10_001, ["a"])


def test_paths_lead_to_time_key_and_features() -> None:
    sample = {
        "meta": {"at": {"ms": 1_700_000_000_123}, "who": "pump-1"},
        "readings": [{"value": 4}, {"value": 5}],
        "a.b": 6,
        "a": {"b": 7},
    }
    fields = {
        "first": "$.readings[0].value",
        "last": "readings[-1].value",
        "dotted": "$['a.b']",
        "nested": "a.b",
        "absent": "readings[7].value",
    }
    (samples,) = decode(
        sample, list(fields), fields=fields, time="meta.at.ms", time_unit="ms", key="$.meta.who"
    )
    assert samples.values[0, :4].tolist() == [4, 5, 6, 7]
    assert samples.event_time.tolist() == [1_700_000_000_123_000] and samples.keys == ("pump-1",)
    assert samples.problems == {0: "absent: missing or not a finite number"}
    (by_name,) = decode({"a.b": 6, "a": {"b": 7}}, ["a.b"])
    assert by_name.values.tolist() == [[6]], "a feature without a path is its literal name"


def test_a_key_is_cut_and_cannot_break_what_stores_it() -> None:
    (samples,) = decode([{"k": "x" * 300, "a": 1}, {"k": 7, "a": 1}, {"a": 1}], ["a"], key="k")
    assert [len(key) for key in samples.keys] == [256, 1, 0]
    (long,) = decode([{"k": "x" * 300, "a": "text"}], ["a"], key="k")
    assert len(long.keys[0]) == 256
    (strange,) = decode(b'[{"k":"\\ud800","a":1},{"k":[1],"a":1},{"k":true,"a":1}]', ["a"], key="k")
    "".join(strange.keys).encode()
    assert strange.problems == {1: "k: not a text or a number"}
    with pytest.raises(InvalidDocument, match="epoch"):
        decode(b'{"epoch":"\\ud800","seq":0,"a":NaN}', ["a"], sequence=True)


def test_a_unit_is_compared_and_the_mismatch_names_both() -> None:
    quality = {"a": Check(unit="degC")}
    items = [
        {"a": {"value": 20, "unit": "degC"}},
        {"a": {"value": 293, "unit": "K"}},
        {"a": 21},
        {"a": {"value": 22}},
        {"a": {"value": "hot", "unit": "degC"}},
    ]
    (samples,) = decode(items, ["a"], quality)
    assert samples.problems == {
        1: "a: unit is 'K', expected 'degC'",
        4: "a: missing or not a finite number",
    }
    assert samples.values[[0, 2, 3], 0].tolist() == [20, 21, 22]
    assert math.isnan(samples.values[1, 0]), "a reading in another unit is no reading"


@pytest.mark.parametrize(
    ("unit", "value", "expected"),
    [
        ("s", 1_700_000_000.123456, 1_700_000_000_123_456),
        ("ms", 1_700_000_000_123, 1_700_000_000_123_000),
        ("us", 1_700_000_000_123_457, 1_700_000_000_123_457),
        ("ns", 1_700_000_000_123_457_001, 1_700_000_000_123_457),
        ("iso8601", "2023-11-14T22:13:20.5Z", 1_700_000_000_500_000),
        ("iso8601", "2023-11-14T23:13:20.5+01:00", 1_700_000_000_500_000),
        ("iso8601", "2023-11-14 22:13:20.5", 1_700_000_000_500_000),
    ],
)
def test_event_times_in_every_unit(unit: str, value: Any, expected: int) -> None:
    for format in ("json", "msgpack"):
        items = [{"t": value, "a": 1}]
        (samples,) = decode(items, ["a"], time="t", time_unit=unit, format=format)
        assert samples.event_time.tolist() == [expected] and not samples.problems
        (broken,) = decode([*items, {"t": [], "a": "x"}], ["a"], time="t", time_unit=unit, format=format)
        assert broken.event_time.tolist() == [expected, int(NOW * 1e6)]
        assert broken.problems[1].startswith("t: not a")


@pytest.mark.parametrize("value", [True, -1, 1e11, 10**30, None, "2023-11-14T22:13:20Z"])
def test_what_is_no_time_is_a_problem(value: Any) -> None:
    (samples,) = decode(json.dumps([{"t": value, "a": 1}, {"t": 5, "a": 1}]).encode(), ["a"], time="t")
    assert samples.problems == {0: "t: not a time in seconds since 1970"}


def test_whole_nanoseconds_stay_exact_beside_fractions() -> None:
    items = [{"t": 1_700_000_000_123_457_999, "a": 1}, {"t": 1500.0, "a": 1}]
    (samples,) = decode(items, ["a"], time="t", time_unit="ns")
    assert samples.event_time.tolist() == [1_700_000_000_123_457, 2]


def test_a_wrong_spec_is_refused() -> None:
    for path in ("a..b", "a[", "a[x]", "[", "$.", ".a", "a]b", "a[0]b"):
        with pytest.raises(InvalidDocument, match=r"spec\.source\.time: not a path"):
            DocumentDecoder(MqttSource(topic="t", time=path), ["a"], {})
    with pytest.raises(InvalidDocument, match=r"fields\.b: not one of the features"):
        DocumentDecoder(MqttSource(topic="t", fields={"b": "x"}), ["a"], {})


def test_what_a_strict_type_cannot_say_is_read_all_the_same() -> None:
    items = [{'a"b': 1, "t": 5}]
    assert decode(items, ['a"b'])[0].values.tolist() == [[1]]
    (samples,) = decode(items, ["t"], time="t")
    assert samples.values.tolist() == [[5]] and samples.event_time.tolist() == [5_000_000]


def test_the_common_form_takes_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = DocumentDecoder(SOURCE, ["a", "b"], {})
    monkeypatch.setattr(decoder, "_tolerant", lambda *_: pytest.fail("read value by value"))
    (samples,) = decoder.decode(b'[{"epoch":"e","seq":0,"t":1,"values":{"a":1,"b":2.5}}]', NOW)
    assert samples.values.tolist() == [[1, 2.5]]


# --- properties -------------------------------------------------------------------------------------

FORMS = [
    SOURCE,
    PLAIN,
    MqttSource(topic="t", time="m.t", time_unit="ns", key="m.k", fields={"a": "m.a", "b": "x[0]"}),
    MqttSource(topic="t", time="t", time_unit="iso8601", key="k", values="values"),
    MqttSource(topic="t", time="t", time_unit="us", key="k", format="msgpack", values="values"),
    MqttSource(topic="t", format="msgpack", sequence=True),
]


@settings(max_examples=300)
@given(st.sampled_from(FORMS), st.binary(max_size=200))
def test_any_bytes_give_samples_or_a_clear_refusal(source: MqttSource, payload: bytes) -> None:
    with contextlib.suppress(InvalidDocument):
        DocumentDecoder(source, ["a", "b"], {}).decode(payload, NOW)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**8, 10**19), st.floats(), st.text(max_size=5),
    st.sampled_from(["2023-11-14T22:13:20Z", 1e300, 1.7e9, 1.7e12, 1.7e15, 1.7e18]),
)  # fmt: skip
names = st.sampled_from(["a", "b", "t", "k", "m", "x", "values", "epoch", "seq", "value", "unit"])
documents = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=5)),
    max_leaves=12,
)
readings = st.one_of(st.floats(), st.integers(-(2**63), 2**63), st.none())
likely = st.fixed_dictionaries(
    {},
    optional={
        "t": st.one_of(st.floats(0, 2e18), st.integers(0, 2**64), st.none(), st.just("2023-11-14T22:13:20")),
        "k": st.one_of(st.text(max_size=5), st.integers(), st.none()),
        "epoch": st.sampled_from(["e", "f"]),
        "seq": st.integers(0, 9),
        "a": readings,
        "b": readings,
        "values": st.fixed_dictionaries({}, optional={"a": readings, "b": readings}),
        "m": st.fixed_dictionaries({}, optional={"a": readings, "t": st.integers(0, 2**63), "k": st.text()}),
    },
)


@settings(max_examples=600)
@given(st.sampled_from(FORMS), st.one_of(documents, likely, st.lists(likely, max_size=5)))
def test_the_fast_path_and_the_tolerant_one_agree(source: MqttSource, document: Any) -> None:
    if source.format == "json":
        payload = json.dumps(document).encode()
    else:
        try:
            payload = msgspec.msgpack.encode(document)
        except OverflowError:
            return
    fast = DocumentDecoder(source, ["a", "b"], {})
    slow = tolerant(DocumentDecoder(source, ["a", "b"], {}))
    try:
        expected = slow.decode(payload, NOW)
    except InvalidDocument:
        with pytest.raises(InvalidDocument):
            fast.decode(payload, NOW)
        return
    same(fast.decode(payload, NOW), expected)
    for samples in expected:
        finite = np.isfinite(samples.values).all(axis=1)
        assert all(finite[row] or row in samples.problems for row in range(len(samples)))
