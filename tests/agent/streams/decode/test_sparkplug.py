"""Sparkplug B: births name, data changes, deaths take away."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.streams.decode.sparkplug import SparkplugDecoder, parse_topic
from edgeward.errors import InvalidDocument
from edgeward.sparkplug import METRIC_TYPES, Payload
from edgeward.wire.streams import Check, MqttSource

NOW = 1_700_000_009.0
T0 = 1_700_000_000_000
SOURCE = MqttSource(topic="spBv1.0/g/DDATA/n/d", format="sparkplug")


def metric(
    name: str = "", kind: str = "Double", value: Any = None, *, unit: str = "", **more: Any
) -> dict[str, Any]:
    made: dict[str, Any] = {"datatype": METRIC_TYPES[kind], **more}
    if name:
        made["name"] = name
    slot = {
        "Float": "float_value", "Double": "double_value", "Boolean": "boolean_value", "String": "string_value",
        "Int64": "long_value", "UInt64": "long_value",
    }.get(kind, "int_value")  # fmt: skip
    if value is None:
        made["is_null"] = True
    else:
        made[slot] = value
    if unit:
        made["properties"] = {"keys": ["engUnit"], "values": [{"type": 12, "string_value": unit}]}
    return made


def payload(*metrics: dict[str, Any], seq: int | None = None, at: int = T0) -> bytes:
    message = Payload(timestamp=at, metrics=metrics)
    if seq is not None:
        message.seq = seq
    return bytes(message.SerializeToString())


class Bench:
    def __init__(self, features: list[str], quality: dict[str, Check] | None = None, **spec: Any) -> None:
        self.counts: Counter[str] = Counter()
        source = MqttSource(topic=SOURCE.topic, format="sparkplug", **spec)
        self.decoder = SparkplugDecoder(
            source, features, quality or {}, self._count, parse_topic(source.topic)
        )

    def _count(self, what: str, number: int) -> None:
        self.counts[what] += number

    def on(self, kind: str, body: bytes, device: str = "d") -> list[tuple[int, list[float], str]]:
        topic = f"spBv1.0/g/{kind}/n" + ("" if kind[0] == "N" else f"/{device}")
        return [
            (int(part.event_time[row]) // 1000, part.values[row].tolist(), part.problems.get(row, ""))
            for part in self.decoder.decode(body, NOW, topic)
            for row in range(len(part))
        ]


def test_a_birth_names_aliases_and_data_changes_what_it_reports() -> None:
    bench = Bench(["flow", "temp"])
    assert bench.decoder.birth_missing
    assert bench.on("NBIRTH", payload(metric("bdSeq", "Int64", 3), seq=0)) == []
    assert not bench.decoder.birth_missing
    birth = payload(
        metric("flow", value=1.5, alias=7, timestamp=T0 - 50), metric("temp", "Float", 2.5, alias=8), seq=1
    )
    assert bench.on("DBIRTH", birth) == [(T0, [1.5, 2.5], "")]
    data = payload({"alias": 7, "double_value": 9.0, "timestamp": T0 + 40}, seq=2, at=T0 + 50)
    assert bench.on("DDATA", data) == [(T0 + 40, [9.0, 2.5], "")], "by exception: the rest holds"
    both = payload(
        {"alias": 8, "float_value": 4.0, "timestamp": T0 + 70},
        {"alias": 7, "double_value": 3.0, "timestamp": T0 + 60},
        seq=3,
    )
    assert bench.on("DDATA", both) == [(T0 + 60, [3.0, 2.5], ""), (T0 + 70, [3.0, 4.0], "")]
    assert not bench.counts


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("Int8", 0xFFFFFFFB, -5), ("Int16", 0xFFFB, -5), ("Int32", 0xFFFFFFFB, -5), ("Int64", (1 << 64) - 5, -5),
        ("UInt8", 251, 251), ("UInt32", 0xFFFFFFFB, 0xFFFFFFFB), ("UInt64", 1 << 40, 1 << 40), ("Float", 1.5, 1.5),
        ("Double", 1e100, 1e100), ("Boolean", True, 1), ("Boolean", False, 0),
    ],
)  # fmt: skip
def test_datatypes_become_numbers(kind: str, value: Any, expected: float) -> None:
    bench = Bench(["x"])
    assert bench.on("DBIRTH", payload(metric("x", kind, value, alias=1))) == [(T0, [expected], "")]
    bare = metric("", kind, value, alias=1)
    del bare["datatype"]
    assert bench.on("DDATA", payload(bare)) == [(T0, [expected], "")], "the birth said the type"


def test_null_and_text_are_missing() -> None:
    bench = Bench(["x"])
    for body in (
        metric("x", value=None),
        metric("x", value=5.0, is_null=True),
        metric("x", "String", "7"),
        metric("x", value=math.inf),
    ):
        ((_, (value,), problem),) = bench.on("DDATA", payload(body))
        assert math.isnan(value) and problem == "x: missing or not a finite number"


def test_deaths_take_the_values_away() -> None:
    for kind in ("DDEATH", "NDEATH"):
        bench = Bench(["x", "y"])
        bench.on("DBIRTH", payload(metric("x", value=1.0), metric("y", value=2.0)))
        assert bench.on(kind, payload()) == []
        ((_, _, problem),) = bench.on("DDATA", payload(metric("x", value=3.0)))
        assert problem.startswith("y: missing")


def test_gaps_and_unknown_aliases_are_counted_and_ask_for_a_birth() -> None:
    bench = Bench(["x"])
    bench.on("NBIRTH", payload(seq=0))
    bench.on("DBIRTH", payload(metric("x", value=1.0, alias=1), seq=1), device="other")
    bench.on("NDATA", payload(seq=2))
    assert not bench.counts, "the number runs over all devices of a node"
    bench.on("DDATA", payload(metric("x", value=1.0), seq=5))
    assert bench.counts == {"sequence_gaps": 1} and bench.decoder.birth_missing
    bench.on("NBIRTH", payload(seq=255))
    bench.on("DDATA", payload(metric("x", value=1.0), seq=0))
    assert bench.counts == {"sequence_gaps": 1} and not bench.decoder.birth_missing
    assert bench.on("DDATA", payload({"alias": 1, "double_value": 3.0}, seq=1)) == []
    assert bench.counts["unknown_aliases"] == 1 and bench.decoder.birth_missing


def test_an_alias_belongs_to_its_device_and_dies_with_the_nodes_birth() -> None:
    bench = Bench(["x"])
    aliased = payload({"alias": 1, "double_value": 3.0})
    bench.on("DBIRTH", payload(metric("x", value=1.0, alias=1)), device="other")
    assert bench.on("DDATA", aliased) == []
    bench.on("DBIRTH", payload(metric("x", value=1.0, alias=1)))
    assert bench.on("DDATA", aliased) == [(T0, [3.0], "")]
    bench.on("NBIRTH", payload(seq=0))
    assert bench.on("DDATA", aliased) == []
    assert bench.counts["unknown_aliases"] == 2


def test_a_birth_says_all_there_is() -> None:
    bench = Bench(["x", "y"])
    bench.on("DBIRTH", payload(metric("x", value=1.0), metric("y", value=2.0)))
    ((_, _, problem),) = bench.on("DBIRTH", payload(metric("x", value=1.0)))
    assert problem.startswith("y: missing"), "a metric that the new birth lacks is gone"


def test_a_node_cannot_fill_the_memory_with_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.streams.decode.sparkplug._MAX_METRICS", 2)
    bench = Bench(["x"])
    metrics = [metric(f"m{index}", value=1.0, alias=index) for index in range(5)]
    bench.on("DBIRTH", payload(*metrics))
    bench.on("DDATA", payload(*({"alias": index, "double_value": 1.0} for index in range(5))))
    assert bench.counts["unknown_aliases"] == 3
    assert bench.on("DDATA", payload(metric("x", value=2.0))) == [(T0, [2.0], "")], "names still work"


def test_units_are_compared() -> None:
    bench = Bench(["x"], {"x": Check(unit="bar")})
    ((_, _, problem),) = bench.on("DBIRTH", payload(metric("x", value=1.0, unit="psi", alias=1)))
    assert problem == "x: unit is 'psi', expected 'bar'"
    ((_, (value,), problem),) = bench.on("DDATA", payload({"alias": 1, "double_value": 3.0}))
    assert math.isnan(value) and problem == "x: unit is 'psi', expected 'bar'", "the birth's unit holds"
    assert bench.on("DBIRTH", payload(metric("x", value=1.0, unit="bar"))) == [(T0, [1.0], "")]


def test_other_devices_commands_and_fields() -> None:
    bench = Bench(["flow"], fields={"flow": "Pump/Flow"}, key="device")
    body = payload(metric("Pump/Flow", value=1.0))
    assert bench.on("DDATA", body, device="other") == []
    assert bench.on("NCMD", body) == []
    (samples,) = bench.decoder.decode(body, NOW, "spBv1.0/g/DDATA/n/d")
    assert samples.keys == ("n/d",) and samples.values.tolist() == [[1.0]]


@given(st.binary(max_size=200), st.sampled_from(["", "spBv1.0/g/DBIRTH/n/d", "spBv1.0/g/DDATA/n/d"]))
def test_any_bytes_give_samples_or_a_clear_refusal(body: bytes, topic: str) -> None:
    decoder = SparkplugDecoder(SOURCE, ["x"], {}, lambda what, number: None)
    with contextlib.suppress(InvalidDocument):
        decoder.decode(body, NOW, topic)


@given(st.lists(st.tuples(st.sampled_from(["x", "y"]), st.floats(), st.integers(0, 2**64 - 1))))
def test_any_metrics_give_samples_in_the_order_of_their_times(
    metrics: list[tuple[str, float, int]],
) -> None:
    decoder = SparkplugDecoder(SOURCE, ["x", "y"], {}, lambda what, number: None)
    body = payload(*[metric(name, value=value, timestamp=at) for name, value, at in metrics])
    for samples in decoder.decode(body, NOW):
        assert samples.event_time.tolist() == sorted(samples.event_time.tolist())
