"""A Sparkplug edge node by the rules of the specification, pure and on real brokers."""

from __future__ import annotations

import datetime
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from agent.streams.decode.sparkplug import SparkplugDecoder, SparkplugTopic
from edgeward.broker import EmbeddedBroker
from edgeward.clock import ManualClock, SystemClock
from edgeward.errors import InvalidDocument, Unavailable, UsageError
from edgeward.mqtt import Broker
from edgeward.sparkplug import METRIC_TYPES, REBIRTH, Payload
from edgeward.wire.streams import PayloadSource
from tests.contracts.test_brokers import MOSQUITTO, Mosquitto, RealBroker, needs_mosquitto, wait_for
from tests.trends.bridges.filled import Filled
from trends.bridges import sparkplug
from trends.bridges.bridge import Bridge
from trends.bridges.cursor import Cursor
from trends.bridges.feed import Position
from trends.bridges.mqtt import SparkplugTarget
from trends.bridges.sparkplug import EdgeNode, Outgoing, check_id, wants_rebirth
from trends.schemas import SCHEMAS

T0 = datetime.datetime(2026, 9, 1, tzinfo=datetime.UTC)


class Host:
    """Follows one edge node as a host application does, and holds it to the specification's rules."""

    def __init__(self) -> None:
        self.bdseq: int | None = None
        self.seq: int | None = None
        self.aliases: dict[int, tuple[str, str, int]] = {}
        self.values: dict[tuple[str, str], Any] = {}
        self.history: list[tuple[str, str, Any, bool]] = []
        self.kinds: list[str] = []
        self.alive = False

    def take(self, topic: str, payload: bytes) -> None:
        namespace, group, kind, node, *device = topic.split("/")
        assert (namespace, group, node) == ("spBv1.0", "plant", "store")
        message = Payload.FromString(payload)
        assert message.HasField("timestamp")
        self.kinds.append(kind)
        if kind == "NDEATH":
            assert not message.HasField("seq") and [m.name for m in message.metrics] == ["bdSeq"]
            if message.metrics[0].long_value == self.bdseq:
                self.alive = False
            return
        if kind == "NBIRTH":
            assert message.seq == 0
            self.alive, self.aliases, self.values = True, {}, {}
            names = {metric.name: metric for metric in message.metrics}
            assert names["bdSeq"].datatype == METRIC_TYPES["Int64"]
            assert 0 <= names["bdSeq"].long_value <= 255
            self.bdseq = names["bdSeq"].long_value
            assert names[REBIRTH].HasField("boolean_value") and names[REBIRTH].boolean_value is False
        else:
            assert self.alive and self.seq is not None and message.seq == (self.seq + 1) % 256, (
                self.seq,
                message.seq,
            )
        self.seq = message.seq
        for metric in message.metrics:
            assert metric.HasField("timestamp")
            if kind in ("NBIRTH", "DBIRTH"):
                assert metric.name and metric.datatype
                if kind == "DBIRTH":
                    known = self.aliases.setdefault(metric.alias, (device[0], metric.name, metric.datatype))
                    assert known == (device[0], metric.name, metric.datatype), "an alias is of one metric"
            else:
                assert kind == "DDATA" and not metric.HasField("name"), "data goes by alias"
                assert self.aliases[metric.alias][0] == device[0]
            if kind != "NBIRTH":
                _, name, datatype = self.aliases[metric.alias]
                value = _value(metric, datatype)
                if not metric.is_historical:
                    self.values[device[0], name] = value
                self.history.append((device[0], name, value, metric.is_historical))
        if kind == "DBIRTH":
            named = {metric.name for metric in message.metrics}
            assert {name for where, name in self.values if where == device[0]} <= named, "a birth names all"


def _value(metric: Any, datatype: int) -> Any:
    kind = next(name for name, number in METRIC_TYPES.items() if number == datatype)
    field = {
        "Double": "double_value",
        "Int64": "long_value",
        "Boolean": "boolean_value",
        "String": "string_value",
    }[kind]
    assert metric.HasField(field)
    return getattr(metric, field)


def results(rows: list[tuple[str, int, dict[str, float], str]]) -> pa.Table:
    """(device, second, outputs, digest)"""
    made = [
        {
            "date": "2026-09-01", "site": "north", "device": device, "epoch": "e", "seq": seq, "received": T0,
            "event_time": T0 + datetime.timedelta(seconds=second), "stream": "press", "revision": 1, "key": "",
            "source_epoch": "", "source_seq": -1, "digest": digest, "variant": "v", "provider": "p",
            "outputs": list(outputs.items()), "alarm": False,
        }
        for seq, (device, second, outputs, digest) in enumerate(rows)
    ]  # fmt: skip
    return pa.Table.from_pylist(made, schema=SCHEMAS["results"])


def told(host: Host, messages: Any) -> Host:
    for message in messages:
        assert isinstance(message, Outgoing)
        host.take(message.topic, message.payload)
    return host


some_rows = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 100),
        st.dictionaries(st.sampled_from(["x", "y", "ü/z"]), st.floats(allow_nan=False), min_size=1),
        st.sampled_from(["d1", "d2"]),
    ),
    max_size=30,
)


@given(st.lists(st.one_of(some_rows, st.just("rebirth")), max_size=6))
def test_a_host_that_holds_to_the_specification_follows(steps: list[Any]) -> None:
    node, host = EdgeNode("plant", "store"), Host()
    node.bdseq = 7
    told(host, node.births(1))
    newest: dict[tuple[str, str], tuple[int, float]] = {}
    count = 0
    for step in steps:
        if step == "rebirth":
            told(host, node.births(2))
        else:
            told(host, node.data("results", results(step), 3))
            for device, second, outputs, _ in step:
                for name, value in outputs.items():
                    key = (device, f"press/outputs/{name}")
                    count += 1
                    if key not in newest or second >= newest[key][0]:
                        newest[key] = (second, value)
    assert {key: host.values[key] for key in newest} == {key: value for key, (_, value) in newest.items()}
    if "rebirth" not in steps:
        data = [entry for entry in host.history if "/outputs/" in entry[1]]
        assert len(data) >= count, "late values are told, too"
    told(host, [node.death(4)])
    assert not host.alive


def test_numbers_run_to_255_and_begin_anew() -> None:
    node, host = EdgeNode("plant", "store"), Host()
    told(host, node.births(1))
    for second in range(600):
        told(host, node.data("results", results([("a", second, {"x": 1.0}, "d")]), 2))
    assert host.kinds.count("DDATA") == 599 and host.kinds.count("DBIRTH") == 1


def test_a_late_value_is_historical_and_changes_no_state() -> None:
    node, host = EdgeNode("plant", "store"), Host()
    told(host, node.births(1))
    told(host, node.data("results", results([("a", 10, {"x": 1.0}, "d"), ("a", 5, {"x": 9.0}, "d")]), 2))
    assert ("a", "press/outputs/x", 9.0, True) in host.history
    assert host.values["a", "press/outputs/x"] == 1.0
    told(host, node.births(3))
    assert host.values["a", "press/outputs/x"] == 1.0, "nor what a birth says"


def test_messages_are_bounded() -> None:
    node, host = EdgeNode("plant", "store"), Host()
    told(host, node.births(1))
    rows = [("a", second, {str(number): 1.0 for number in range(40)}, "d") for second in range(200)]
    messages = list(node.data("results", results(rows), 2))
    told(host, messages)
    assert max(len(Payload.FromString(message.payload).metrics) for message in messages) <= 1000
    assert sum("/outputs/" in name for _, name, _, _ in host.history) == 40 * 200


def test_a_device_cannot_have_any_number_of_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparkplug, "MAX_METRICS", 10)
    node, host = EdgeNode("plant", "store"), Host()
    told(host, node.births(1))
    told(host, node.data("results", results([("a", n, {f"x{n}": 1.0}, "d") for n in range(50)]), 2))
    assert len(host.values) == 10 and node.ignored > 0


def test_every_table_but_gaps_is_told(tmp_path: Path) -> None:
    filled = Filled(tmp_path)
    node, host = EdgeNode("plant", "store"), Host()
    told(host, node.births(1))
    for lane, table in (
        ("result", "results"),
        ("alarm", "alarms"),
        ("sample", "samples"),
        ("trend", "trends"),
    ):
        filled.commit(3, lane=lane)  # type: ignore[arg-type]
        for batch in filled.feed(table).batches(Position(), 10):
            told(host, node.data(table, batch.rows, 2))
    found = {name: value for (_, name), value in host.values.items()}
    assert found["press/outputs/score"] == 1.0 and found["press/model"] == "d" * 64
    assert found["press/alarm"] is False and found["press/alarms/value"] == 2.25
    assert found["press/values/ü"] == 2.0 and found["press/trends/output:score/fp32/count"] == 3
    filled.close()


def test_ids_and_commands() -> None:
    for name in ("", "a/b", "a+", "#", "x\n", "x" * 129):
        with pytest.raises(UsageError):
            check_id(name, "--group")
    assert check_id("Werk 3", "--group") == "Werk 3"
    for command in (b"\xff\xff", b"\x12\x7f"):
        with pytest.raises(InvalidDocument):
            wants_rebirth(command)
    assert wants_rebirth(rebirth_command())
    assert not wants_rebirth(Payload(metrics=[{"name": REBIRTH, "boolean_value": False}]).SerializeToString())
    assert not wants_rebirth(b"")


def rebirth_command() -> bytes:
    metric = {"name": REBIRTH, "datatype": METRIC_TYPES["Boolean"], "boolean_value": True}
    message: bytes = Payload(timestamp=1, metrics=[metric]).SerializeToString()
    return message


# On real brokers.


class Observer:
    """A host on a broker; a thread of paho's hands it everything in order."""

    def __init__(self, broker: RealBroker) -> None:
        self.host = Host()
        self.seen: list[MQTTMessage] = []
        self.failure: BaseException | None = None
        port = int(broker.url.rsplit(":", 1)[1])
        self.client = Client(CallbackAPIVersion.VERSION2, "host", protocol=MQTTProtocolVersion.MQTTv5)
        self.client.on_connect = lambda *_: self.client.subscribe("spBv1.0/#", qos=1)
        ready = threading.Event()
        self.client.on_subscribe = lambda *_: ready.set()
        self.client.on_message = self._received
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        assert ready.wait(30)

    def _received(self, client: Any, userdata: Any, message: MQTTMessage) -> None:
        self.seen.append(message)
        if "/NCMD/" in message.topic:
            return
        try:
            self.host.take(message.topic, bytes(message.payload))
        except BaseException as error:  # shown by the test
            self.failure = self.failure or error

    def wait(self, condition: Callable[[Host], bool], what: str) -> None:
        wait_for(lambda: self.failure is not None or condition(self.host), what)
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


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


def node_on(broker: RealBroker, filled: Filled, stop: threading.Event) -> tuple[SparkplugTarget, Bridge]:
    cursor = Cursor(filled.folder, "sparkplug")
    with cursor.alone():
        pass
    target = SparkplugTarget(Broker(broker.url), "plant", "store", SystemClock(), stop, cursor.next_birth)
    return target, Bridge([filled.feed()], target, cursor, ManualClock(), stop, rows=20)


def test_a_node_on_a_broker(broker: RealBroker, filled: Filled, caplog: pytest.LogCaptureFixture) -> None:
    """Births, data, births on command, a new connection, a clean end; and our own decoder reads it."""
    observer = Observer(broker)
    filled.commit(50)
    target, bridge = node_on(broker, filled, threading.Event())
    bridge.run(once=True)
    key = ("a", "press/outputs/score")
    observer.wait(lambda host: host.values.get(key) == 24.5, "all 50 rows")
    assert observer.host.bdseq == 0 and not any(message.retain for message in observer.seen)
    if isinstance(broker, Mosquitto):  # rumqttd raises a message to its subscription's QoS
        assert {message.qos for message in observer.seen} == {0}

    observer.client.publish("spBv1.0/plant/NCMD/store", b"\xffrubbish", qos=1)
    observer.client.publish("spBv1.0/plant/NCMD/store", rebirth_command(), qos=1)
    observer.wait(lambda host: host.kinds.count("NBIRTH") == 2 and host.values.get(key) == 24.5, "a rebirth")
    assert observer.host.bdseq == 0, "of the same connection"

    filled.commit(4)
    bridge.run(once=True)
    observer.wait(lambda host: host.values.get(key) == 26.5, "the next rows")
    target.close()
    observer.wait(lambda host: not host.alive, "the death on leaving")
    assert observer.seen[-1].qos == 1

    again, bridge = node_on(broker, filled, threading.Event())
    observer.wait(lambda host: host.alive, "a new birth")
    assert observer.host.bdseq == 1, "counted over restarts"
    again.close()
    observer.close()
    _read_by_our_decoder(observer.seen)
    assert [
        record for record in caplog.records if record.name == "edgeward.mqtt" and record.levelname == "ERROR"
    ] == []
    assert "a command on spBv1.0/plant/NCMD/store is left" in caplog.text


def _read_by_our_decoder(seen: list[MQTTMessage]) -> None:
    gaps: list[str] = []
    decoder = SparkplugDecoder(
        PayloadSource(format="sparkplug", fields={"score": "press/outputs/score"}),
        ["score"], {}, lambda name, number: gaps.append(name), SparkplugTopic("plant", "DDATA", "store", "a"),
    )  # fmt: skip
    scores: list[float] = []
    for message in seen:
        if "/NCMD/" not in message.topic:
            for samples in decoder.decode(bytes(message.payload), 0.0, message.topic):
                scores += samples.values[:, 0].tolist()
    assert {number / 2 for number in range(54)} <= set(scores) and gaps == []


def test_a_node_that_dies_is_told_dead_by_its_will(broker: RealBroker, filled: Filled) -> None:
    observer = Observer(broker)
    target, _ = node_on(broker, filled, threading.Event())
    observer.wait(lambda host: host.alive, "the birth")
    socket = target._link._client.socket()
    assert socket is not None
    socket.shutdown(2)  # type: ignore[union-attr]  # a plain socket
    observer.wait(lambda host: "NDEATH" in host.kinds, "the will")
    observer.wait(lambda host: host.alive and host.bdseq == 1, "a new connection with a birth of its own")
    death = next(message for message in observer.seen if "/NDEATH/" in message.topic)
    assert death.qos == 1 and not death.retain
    assert Payload.FromString(bytes(death.payload)).metrics[0].long_value == 0
    target.close()
    observer.close()


def test_rows_wait_while_the_broker_is_away(broker: RealBroker, filled: Filled) -> None:
    stop = threading.Event()
    target, bridge = node_on(broker, filled, stop)
    wait_for(lambda: target._online, "connected")
    broker.kill()
    wait_for(lambda: not target._online, "disconnected")
    filled.commit(5)
    with pytest.raises(Unavailable):
        bridge.catch_up()
    assert bridge._handed_on() == 0
    broker.start()
    observer = Observer(broker)
    bridge.run(once=True)
    observer.wait(lambda host: True, "")
    assert bridge._handed_on() == 5
    target.close()
    observer.close()


@pytest.mark.mosquitto
@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
def test_what_the_broker_has_not_read_is_not_handed_on(tmp_path: Path, filled: Filled) -> None:
    """It is stopped, so that what is sent stays in the socket, and then killed."""
    broker = Mosquitto(tmp_path)
    broker.start()
    target, bridge = node_on(broker, filled, threading.Event())
    wait_for(lambda: target._online, "connected")
    filled.commit(5)
    assert broker._process is not None
    broker._process.send_signal(signal.SIGSTOP)
    failures: list[Exception] = []

    def deliver() -> None:
        try:
            bridge.catch_up()
        except Unavailable as error:
            failures.append(error)

    thread = threading.Thread(target=deliver)
    thread.start()
    wait_for(lambda: target._node._seq == 3, "NBIRTH, DBIRTH and DDATA")
    with target._order:
        pass  # the request is on its way, too
    broker.kill()
    thread.join()
    assert len(failures) == 1 and bridge._handed_on() == 0
    target.close()


def test_no_data_before_the_birth(broker: RealBroker, filled: Filled) -> None:
    """The moment between the broker's answer and the births."""
    target, bridge = node_on(broker, filled, threading.Event())
    wait_for(lambda: target._online, "connected")
    observer = Observer(broker)
    filled.commit(1)
    target._online = False
    with pytest.raises(Unavailable, match="not connected"):
        bridge.catch_up()
    observer.client.publish("spBv1.0/plant/NCMD/store", rebirth_command(), qos=1)
    observer.wait(lambda host: host.alive, "the birth")
    first = next(message.topic for message in observer.seen if "NCMD" not in message.topic)
    assert first == "spBv1.0/plant/NBIRTH/store"
    target.close()
    observer.close()
