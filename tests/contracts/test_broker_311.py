"""Sensors and panels that speak MQTT 3.1.1, on the embedded broker: a real client of that version."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest

from edgeward.broker import EmbeddedBroker, free_port
from edgeward.errors import EdgewardError
from edgeward.mqtt import Broker, Link, Message

WAIT = 30.0


class OldClient:
    """paho-mqtt as it is by default; `port` is the broker's."""

    def __init__(self, port: int, will: str = "") -> None:
        self.messages: queue.Queue[tuple[str, bytes, bool]] = queue.Queue()
        self.connected, self.subscribed, self.lost = threading.Event(), threading.Event(), threading.Event()
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        self.client.on_connect = lambda *_: self.connected.set()
        self.client.on_subscribe = lambda *_: self.subscribed.set()
        self.client.on_disconnect = lambda *_: self.lost.set()
        self.client.on_message = lambda _, __, got: self.messages.put((got.topic, got.payload, got.retain))
        if will:
            self.client.will_set(will, b"gone", qos=1)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def subscribe(self, topic: str) -> None:
        assert self.connected.wait(WAIT)
        self.client.subscribe(topic, qos=1)
        assert self.subscribed.wait(WAIT)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(tmp_path / "broker", port_311=0) as running:
        yield running


@pytest.fixture
def old(broker: EmbeddedBroker) -> Iterator[OldClient]:
    assert broker.port_311 is not None
    client = OldClient(broker.port_311)
    yield client
    client.close()


@pytest.fixture
def link(broker: EmbeddedBroker) -> Iterator[tuple[Link, queue.Queue[Message]]]:
    """The agent's side: MQTT v5."""
    got: queue.Queue[Message] = queue.Queue()
    ready = threading.Event()
    made = Link(
        Broker(broker.url), "agent", subscriptions=("plant/#",), on_message=got.put, on_connect=ready.set
    )
    made.start()
    assert ready.wait(WAIT)
    made.publish("plant/probe", b"")  # on the same connection: once it is back, the subscription stands
    got.get(timeout=WAIT)
    yield made, got
    made.stop()


def test_what_a_sensor_publishes_reaches_the_agent(
    old: OldClient, link: tuple[Link, queue.Queue[Message]]
) -> None:
    assert old.connected.wait(WAIT)
    sent = [b"%d" % number for number in range(500)]
    for payload in sent:
        old.client.publish("plant/sensor", payload, qos=1)
    assert [link[1].get(timeout=WAIT).payload for _ in sent] == sent


def test_a_panel_hears_what_the_agent_publishes_and_stays_connected(
    old: OldClient, link: tuple[Link, queue.Queue[Message]], broker: EmbeddedBroker
) -> None:
    old.subscribe("panel/#")
    sent = [b"%d" % number for number in range(500)]
    for payload in sent:
        assert link[0].publish("panel/alarm", payload)
    assert [old.messages.get(timeout=WAIT)[1] for _ in sent] == sent
    assert link[0].publish("panel/state", b"last", retain=True)
    assert old.messages.get(timeout=WAIT) == ("panel/state", b"last", False)
    assert broker.port_311 is not None
    late = OldClient(broker.port_311)
    late.subscribe("panel/state")
    assert late.messages.get(timeout=WAIT) == ("panel/state", b"last", True)
    late.close()
    assert not old.lost.is_set()


def test_the_last_will_of_a_sensor_reaches_the_agent(
    broker: EmbeddedBroker, link: tuple[Link, queue.Queue[Message]]
) -> None:
    assert broker.port_311 is not None
    dying = OldClient(broker.port_311, will="plant/gone")
    assert dying.connected.wait(WAIT)
    dying.client.loop_stop()
    socket = dying.client.socket()
    assert socket is not None
    socket.close()
    assert link[1].get(timeout=WAIT).topic == "plant/gone"


def test_the_port_for_v5_does_not_take_them(broker: EmbeddedBroker) -> None:
    """What the documentation warns of; where this fails, the second port is no longer needed."""
    client = OldClient(broker.port)
    assert client.lost.wait(WAIT) and not client.connected.is_set()
    client.close()


def test_a_taken_port_is_named(broker: EmbeddedBroker, tmp_path: Path) -> None:
    other = EmbeddedBroker(tmp_path / "other", port_311=broker.port_311)
    with pytest.raises(EdgewardError, match=rf"port {broker.port_311} on 127.0.0.1 is taken"):
        other.start()
    assert EmbeddedBroker(tmp_path / "none", free_port()).port_311 is None
