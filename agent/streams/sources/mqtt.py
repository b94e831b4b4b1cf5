"""Samples from an MQTT topic, through the agent's one connection to the local broker."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol

from agent.streams.decode.columns import clean_text
from agent.streams.decode.decoder import Decoder, decoder_for
from agent.streams.decode.sequence import Position
from agent.streams.sources.port import Sink
from agent.streams.sources.waiting import offer
from edgeward.clock import Clock
from edgeward.errors import InvalidDocument
from edgeward.identifiers import DeviceName
from edgeward.wire.streams import Check, MqttSource

log = logging.getLogger(__name__)

QUEUE_MESSAGES: Final = 2000
# Births of a whole node are large, so a node that does not answer is not asked all the time.
REBIRTH_AFTER_S: Final = 30.0

Receive = Callable[[str, bytes], None]


class MqttLink(Protocol):
    """The agent's connection. It subscribes again by itself when it was lost."""

    def subscribe(self, topic: str, receive: Receive) -> None:
        """Call `receive(topic, payload)` for each message on `topic`, which may hold `+` for one level."""
        ...

    def unsubscribe(self, topic: str) -> None: ...

    def expect_acks(self, topic: str, position: Position | None, *, expected: bool = True) -> None:
        """Whether this reader acknowledges what comes on a numbering sensor's topic, having `position`."""
        ...

    def acknowledge(self, topic: str, epoch: str, seq: int) -> None:
        """Everything up to here is durable for this reader: the sensor is told on `{topic}/ack` how far all
        readers of its topic are."""
        ...

    def publish(self, topic: str, payload: bytes) -> bool:
        """False when the broker is not connected."""
        ...


def fill_in(topic: str, name: DeviceName) -> str:
    return topic.replace("{site}", name.site).replace("{device}", name.device)


class MqttSampleSource:
    """Counts `rejected` messages that are no samples and `dropped` ones that a full queue could not take:
    a numbering sensor sends both again, since neither is acknowledged."""

    def __init__(
        self,
        spec: MqttSource,
        features: Sequence[str],
        quality: Mapping[str, Check],
        name: DeviceName,
        link: MqttLink,
        clock: Clock,
        position: Position | None = None,
    ) -> None:
        """`position` is what the stream has committed last.

        Raises InvalidDocument or MissingDependency when the payload format cannot be decoded."""
        self.topic = fill_in(spec.topic, name)
        self._link = link
        self._clock = clock
        self._sink: Sink | None = None
        self._queue: queue.Queue[tuple[str, bytes]] = queue.Queue(QUEUE_MESSAGES)
        self._keyed_by_topic = not spec.key and not {"+", "#"}.isdisjoint(self.topic)
        self._numbered = spec.sequence
        self._position = position
        self._reading = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"mqtt-{self.topic}", daemon=True)
        self._subscriptions = [self.topic]
        self._rebirth: _Rebirth | None = None
        if spec.format == "sparkplug":
            self._decoder = self._sparkplug(spec, features, quality)
        else:
            self._decoder = decoder_for(spec, features, quality, self._count)

    def _sparkplug(self, spec: MqttSource, features: Sequence[str], quality: Mapping[str, Check]) -> Decoder:
        from agent.streams.decode.sparkplug import SparkplugDecoder, parse_topic
        from edgeward.sparkplug import NAMESPACE

        where = parse_topic(self.topic)
        if where is None:
            if self.topic.startswith(NAMESPACE):
                raise InvalidDocument(
                    f"not a Sparkplug topic: {self.topic}",
                    field="spec.source.mqtt.topic",
                    hint="spBv1.0/group/DDATA/node/device or spBv1.0/group/NDATA/node",
                )
            return SparkplugDecoder(spec, features, quality, self._count)
        decoder = SparkplugDecoder(spec, features, quality, self._count, where)
        # Births and deaths come on topics of their own, and the numbers run over all devices of a node.
        node = f"{NAMESPACE}/{where.group}/+/{where.node}"
        self._subscriptions = [node, f"{node}/+"]
        self._rebirth = _Rebirth(
            f"{NAMESPACE}/{where.group}/NCMD/{where.node}",
            lambda: decoder.birth_missing,
            self._link,
            self._clock,
        )
        return decoder

    def start(self, sink: Sink) -> None:
        self._sink = sink
        self._thread.start()
        for topic in self._subscriptions:
            self._link.subscribe(topic, self._receive)

    def stop(self) -> None:
        if self._sink is not None and not self._stop.is_set():
            for topic in self._subscriptions:
                self._link.unsubscribe(topic)
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def reading(self, reading: bool) -> None:
        """Whether the stream takes samples now: a sensor that others read too need not wait while it does not."""
        if self._numbered and reading != self._reading:
            self._reading = reading
            self._link.expect_acks(self.topic, self._position, expected=reading)

    def committed(self, epoch: str, seq: int) -> None:
        self._position = epoch, seq
        self._link.acknowledge(self.topic, epoch, seq)

    def _receive(self, topic: str, payload: bytes) -> None:
        """Runs on the connection's thread, which must not wait."""
        try:
            self._queue.put_nowait((topic, payload))
        except queue.Full:
            self._count("dropped", 1)

    def _count(self, what: str, number: int) -> None:
        if self._sink is not None:
            self._sink.count(what, number)

    def _work(self) -> None:
        sink = self._sink
        assert sink is not None
        while not self._stop.is_set():
            if self._rebirth is not None:
                self._rebirth.ask_if_due()
            try:
                topic, payload = self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
            try:
                parts = self._decoder.decode(payload, self._clock.now(), topic)
            except InvalidDocument as error:
                sink.count("rejected", 1)
                log.warning("%s: ignored a message: %s", topic, error)
                continue
            for samples in parts:
                if self._keyed_by_topic and not samples.keys:
                    samples = replace(samples, keys=(clean_text(topic),) * len(samples))
                if not offer(sink, samples, self._stop):
                    return


class _Rebirth:
    """Asks a Sparkplug node for its births, which a broker does not keep."""

    def __init__(self, topic: str, wanted: Callable[[], bool], link: MqttLink, clock: Clock) -> None:
        self._topic = topic
        self._wanted = wanted
        self._link = link
        self._clock = clock
        self._asked: float | None = None

    def ask_if_due(self) -> None:
        from edgeward.sparkplug import METRIC_TYPES, REBIRTH, Payload

        now = self._clock.monotonic()
        if not self._wanted() or (self._asked is not None and now - self._asked < REBIRTH_AFTER_S):
            return
        command = {
            "name": REBIRTH,
            "datatype": METRIC_TYPES["Boolean"],
            "boolean_value": True,
            "timestamp": int(self._clock.now() * 1000),
        }
        payload = Payload(timestamp=int(self._clock.now() * 1000), metrics=[command])
        if self._link.publish(self._topic, payload.SerializeToString()):
            self._asked = now
