"""Kafka brokers for tests: those of librdkafka itself, which speak the real protocol on real sockets.

librdkafka tests its own clients against them (rdkafka_mock.h: rd_kafka_mock_cluster_new and what follows).
They keep messages in memory and answer errors that a test has ordered. No package index has a Kafka server.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PRODUCE, METADATA = 0, 3
#: librdkafka's and Kafka's error codes.
TRANSPORT, NOT_LEADER, TOPIC_AUTHORIZATION_FAILED, NOT_ENOUGH_REPLICAS = -195, 6, 29, 19


def _library() -> ctypes.CDLL:
    found = importlib.util.find_spec("confluent_kafka")
    if found is None or found.origin is None:
        pytest.skip("confluent-kafka is not installed")
    libraries = sorted(Path(found.origin).parents[1].glob("confluent_kafka.libs/librdkafka*"))
    if not libraries:
        pytest.skip("confluent-kafka brings no librdkafka")
    return ctypes.CDLL(str(libraries[-1]))


class KafkaBrokers:
    """`number` brokers on loopback; topics are made when they are first used."""

    def __init__(self, number: int = 3, partitions: int = 4) -> None:
        library = self._library = _library()
        for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_mock_cluster_new"):
            getattr(library, name).restype = ctypes.c_void_p
        library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
        said = ctypes.create_string_buffer(512)
        configuration = ctypes.c_void_p(library.rd_kafka_conf_new())
        self._client = ctypes.c_void_p(library.rd_kafka_new(0, configuration, said, len(said)))
        assert self._client.value, said.value
        self._cluster = ctypes.c_void_p(library.rd_kafka_mock_cluster_new(self._client, number))
        assert self._cluster.value
        self.address = library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()
        self._partitions = partitions

    def create(self, topic: str, partitions: int | None = None) -> None:
        made = self._library.rd_kafka_mock_topic_create(
            self._cluster, topic.encode(), partitions or self._partitions, 1
        )
        assert made == 0

    def fail(self, request: int, *errors: int) -> None:
        """Answer the next requests of that kind with these errors; TRANSPORT cuts the connection."""
        codes = (ctypes.c_int * len(errors))(*errors)
        self._library.rd_kafka_mock_push_request_errors_array(
            self._cluster, ctypes.c_int16(request), ctypes.c_size_t(len(errors)), codes
        )

    def forget_errors(self, request: int) -> None:
        self._library.rd_kafka_mock_clear_request_errors(self._cluster, ctypes.c_int16(request))

    def down(self, broker: int) -> None:
        assert self._library.rd_kafka_mock_broker_set_down(self._cluster, ctypes.c_int32(broker)) == 0

    def up(self, broker: int) -> None:
        assert self._library.rd_kafka_mock_broker_set_up(self._cluster, ctypes.c_int32(broker)) == 0

    def messages(self, topic: str) -> list[Any]:
        """All that a topic holds, by partition and offset, read by a real consumer."""
        from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

        consumer = Consumer(
            {"bootstrap.servers": self.address, "group.id": "reader", "enable.auto.commit": "false"}
        )
        found = []
        for partition in consumer.list_topics(topic, timeout=30).topics[topic].partitions:
            where = TopicPartition(topic, partition, OFFSET_BEGINNING)
            _, end = consumer.get_watermark_offsets(where, timeout=30)
            consumer.assign([where])
            at = 0
            while at < end:
                message = consumer.poll(1.0)
                if message is not None and message.error() is None:
                    found.append(message)
                    at = message.offset() + 1
        consumer.close()
        return found

    def close(self) -> None:
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._client)


@pytest.fixture
def kafka() -> Iterator[KafkaBrokers]:
    brokers = KafkaBrokers()
    yield brokers
    brokers.close()
