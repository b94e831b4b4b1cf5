"""The agent's one MQTT connection as the streams see it: subscriptions by topic, `+` and `#` included."""

from __future__ import annotations

import threading
from collections.abc import Callable

from agent.streams.sources.mqtt import Receive
from edgeward.mqtt import Message


def matches(pattern: str, topic: str) -> bool:
    """MQTT v5, section 4.7: `+` stands for one level, `#` for the rest; neither for `$` topics at the start."""
    levels, names = pattern.split("/"), topic.split("/")
    if topic.startswith("$") and levels[0] in ("+", "#"):
        return False
    for index, level in enumerate(levels):
        if level == "#":
            return True
        if index >= len(names) or level not in ("+", names[index]):
            return False
    return len(levels) == len(names)


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
        self._lock = threading.Lock()

    def add(self, topic: str, who: StreamLink, receive: Receive) -> None:
        with self._lock:
            self._routes = {**self._routes, topic: {**self._routes.get(topic, {}), who: receive}}
        self._subscribe(topic)

    def remove(self, topic: str, who: StreamLink) -> None:
        with self._lock:
            left = {one: receive for one, receive in self._routes.get(topic, {}).items() if one is not who}
            others = {name: found for name, found in self._routes.items() if name != topic}
            self._routes = {**others, topic: left} if left else others
        if not left:
            self._unsubscribe(topic)

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

    def publish(self, topic: str, payload: bytes) -> bool:
        return self._shared.publish(topic, payload)
