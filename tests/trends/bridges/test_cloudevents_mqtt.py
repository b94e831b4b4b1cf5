"""CloudEvents through real brokers: at least once, whatever the broker does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edgeward.broker import EmbeddedBroker
from edgeward.clock import ManualClock
from edgeward.errors import Unavailable, UsageError
from edgeward.mqtt import Broker
from tests.contracts.test_brokers import MOSQUITTO, Mosquitto, RealBroker, needs_mosquitto, wait_for
from tests.trends.bridges.filled import Filled
from trends.bridges.bridge import Bridge, Stopped
from trends.bridges.cursor import Cursor
from trends.bridges.feed import Position
from trends.bridges.mqtt import CloudEventsTarget


@pytest.fixture(params=["embedded", pytest.param("mosquitto", marks=needs_mosquitto)])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RealBroker]:
    made: RealBroker = (
        Mosquitto(tmp_path) if request.param == "mosquitto" else EmbeddedBroker(tmp_path / "broker")
    )
    made.start()
    yield made
    made.stop()


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Filled]:
    (tmp_path / "store").mkdir()
    made = Filled(tmp_path / "store")
    yield made
    made.close()


class Consumer:
    """Stays subscribed: it subscribes again when the broker comes back."""

    def __init__(self, url: str) -> None:
        self.seen: list[MQTTMessage] = []
        self.subscribed = threading.Semaphore(0)
        self.client = Client(CallbackAPIVersion.VERSION2, "consumer", protocol=MQTTProtocolVersion.MQTTv5)
        self.client.reconnect_delay_set(1, 1)
        self.client.on_connect = lambda *_: self.client.subscribe("edgeward/events/#", qos=1)
        self.client.on_subscribe = lambda *_: self.subscribed.release()
        self.client.on_message = lambda client, userdata, message: self.seen.append(message)
        self.client.connect_async("127.0.0.1", int(url.rsplit(":", 1)[1]))
        self.client.loop_start()
        assert self.subscribed.acquire(timeout=60)

    def ids(self) -> list[str]:
        return [json.loads(message.payload)["id"] for message in list(self.seen)]

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def bridge(filled: Filled, target: CloudEventsTarget, stop: threading.Event, rows: int = 50) -> Bridge:
    cursor = Cursor(filled.folder, "ce")
    with cursor.alone():
        pass
    return Bridge(
        [filled.feed("results"), filled.feed("gaps")], target, cursor, ManualClock(), stop, rows=rows
    )


def expected(number: int) -> list[str]:
    return [f"north/a/result/e/{seq}" for seq in range(number)]


def test_every_row_is_an_event_in_order(broker: RealBroker, filled: Filled) -> None:
    filled.commit(500)
    filled.lose(500, 509)
    consumer, stop = Consumer(broker.url), threading.Event()
    target = CloudEventsTarget(Broker(broker.url), "ce", stop)
    bridge(filled, target, stop, rows=300).run(once=True)
    wait_for(lambda: len(consumer.seen) >= 501, "501 events")
    assert consumer.ids()[:500] == expected(500) and len(consumer.ids()) == 501
    first = consumer.seen[0]
    assert first.topic == "edgeward/events/north/a/results" and not first.retain and first.qos == 1
    assert first.properties is not None
    assert first.properties.ContentType == "application/cloudevents+json; charset=UTF-8"
    assert json.loads(first.payload)["data"]["outputs"] == {"score": 0.0, "b": -1.0}
    target.close()
    consumer.close()


def test_the_binary_mode_has_its_attributes_as_properties(broker: RealBroker, filled: Filled) -> None:
    filled.commit(1)
    consumer, stop = Consumer(broker.url), threading.Event()
    target = CloudEventsTarget(Broker(broker.url), "ce", stop, mode="binary")
    bridge(filled, target, stop).run(once=True)
    wait_for(lambda: len(consumer.seen) == 1, "an event")
    (message,) = consumer.seen
    assert message.properties is not None and message.properties.ContentType == "application/json"
    attributes = dict(message.properties.UserProperty)
    assert attributes["id"] == expected(1)[0] and attributes["specversion"] == "1.0"
    assert json.loads(message.payload)["seq"] == 0
    target.close()
    consumer.close()


def test_a_broker_that_is_killed_again_and_again_takes_every_row(broker: RealBroker, filled: Filled) -> None:
    """The broker has no persistence: what it had taken and not handed on is lost, and known to be its own loss.
    The bridge's part is that every row got the broker's answer."""
    filled.commit(600)
    stop = threading.Event()
    target = CloudEventsTarget(Broker(broker.url), "ce", stop)
    running = bridge(filled, target, stop, rows=10)
    kills = threading.Thread(target=lambda: [(broker.kill(), broker.start()) for _ in range(3)])
    kills.start()
    running.run(once=True)
    kills.join()
    assert running._handed_on() == 600
    target.close()


@pytest.mark.mosquitto
@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
def test_what_the_broker_refuses_is_not_handed_on(tmp_path: Path, filled: Filled) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic read #\n")
    broker = Mosquitto(tmp_path, f"allow_anonymous true\nacl_file {rules}\n")
    broker.start()
    filled.commit(5)
    stop = threading.Event()
    target = CloudEventsTarget(Broker(broker.url), "ce", stop)
    running = bridge(filled, target, stop)
    for _ in range(2):
        with pytest.raises(Unavailable, match="Not authorized") as failure:
            running.catch_up()
    assert "access" in failure.value.hint and running._handed_on() == 0
    target.close()
    broker.stop()


def test_a_stop_ends_a_wait_for_the_broker(filled: Filled) -> None:
    filled.commit(5)
    stop = threading.Event()
    target = CloudEventsTarget(Broker("mqtt://127.0.0.1:1"), "ce", stop)
    (batch,) = filled.feed().batches(Position(), 100)
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(Stopped):
        target.deliver("results", batch.rows, Position(), batch.after)
    target.close()


def test_modes_and_topics_are_checked() -> None:
    for mode, prefix in (
        ("both", "x"),
        ("binary", "a/#"),
        ("binary", "$SYS"),
        ("binary", ""),
        ("binary", "/x"),
    ):
        with pytest.raises(UsageError):
            CloudEventsTarget(Broker("mqtt://127.0.0.1:1"), "ce", threading.Event(), mode=mode, prefix=prefix)
