"""Kafka: at least once, with keys by which repeats are known.

The producer is idempotent (KIP-98), so its own retries neither double nor reorder. The cursor moves when all
of a batch has its delivery report; a bridge that dies before that sends the batch again, under the same keys.
"""

from __future__ import annotations

import binascii
import logging
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import pyarrow as pa

from edgeward.errors import EdgewardError, MissingDependency, Unavailable, UsageError
from trends.bridges import cloudevents
from trends.bridges.bridge import Stopped
from trends.bridges.feed import Position

if TYPE_CHECKING:
    from confluent_kafka import KafkaError, Message, Producer

log = logging.getLogger(__name__)

ENCODINGS = ("json", "cloudevents", "cloudevents-binary")

#: What the promise of this bridge rests on; a properties file cannot change it.
FIXED: dict[str, str | int] = {"enable.idempotence": "true", "acks": "all"}
#: librdkafka would load code from where these name.
_CODE = ("plugin.library.paths", "ssl.engine.location", "ssl.providers")
Headers = list[tuple[str, str | bytes | None]]
_encode = msgspec.json.Encoder().encode


def read_properties(path: Path) -> dict[str, str]:
    """librdkafka's settings, `name=value` a line, `#` for comments.

    Raises UsageError for a file that others can read, and for what the bridge sets itself.
    """
    try:
        mode = path.stat().st_mode
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(
            f"{path} can hold passwords, and others than its owner may use it", hint=f"chmod 600 {path}"
        )
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name:
            # The line is not shown: it may hold a secret.
            raise UsageError(f"{path}, line {number}: expected NAME=VALUE")
        if name in _CODE:
            raise UsageError(f"{path}, line {number}: {name} would load code and is refused")
        if name in FIXED:
            raise UsageError(
                f"{path}, line {number}: {name} is set by the bridge, which needs {FIXED[name]!r}",
                hint="remove the line",
            )
        found[name] = value
    if "bootstrap.servers" not in found:
        raise UsageError(f"{path}: bootstrap.servers is missing", hint="e.g. bootstrap.servers=kafka-1:9093")
    return found


def partition_of(device: str, partitions: int) -> int:
    """One device's rows keep their order: all go to one partition (CRC-32, as librdkafka's `consistent`)."""
    return binascii.crc32(device.encode()) % partitions


class KafkaTarget:
    """Topics `PREFIX` + table. The producer is made again after an error that it does not recover from."""

    def __init__(
        self,
        settings: Mapping[str, str],
        stop: threading.Event,
        encoding: str = "json",
        prefix: str = "edgeward.",
    ) -> None:
        """`settings` as of `read_properties`. Raises UsageError for settings that librdkafka refuses."""
        if encoding not in ENCODINGS:
            raise UsageError(f"unknown encoding {encoding!r}", hint=f"one of {', '.join(ENCODINGS)}")
        try:
            import confluent_kafka
        except ImportError:
            raise MissingDependency(
                "confluent-kafka is not installed", hint="pip install 'edgeward[trends-kafka]'"
            ) from None
        self._kafka = confluent_kafka
        self._settings: dict[str, Any] = {
            "client.id": "edgeward-bridge",
            "compression.type": "zstd",
            # A delivery that takes longer is an error here, to be told and tried again.
            "delivery.timeout.ms": 120_000,
            **settings,
            **FIXED,
        }
        self._stop, self._encoding, self._prefix = stop, encoding, prefix
        self.where = f"{settings['bootstrap.servers']}, topics {prefix}*"
        self._partitions: dict[str, int] = {}
        self._producer: Producer | None = self._make()

    def _make(self) -> Producer:
        try:
            self._latest = ""
            return self._kafka.Producer({**self._settings, "error_cb": self._told}, logger=log)
        except self._kafka.KafkaException as error:
            raise UsageError(
                f"these Kafka settings are refused: {error.args[0].str()}",
                hint="the names are librdkafka's: https://github.com/confluentinc/librdkafka/blob/master/CONFIGURATION.md",
            ) from None

    def _told(self, error: KafkaError) -> None:
        """What librdkafka says of brokers, for the message when a delivery fails."""
        self._latest = error.str()

    def resume(self, table: str, position: Position) -> Position:
        return position

    def deliver(self, table: str, rows: pa.Table, before: Position, after: Position) -> None:
        if self._producer is None:
            self._producer = self._make()
        topic = f"{self._prefix}{table}"
        partitions = self._known_partitions(self._producer, topic)
        outcome = _Outcome()
        for row in cloudevents.plain_rows(rows):
            self._produce(self._producer, topic, table, row, partitions, outcome)
        while outcome.reported < rows.num_rows:
            self._check_stop()
            self._producer.poll(0.2)
        if outcome.failed is not None:
            self._partitions.clear()  # the topic may have been made anew
            self._raise(outcome.failed)

    def _produce(
        self,
        producer: Producer,
        topic: str,
        table: str,
        row: dict[str, Any],
        partitions: int,
        outcome: _Outcome,
    ) -> None:
        key = cloudevents.row_key(table, row).encode()
        value, headers = self._encoded(table, row)
        partition = partition_of(cloudevents.device_of(row), partitions)
        while True:
            try:
                producer.produce(topic, value, key, partition, on_delivery=outcome.report, headers=headers)
            except BufferError:
                # librdkafka's queue is full: wait for reports to make room.
                self._check_stop()
                producer.poll(0.2)
            except self._kafka.KafkaException as error:
                self._raise(error.args[0])
            else:
                producer.poll(0)
                return

    def _encoded(self, table: str, row: dict[str, Any]) -> tuple[bytes, Headers]:
        if self._encoding == "json":
            return _encode(row), [("content-type", cloudevents.JSON.encode())]
        event = cloudevents.event(table, row)
        if self._encoding == "cloudevents":
            return cloudevents.structured(event), [("content-type", cloudevents.STRUCTURED.encode())]
        return cloudevents.data(event), [*cloudevents.kafka_headers(event)]

    def _known_partitions(self, producer: Producer, topic: str) -> int:
        if topic not in self._partitions:
            try:
                found = producer.list_topics(topic, timeout=10).topics[topic]
            except self._kafka.KafkaException as error:
                self._raise(error.args[0])
            if found.error is not None or not found.partitions:
                raise Unavailable(
                    f"{self.where}: topic {topic}: {found.error.str() if found.error else 'no partitions'}",
                    hint="create the topic, or let the brokers create topics",
                )
            self._partitions[topic] = len(found.partitions)
        return self._partitions[topic]

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _raise(self, error: KafkaError) -> NoReturn:
        # What is still on its way of this batch is dropped: it is sent again as a whole.
        self.close()
        code = self._kafka.KafkaError
        if error.code() in (code.MSG_SIZE_TOO_LARGE, code._INVALID_ARG):
            raise EdgewardError(
                f"{self.where}: a row is refused: {error.str()}",
                hint="raise message.max.bytes on the topic and in the properties file",
            )
        said = f"{error.str()} ({self._latest})" if self._latest else error.str()
        raise Unavailable(
            f"{self.where}: {said}", hint="check the brokers, the topic's rights and the properties file"
        )

    def close(self) -> None:
        if self._producer is not None:
            self._producer.purge(in_queue=True, in_flight=True, blocking=False)
            self._producer.flush(5)
            self._producer = None


class _Outcome:
    """The delivery reports of one batch."""

    def __init__(self) -> None:
        self.reported = 0
        self.failed: KafkaError | None = None

    def report(self, error: KafkaError | None, message: Message) -> None:
        self.reported += 1
        if error is not None and self.failed is None:
            self.failed = error
