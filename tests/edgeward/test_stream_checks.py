"""A Stream that could never run, or not as it reads, is refused where it is applied."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edgeward.errors import InvalidDocument
from edgeward.wire.stream_checks import check_stream
from edgeward.wire.streams import StreamSpec

MQTT = {"mqtt": {"topic": "sensors/{site}/{device}"}}
CAMERA = {"camera": {"url": "rtsp://127.0.0.1/1"}}


def stream(**parts: Any) -> StreamSpec:
    return msgspec.convert({"source": MQTT, "features": ["a", "b"], **parts}, StreamSpec)


def source(kind: str = "mqtt", **more: Any) -> dict[str, Any]:
    return {"source": {kind: ({"topic": "t"} if kind == "mqtt" else {}) | more}}


def action(**parts: Any) -> dict[str, Any]:
    return {"actions": [{"name": "a", **parts}]}


@pytest.mark.parametrize(
    "parts",
    [
        {},
        source(values="readings[0].values", time="$.meta.at", key="$['a.b']"),
        source(fields={"a": "x.y"}, topic="plant/+/vibration/#"),
        source(topic="#"),
        source(format="csv", columns=["t", "a", "b"], time="t"),
        source(format="csv", columns=["x", "b"], fields={"a": "x"}),
        source("opcua", endpoint="opc.tcp://h", nodes={"a": "ns=2;s=A", "b": "ns=2;s=B"}),
        {"window": {"size": 5, "slide": 1, "aggregate": "mean", "lateness": 2}},
        {"window": {"count": 10, "aggregate": "stack"}},
        {"source": CAMERA, "features": []},
        action(publish="alarms/{site}"),
        action(webhook="http://127.0.0.1:9/x?y=1"),
        action(file="a/b.jsonl"),
    ],
)
def test_what_can_run_is_taken(parts: dict[str, Any]) -> None:
    check_stream(stream(**parts))


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        (source(values="a[["), "spec.source.mqtt.values"),
        (source(time="a..b"), "spec.source.mqtt.time"),
        (source(key="[x]"), "spec.source.mqtt.key"),
        (source(topic="a/{devce}"), "spec.source.mqtt.topic"),
        (source(topic="a/{"), "spec.source.mqtt.topic"),
        (source(topic="a/b+"), "spec.source.mqtt.topic"),
        (source(topic="#/a"), "spec.source.mqtt.topic"),
        (source(topic="a/+", sequence=True), "spec.source.mqtt.topic"),
        (source(format="csv", sequence=True), "spec.source.mqtt.sequence"),
        (source(fields={"zzz": "x"}), "spec.source.mqtt.fields.zzz"),
        (source(fields={"a": "$"}), "spec.source.mqtt.fields.a"),
        (source(format="csv", columns=["a"]), "spec.source.mqtt.columns"),
        (source(format="csv", columns=["a", "b"], time="t"), "spec.source.mqtt.columns"),
        (source("http", format="sparkplug"), "spec.source.http.format"),
        (source("opcua", endpoint="opc.tcp://h", nodes={"a": "x"}), "spec.source.opcua.nodes"),
        (
            source("opcua", endpoint="opc.tcp://h", nodes={"a": "x", "b": "y", "c": "z"}),
            "spec.source.opcua.nodes.c",
        ),
        (source("modbus", host="h", registers={"a": {"address": 1}}), "spec.source.modbus.registers"),
        ({"window": {"count": 10, "size": 5}}, "spec.window.count"),
        ({"window": {"size": 5, "aggregate": "stack"}}, "spec.window.aggregate"),
        ({"window": {"count": 5, "lateness": 1}}, "spec.window.lateness"),
        ({"source": CAMERA, "features": [], "window": {"aggregate": "mean"}}, "spec.window.aggregate"),
        ({"quality": {"a": {"minimum": 5, "maximum": 1}}}, "spec.quality.a.minimum"),
        ({"quality": {"c": {"minimum": 5}}}, "spec.quality.c"),
        ({"features": ["alarm", "b"]}, r"spec.features\[0\]"),
        ({"features": ["a", "threshold"]}, r"spec.features\[1\]"),
        ({"features": ["a", "a"]}, "spec.features"),
        ({"features": []}, "spec.features"),
        (action(file="../../x"), r"spec.actions\[0\].file"),
        (action(file="/etc/x"), r"spec.actions\[0\].file"),
        (action(webhook="http://"), r"spec.actions\[0\].webhook"),
        (action(webhook="http://h:0/"), r"spec.actions\[0\].webhook"),
        (action(webhook="http://h:99999/"), r"spec.actions\[0\].webhook"),
        (action(webhook="http://a b/"), r"spec.actions\[0\].webhook"),
        (action(publish="x/{line}"), r"spec.actions\[0\].publish"),
        (action(publish="sensors/{site}/{device}"), r"spec.actions\[0\].publish"),
        (source(topic="plant/#") | action(publish="plant/alarms"), r"spec.actions\[0\].publish"),
        (action(), r"spec.actions\[0\]"),
        (action(publish="x", file="y"), r"spec.actions\[0\]"),
    ],
)
def test_what_cannot_run_as_it_reads_is_refused_with_its_field(parts: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidDocument, match=rf"^{field}: "):
        check_stream(stream(**parts))
