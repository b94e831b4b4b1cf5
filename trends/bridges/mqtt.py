"""MQTT brokers as targets: CloudEvents, each acknowledged, and a Sparkplug edge node."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pyarrow as pa

from edgeward.clock import Clock
from edgeward.errors import InvalidDocument, Unavailable, UsageError
from edgeward.mqtt import Broker, Link, Message, Will
from trends.bridges import cloudevents
from trends.bridges.bridge import Stopped
from trends.bridges.feed import Position

log = logging.getLogger(__name__)

#: CloudEvents that wait for the broker's answer at once: what Mosquitto queues for a subscriber by default,
#: and drops beyond it, is a thousand.
MAX_IN_FLIGHT = 200
MODES = ("structured", "binary")


class _Answers:
    """The broker's answers, which come in its thread, sometimes before the number is known that they are for."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._changed = threading.Condition()
        self._given: dict[int, str] = {}
        self._lost = 0

    def give(self, number: int, problem: str) -> None:
        with self._changed:
            self._given[number] = problem
            self._changed.notify_all()

    def lose(self) -> None:
        """The connection is gone: barriers asked for before get no answer."""
        with self._changed:
            self._lost += 1
            self._changed.notify_all()

    @property
    def lost(self) -> int:
        return self._lost

    def forget(self) -> None:
        with self._changed:
            self._given.clear()

    def wait(
        self,
        numbers: set[int],
        where: str,
        lost: int | None = None,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """For an answer to each. Raises Unavailable for a refusal, or when the connection was lost since `lost`."""
        with self._changed:
            while not numbers <= self._given.keys():
                if self._stop.is_set():
                    raise Stopped
                if lost is not None and self._lost != lost:
                    raise Unavailable(f"{where}: the connection was lost", hint="check the broker")
                self._changed.wait(0.2)
            refused = [self._given.pop(number) for number in numbers]
        done()
        for problem in refused:
            if problem:
                raise Unavailable(f"{where}: refused: {problem}", hint="check the broker's access rules")


class CloudEventsTarget:
    """`PREFIX/SITE/DEVICE/TABLE`, QoS 1: at least once, by id. Waits for the broker without an end."""

    def __init__(
        self,
        broker: Broker,
        name: str,
        stop: threading.Event,
        *,
        mode: str = "structured",
        prefix: str = "edgeward/events",
    ) -> None:
        """Raises UsageError for an unknown mode or a prefix that no topic can have."""
        if mode not in MODES:
            raise UsageError(f"unknown mode {mode!r}", hint=f"one of {', '.join(MODES)}")
        if not prefix or set(prefix) & set("+#") or prefix.startswith(("$", "/")) or not prefix.isprintable():
            raise UsageError(f"{prefix!r} is not the beginning of a topic", hint="e.g. edgeward/events")
        self._binary = mode == "binary"
        self._prefix = prefix.rstrip("/")
        self.where = f"{broker.url}, topics {self._prefix}/#"
        self._answers = _Answers(stop)
        self._link = Link(
            broker,
            f"edgeward-bridge-{name}",
            on_acknowledged=self._answers.give,
            max_reconnect_delay=5.0,
        )
        self._waiting: set[int] = set()
        self._link.start()

    def resume(self, table: str, position: Position) -> Position:
        return position

    def deliver(self, table: str, rows: pa.Table, before: Position, after: Position) -> None:
        # What a call before left unanswered: a late answer must not pass for one to a message of now.
        self._settle()
        for row in cloudevents.plain_rows(rows):
            event = cloudevents.event(table, row)
            topic = f"{self._prefix}/{row['site']}/{row['device']}/{table}"
            if self._binary:
                number = self._link.send(
                    topic,
                    cloudevents.data(event),
                    content_type=cloudevents.JSON,
                    user_properties=cloudevents.mqtt_properties(event),
                )
            else:
                number = self._link.send(
                    topic, cloudevents.structured(event), content_type=cloudevents.STRUCTURED
                )
            self._waiting.add(number)
            if len(self._waiting) >= MAX_IN_FLIGHT:
                self._settle()
        self._settle()

    def _settle(self) -> None:
        waiting = set(self._waiting)
        self._answers.wait(waiting, self.where, done=self._waiting.clear)

    def close(self) -> None:
        self._link.stop()


class SparkplugTarget:
    """An edge node. Its data is of QoS 0, as the specification wants it: a batch counts as handed on when the
    broker has answered a request that was sent after it on the same connection."""

    def __init__(
        self,
        broker: Broker,
        group: str,
        node: str,
        clock: Clock,
        stop: threading.Event,
        next_bdseq: Callable[[], int],
    ) -> None:
        """`next_bdseq` counts connections, over restarts, from 0 to 255 and on from 0.

        Raises UsageError for impossible ids, MissingDependency without protobuf.
        """
        from trends.bridges.sparkplug import EdgeNode, check_id

        self._node = EdgeNode(check_id(group, "--group"), check_id(node, "--node"))
        self._clock, self._next_bdseq = clock, next_bdseq
        self.where = f"{broker.url}, {group}/{node}"
        self._answers = _Answers(stop)
        #: Numbers and their order on the wire belong together, whoever publishes.
        self._order = threading.Lock()
        self._online = False
        self._link = Link(
            broker,
            f"edgeward-bridge-{group}-{node}",
            subscriptions=(self._node.topic("NCMD"),),
            on_message=self._commanded,
            on_connect=self._connected,
            on_disconnect=self._disconnected,
            on_acknowledged=self._answers.give,
            will=self._will,
            max_reconnect_delay=5.0,
        )
        self._link.start()

    def resume(self, table: str, position: Position) -> Position:
        return position

    def deliver(self, table: str, rows: pa.Table, before: Position, after: Position) -> None:
        with self._order:
            lost = self._answers.lost
            if not self._online:
                raise Unavailable(f"{self.where}: not connected", hint="check the broker")
            for message in self._node.data(table, rows, self._now()):
                self._link.publish(message.topic, message.payload, qos=0)
            self._answers.forget()
            number = self._link.barrier()
        if number is None:
            raise Unavailable(f"{self.where}: the connection was lost", hint="check the broker")
        self._answers.wait({number}, self.where, lost)
        if self._node.ignored:
            log.warning("%d values of more metrics than a device may have are left out", self._node.ignored)
            self._node.ignored = 0

    def _now(self) -> int:
        return int(self._clock.now() * 1000)

    def _will(self) -> Will:
        with self._order:
            self._node.bdseq = self._next_bdseq()
            death = self._node.death(self._now())
        return Will(death.topic, death.payload, retain=False)

    def _connected(self) -> None:
        with self._order:
            self._bear()
            self._online = True

    def _bear(self) -> None:
        for message in self._node.births(self._now()):
            self._link.publish(message.topic, message.payload, qos=0)

    def _disconnected(self) -> None:
        with self._order:
            self._online = False
        self._answers.lose()

    def _commanded(self, message: Message) -> None:
        from trends.bridges.sparkplug import wants_rebirth

        try:
            wanted = wants_rebirth(message.payload)
        except InvalidDocument as error:
            log.warning("a command on %s is left: %s", message.topic, error)
            return
        if wanted:
            log.info("a host asked for births")
            with self._order:
                self._bear()

    def close(self) -> None:
        with self._order:
            if self._online:
                death = self._node.death(self._now())
                self._link.publish(death.topic, death.payload, qos=1)
                self._online = False
        self._link.stop()
