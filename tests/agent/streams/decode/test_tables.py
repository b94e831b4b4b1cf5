"""CSV messages."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.streams.decode.tables import CsvDecoder
from agent.streams.samples import Samples
from edgeward.errors import InvalidDocument
from edgeward.wire.streams import MqttSource

NOW = 1_700_000_009.0


def decode(payload: bytes, features: list[str], **spec: Any) -> list[Samples]:
    return CsvDecoder(MqttSource(topic="t", format="csv", **spec), features).decode(payload, NOW)


def test_a_header_names_the_columns_in_any_order() -> None:
    (samples,) = decode(b"b,t,a,who\r\n2,5,1,x\r\n4,6.5,3,y\r\n", ["a", "b"], time="t", key="who")
    assert samples.values.tolist() == [[1, 2], [3, 4]]
    assert samples.event_time.tolist() == [5_000_000, 6_500_000] and samples.keys == ("x", "y")


def test_declared_columns_need_no_header_and_skip_one() -> None:
    for payload in (b"1,2\n3,4\n", b"a,b\n1,2\n3,4\n", b"\xef\xbb\xbfa,b\n1,2\n\n3,4"):
        (samples,) = decode(payload, ["b", "a"], columns=["a", "b"])
        assert samples.values.tolist() == [[2, 1], [4, 3]]


def test_cells_that_are_no_reading_cost_their_sample() -> None:
    payload = b'\xef\xbb\xbf"a",b\n1,"2.5"\n,2\n1,x\n1,NaN\n1,1e999\n1,1_0\n1\n1,2,3\n"1",2\n'
    (samples,) = decode(payload, ["a", "b"])
    missing = "missing or not a finite number"
    assert samples.problems == {
        1: f"a: {missing}", 2: f"b: {missing}", 3: f"b: {missing}", 4: f"b: {missing}", 5: f"b: {missing}",
        6: "1 cells in a line, expected 2", 7: "3 cells in a line, expected 2",
    }  # fmt: skip
    assert samples.values[0].tolist() == [1, 2.5] and samples.values[8].tolist() == [1, 2]
    assert math.isnan(samples.values[7, 0]), "which cell is one too many cannot be told"


def test_underscores_make_no_number() -> None:
    (samples,) = decode(b"t,a\n1_0,1\n2,1_0\n", ["a"], time="t")
    assert samples.problems == {
        0: "t: not a time in seconds since 1970",
        1: "a: missing or not a finite number",
    }


def test_a_line_of_another_length_says_so_first() -> None:
    (samples,) = decode(b"t,a\n5\n", ["a"], time="t")
    assert samples.problems == {0: "1 cells in a line, expected 2"}


def test_quoted_cells_may_hold_the_delimiter_and_line_ends() -> None:
    (samples,) = decode(b'note,a\n"x, ""y""\nz",5\n', ["a"])
    assert samples.values.tolist() == [[5]] and not samples.problems


def test_semicolons_and_tabs_are_told_from_the_first_line() -> None:
    assert decode(b"a;b\n1;2\n", ["a", "b"])[0].values.tolist() == [[1, 2]]
    assert decode(b"1\t2\n", ["a", "b"], columns=["a", "b"])[0].values.tolist() == [[1, 2]]


def test_times_and_fields() -> None:
    payload = b"when,Temp C\n2023-11-14T22:13:20Z,5\nsoon,6\n"
    (samples,) = decode(payload, ["t"], time="when", time_unit="iso8601", fields={"t": "Temp C"})
    assert samples.event_time.tolist() == [1_700_000_000_000_000, int(NOW * 1e6)]
    assert samples.problems == {1: "when: not an ISO 8601 time"}
    (precise,) = decode(b"t,a\n1700000000123456789,1\n,2\n", ["a"], time="t", time_unit="ns")
    assert precise.event_time[0] == 1_700_000_000_123_456 and 1 in precise.problems


def test_what_is_no_table_of_these_features_is_refused() -> None:
    for payload, reason in [
        (b"x,y\n1,2\n", "no column is a feature"),
        (b"a,a\n1,2\n", "occurs 2 times"),
        (b"a\n\xff\n", "not UTF-8"),
        (b"a\n" + b"1\n" * 10_001, "at most 10000"),
        (b'a\n"' + b"x" * 200_000, "not CSV"),
    ]:
        with pytest.raises(InvalidDocument, match=reason):
            decode(payload, ["a"])
    assert decode(b"", ["a"]) == [] and decode(b"a\n", ["a"]) == []
    with pytest.raises(InvalidDocument, match="not one of the features"):
        decode(b"", ["a"], fields={"b": "x"})


@settings(max_examples=300)
@given(st.one_of(st.binary(max_size=100), st.text('a,b;"\n\r0123.e-_ \t', max_size=60).map(str.encode)))
def test_any_bytes_give_samples_or_a_clear_refusal(payload: bytes) -> None:
    for spec in ({}, {"columns": ["a", "b"], "time": "b"}):
        with contextlib.suppress(InvalidDocument):
            for samples in decode(payload, ["a"], **spec):
                assert samples.values.shape == (len(samples), 1)
