"""The agent's one MQTT connection as the streams see it: subscriptions by topic, `+` and `#` included."""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec

from agent.streams.decode.sequence import Position
from agent.streams.sources.mqtt import Receive
from edgeward.mqtt import Message
from edgeward.wire.topics import matches


class SensorAck(msgspec.Struct):
    """Told to a numbering sensor on `{topic}/ack`: everything up to here is durable."""

    epoch: str
    seq: int


class LocalLink:
    """Shares the connection between streams: several may read the same topic."""

    def __init__(
        self,
        subscribe: Callable[[str], None],
        unsubscribe: Callable[[str], None],
        publish: Callable[[str, bytes], bool],
    ) -> None:
        self.publish = publish
        self._subscribe = subscribe
        self._unsubscribe = unsubscribe
        self._routes: dict[str, dict[StreamLink, Receive]] = {}
        self._acks: dict[str, dict[StreamLink, Position | None]] = {}
        self._lock = threading.Lock()

    def add(self, topic: str, who: StreamLink, receive: Receive) -> None:
        with self._lock:
            self._routes = {**self._routes, topic: {**self._routes.get(topic, {}), who: receive}}
        self._subscribe(topic)

    def remove(self, topic: str, who: StreamLink) -> None:
        with self._lock:
            self._acks.get(topic, {}).pop(who, None)
            left = {one: receive for one, receive in self._routes.get(topic, {}).items() if one is not who}
            others = {name: found for name, found in self._routes.items() if name != topic}
            self._routes = {**others, topic: left} if left else others
        if not left:
            self._unsubscribe(topic)

    def expect_acks(self, topic: str, who: StreamLink, position: Position | None, expected: bool) -> None:
        with self._lock:
            if expected:
                self._acks.setdefault(topic, {})[who] = position
            else:
                self._acks.get(topic, {}).pop(who, None)

    def acknowledge(self, topic: str, who: StreamLink, position: Position) -> None:
        """Tell the sensor what every reader of its topic has, once all are in the same epoch."""
        with self._lock:
            readers = self._acks.setdefault(topic, {})
            readers[who] = position
            positions = list(readers.values())
        if all(other is not None and other[0] == position[0] for other in positions):
            seq = min(other[1] for other in positions if other is not None)
            self.publish(f"{topic}/ack", msgspec.json.encode(SensorAck(position[0], seq)))

    def dispatch(self, message: Message) -> None:
        """Hand a message to every stream that subscribed to its topic."""
        for pattern, receivers in self._routes.items():
            if pattern == message.topic or matches(pattern, message.topic):
                for receive in receivers.values():
                    receive(message.topic, message.payload)


class StreamLink:
    """One stream's view (`MqttLink`)."""

    def __init__(self, shared: LocalLink) -> None:
        self._shared = shared

    def subscribe(self, topic: str, receive: Receive) -> None:
        self._shared.add(topic, self, receive)

    def unsubscribe(self, topic: str) -> None:
        self._shared.remove(topic, self)

    def expect_acks(self, topic: str, position: Position | None, *, expected: bool = True) -> None:
        self._shared.expect_acks(topic, self, position, expected)

    def acknowledge(self, topic: str, epoch: str, seq: int) -> None:
        self._shared.acknowledge(topic, self, (epoch, seq))

    def publish(self, topic: str, payload: bytes) -> bool:
        return self._shared.publish(topic, payload)
