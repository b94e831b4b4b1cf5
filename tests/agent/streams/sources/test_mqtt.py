"""The MQTT source over a link that a test plays."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from agent.streams.sources.mqtt import QUEUE_MESSAGES, REBIRTH_AFTER_S, MqttSampleSource, Receive
from edgeward.clock import ManualClock
from edgeward.errors import InvalidDocument
from edgeward.identifiers import DeviceName
from edgeward.sparkplug import Payload
from edgeward.wire.streams import MqttSource

Until = Callable[..., None]
Start = Callable[..., None]


class PlayedLink:
    def __init__(self) -> None:
        self.subscribed: dict[str, Receive] = {}
        self.sent: list[tuple[str, bytes]] = []
        self.connected = True

    def subscribe(self, topic: str, receive: Receive) -> None:
        self.subscribed[topic] = receive

    def unsubscribe(self, topic: str) -> None:
        self.subscribed.pop(topic)

    def expect_acks(self, topic: str, position: Any, *, expected: bool = True) -> None: ...

    def acknowledge(self, topic: str, epoch: str, seq: int) -> None:
        self.publish(f"{topic}/ack", json.dumps({"epoch": epoch, "seq": seq}).encode())

    def publish(self, topic: str, payload: bytes) -> bool:
        if self.connected:
            self.sent.append((topic, payload))
        return self.connected


class Bench:
    def __init__(self, features: list[str], **spec: Any) -> None:
        self.link = PlayedLink()
        self.clock = ManualClock()
        self.source = MqttSampleSource(
            MqttSource(**spec), features, {}, DeviceName("north", "turbine-1"), self.link, self.clock
        )

    def message(self, payload: Any, topic: str = "", on: str = "") -> None:
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        (self.link.subscribed[on or self.source.topic])(topic or self.source.topic, body)


def test_messages_become_samples_and_commits_acks(sink: Any, until: Until, start: Start) -> None:
    bench = Bench(["a"], topic="sensors/{site}/{device}", sequence=True)
    start(bench.source, sink)
    assert list(bench.link.subscribed) == ["sensors/north/turbine-1"]
    bench.message([{"epoch": "e", "seq": 0, "a": 1}, {"epoch": "e", "seq": 1, "a": 2}])
    bench.message(b"nonsense")
    bench.message({"epoch": "e", "seq": 2, "a": 3})
    until(lambda: sink.values == [[1], [2], [3]])
    assert sink.counts == {"rejected": 1}
    bench.source.committed("e", 2)
    assert bench.link.sent == [("sensors/north/turbine-1/ack", b'{"epoch": "e", "seq": 2}')]
    bench.source.stop()
    assert not bench.link.subscribed


def test_a_full_stream_is_waited_for_and_a_full_queue_drops(
    new_sink: Any, until: Until, start: Start
) -> None:
    bench = Bench(["a"], topic="t")
    sink = new_sink(room=0)
    start(bench.source, sink)
    bench.message({"a": 0})
    until(lambda: sink.refused > 1)
    for number in range(1, QUEUE_MESSAGES + 3):
        bench.message({"a": number})
    assert sink.counts == {"dropped": 2}, "the connection's thread never waits"
    sink.room = None
    until(lambda: len(sink.parts) == QUEUE_MESSAGES + 1)
    assert sink.values == [[number] for number in range(QUEUE_MESSAGES + 1)], "none lost, none twice"
    bench.source.stop()


def test_it_stops_while_the_stream_is_full(new_sink: Any, until: Until, start: Start) -> None:
    bench = Bench(["a"], topic="t")
    sink = new_sink(room=0)
    start(bench.source, sink)
    bench.message({"a": 0})
    until(lambda: sink.refused > 1)
    bench.source.stop()
    refused = sink.refused
    assert not any(thread.name == "mqtt-t" for thread in threading.enumerate())
    assert sink.refused == refused and not sink.parts


def test_stopping_what_never_started_is_harmless() -> None:
    bench = Bench(["a"], topic="t")
    bench.source.stop()
    bench.source.stop()


def test_a_sparkplug_node_is_listened_to_whole_and_asked_for_its_birth(
    sink: Any, until: Until, start: Start
) -> None:
    bench = Bench(["x"], topic="spBv1.0/g/DDATA/n/d", format="sparkplug")
    bench.link.connected = False
    start(bench.source, sink)
    assert set(bench.link.subscribed) == {"spBv1.0/g/+/n", "spBv1.0/g/+/n/+"}
    bench.link.connected = True
    until(lambda: bench.link.sent, "the request for a birth, once there is a connection")
    ((topic, body),) = bench.link.sent
    command = Payload.FromString(body).metrics[0]
    assert topic == "spBv1.0/g/NCMD/n" and command.name == "Node Control/Rebirth" and command.boolean_value

    def play(kind: str, device: str, seq: int, *metrics: dict[str, Any]) -> None:
        message = Payload(timestamp=1_700_000_000_000, seq=seq, metrics=metrics)
        on = f"spBv1.0/g/+/n{'/+' if device else ''}"
        bench.message(message.SerializeToString(), f"spBv1.0/g/{kind}/n{device and '/' + device}", on)

    for seq in range(3):
        play("DDATA", "d", seq, {"alias": 1, "double_value": 2.0})
    until(lambda: sink.counts["unknown_aliases"] == 3)
    assert len(bench.link.sent) == 1, "not asked again and again"
    play("NBIRTH", "", 0)
    play("DBIRTH", "d", 1, {"name": "x", "alias": 1, "double_value": 1.0})
    play("DDATA", "d", 2, {"alias": 1, "double_value": 2.0})
    until(lambda: sink.values == [[1], [2]])
    bench.clock.advance(REBIRTH_AFTER_S)
    play("DDATA", "d", 9, {"alias": 1, "double_value": 3.0})
    until(lambda: len(bench.link.sent) == 2, "a request after the gap")
    assert sink.counts["sequence_gaps"] == 1
    bench.source.stop()


def test_a_topic_that_is_no_sparkplug_one_is_refused() -> None:
    with pytest.raises(InvalidDocument, match=r"spec\.source\.mqtt\.topic"):
        Bench(["x"], topic="spBv1.0/g", format="sparkplug")
    assert Bench(["x"], topic="plain/topic", format="sparkplug").source.topic == "plain/topic"


def test_samples_of_several_topics_are_told_apart_by_their_topic(
    sink: Any, until: Until, start: Start
) -> None:
    bench = Bench(["a"], topic="plant/+/vibration")
    start(bench.source, sink)
    for pump in ("p1", "p2"):
        bench.message([{"a": 1}, {"a": 2}], topic=f"plant/{pump}/vibration", on="plant/+/vibration")
    until(lambda: len(sink.parts) == 2)
    assert [part.keys for part in sink.parts] == [("plant/p1/vibration",) * 2, ("plant/p2/vibration",) * 2]
    own = Bench(["a"], topic="plant/#", key="k")
    start(own.source, sink)
    own.message({"a": 1, "k": "pump"}, topic="plant/x", on="plant/#")
    until(lambda: len(sink.parts) == 3)
    assert sink.parts[2].keys == ("pump",)
