"""Into Kafka, against librdkafka's own brokers: every row, in each device's order, with errors on the way."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeward.clock import ManualClock
from edgeward.errors import EdgewardError, Unavailable, UsageError
from edgeward.identifiers import DeviceName
from tests.servers.kafka import (
    NOT_ENOUGH_REPLICAS,
    NOT_LEADER,
    PRODUCE,
    TOPIC_AUTHORIZATION_FAILED,
    TRANSPORT,
    KafkaBrokers,
)
from tests.trends.bridges.filled import Filled
from trends.bridges.bridge import KEYS, Bridge, Stopped
from trends.bridges.cursor import Cursor
from trends.bridges.feed import Position
from trends.bridges.kafka import KafkaTarget, partition_of, read_properties

ROOT = Path(__file__).parents[3]
QUICK = {"retry.backoff.ms": "10", "reconnect.backoff.ms": "10", "reconnect.backoff.max.ms": "50"}


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Filled]:
    made = Filled(tmp_path)
    yield made
    made.close()


def target(kafka: KafkaBrokers, encoding: str = "json", **settings: str) -> KafkaTarget:
    named = {name.replace("_", "."): value for name, value in settings.items()}
    return KafkaTarget({"bootstrap.servers": kafka.address, **QUICK, **named}, threading.Event(), encoding)


def bridge(filled: Filled, made: KafkaTarget, rows: int = 20) -> Bridge:
    cursor = Cursor(filled.folder, "kafka")
    with cursor.alone():
        pass
    feeds = [filled.feed(table) for table in KEYS]
    return Bridge(feeds, made, cursor, ManualClock(), threading.Event(), rows=rows)


def keys(kafka: KafkaBrokers, table: str = "results") -> list[str]:
    return [message.key().decode() for message in kafka.messages(f"edgeward.{table}")]


def expected(numbers: range, device: str = "a") -> list[str]:
    return [f"north/{device}/result/e/{seq}" for seq in numbers]


def test_every_table_has_a_topic_and_every_row_its_key(filled: Filled, kafka: KafkaBrokers) -> None:
    filled.commit(45)
    filled.commit(2, lane="alarm")
    filled.commit(2, lane="trend")
    filled.commit(2, lane="sample")
    filled.lose(45, 49)
    made = target(kafka)
    bridge(filled, made).run(once=True)
    assert keys(kafka) == expected(range(45))
    (first, *_) = kafka.messages("edgeward.results")
    value = json.loads(first.value())
    assert value["outputs"] == {"score": 0.0, "b": -1.0} and value["seq"] == 0
    assert value["event_time"] == "2026-09-21T14:13:20.000000Z"
    assert first.headers() == [("content-type", b"application/json")]
    assert keys(kafka, "alarms") == ["north/a/alarm/e/0", "north/a/alarm/e/1"]
    (gap,) = kafka.messages("edgeward.gaps")
    assert gap.key().startswith(b"north/a/gap-result/e/45-49-")
    assert json.loads(kafka.messages("edgeward.trends")[0].value())["sketch"] == "AP8="
    bridge(filled, made).run(once=True)
    assert len(keys(kafka)) == 45, "a bridge goes on where it was"
    made.close()


def test_a_device_keeps_its_order(filled: Filled, kafka: KafkaBrokers) -> None:
    devices = [DeviceName("north", f"turbine-{number}") for number in range(12)]
    for _ in range(3):
        for name in devices:
            filled.append(5, name=name)
        filled.tables.flush()
    made = target(kafka)
    bridge(filled, made, rows=7).run(once=True)
    by_device: dict[str, list[tuple[int, int]]] = {}
    for message in kafka.messages("edgeward.results"):
        _, device, _, _, number = message.key().decode().split("/")
        by_device.setdefault(device, []).append((message.partition(), int(number)))
    assert len(by_device) == 12
    for rows in by_device.values():
        assert len({partition for partition, _ in rows}) == 1 and rows == sorted(rows)
    assert len({rows[0][0] for rows in by_device.values()}) > 1, "and devices share the partitions"
    made.close()


def test_errors_that_pass_neither_lose_nor_double_nor_reorder(filled: Filled, kafka: KafkaBrokers) -> None:
    kafka.create("edgeward.results", 1)
    filled.commit(200)
    kafka.fail(PRODUCE, NOT_LEADER, TRANSPORT, NOT_ENOUGH_REPLICAS, TRANSPORT, NOT_LEADER)
    made = target(kafka, batch_num_messages="10")
    bridge(filled, made).run(once=True)
    assert keys(kafka) == expected(range(200))
    made.close()


def test_the_cursor_waits_for_every_delivery_report(filled: Filled, kafka: KafkaBrokers) -> None:
    filled.commit(30)
    made = target(kafka)
    running = bridge(filled, made, rows=10)
    kafka.create("edgeward.results", 1)
    kafka.fail(PRODUCE, TOPIC_AUTHORIZATION_FAILED)
    with pytest.raises(Unavailable, match="authorization"):
        running.catch_up()
    assert running._handed_on() == 0
    running.catch_up()
    assert set(keys(kafka)) == set(expected(range(30)))
    made.close()


def test_brokers_that_are_down_are_named_and_come_back(filled: Filled, kafka: KafkaBrokers) -> None:
    filled.commit(5)
    made = target(kafka, delivery_timeout_ms="3000", socket_connection_setup_timeout_ms="1000")
    running = bridge(filled, made)
    made._known_partitions(made._producer, "edgeward.results")  # type: ignore[arg-type]  # it has one
    for broker in (1, 2, 3):
        kafka.down(broker)
    with pytest.raises(Unavailable) as failure:
        running.catch_up()
    assert kafka.address in str(failure.value) and "brokers" in failure.value.hint
    for broker in (1, 2, 3):
        kafka.up(broker)
    running.run(once=True)
    assert set(keys(kafka)) == set(expected(range(5)))
    made.close()


def test_a_bridge_killed_at_any_step_loses_nothing_and_repeats_keys_only(
    filled: Filled, kafka: KafkaBrokers
) -> None:
    filled.commit(60)
    deaths = 0
    for step in range(100):
        command = [sys.executable, "-m", "tests.trends.bridges.bridge_child", str(filled.folder), "kafka"]
        ended = subprocess.run(
            [*command, kafka.address, str(1 + step % 2 * 2)], cwd=ROOT, capture_output=True, text=True
        )
        if ended.returncode == 0:
            break
        assert ended.returncode == -9, ended.stderr
        deaths += 1
    handed = keys(kafka)
    assert deaths >= 3 and set(handed) == set(expected(range(60)))
    assert len(handed) > 60, "killed after the delivery and before the cursor, it sends again"


def test_a_full_queue_waits(filled: Filled, kafka: KafkaBrokers) -> None:
    filled.commit(300)
    made = target(kafka, queue_buffering_max_messages="10", linger_ms="0")
    bridge(filled, made, rows=300).run(once=True)
    assert set(keys(kafka)) == set(expected(range(300)))
    made.close()


def test_a_stop_ends_a_wait_for_brokers(filled: Filled, kafka: KafkaBrokers) -> None:
    filled.commit(5)
    stop = threading.Event()
    made = KafkaTarget({"bootstrap.servers": kafka.address, **QUICK}, stop)
    (batch,) = filled.feed().batches(Position(), 100)
    made._known_partitions(made._producer, "edgeward.results")  # type: ignore[arg-type]  # it has one
    kafka.fail(PRODUCE, *[NOT_ENOUGH_REPLICAS] * 10_000)
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(Stopped):
        made.deliver("results", batch.rows, Position(), batch.after)
    kafka.forget_errors(PRODUCE)
    made.close()


def test_a_topic_that_may_not_be_seen_is_named(filled: Filled, kafka: KafkaBrokers) -> None:
    filled.commit(1)
    made = target(kafka)
    kafka._library.rd_kafka_mock_topic_set_error(
        kafka._cluster, b"edgeward.results", TOPIC_AUTHORIZATION_FAILED
    )
    with pytest.raises(Unavailable, match=r"topic edgeward\.results"):
        bridge(filled, made).catch_up()
    made.close()


def test_a_row_that_is_too_large_says_what_to_raise(filled: Filled, kafka: KafkaBrokers) -> None:
    filled.commit(1)
    kafka.create("edgeward.results")
    made = target(kafka, message_max_bytes="1000")
    (batch,) = filled.feed().batches(Position(), 10)
    column = batch.rows.schema.get_field_index("key")
    large = batch.rows.set_column(column, "key", [["x" * 2000]])
    with pytest.raises(EdgewardError, match="refused") as failure:
        made.deliver("results", large, Position(), batch.after)
    assert "message.max.bytes" in failure.value.hint and not isinstance(failure.value, Unavailable)
    made.close()


@pytest.mark.parametrize("encoding", ["cloudevents", "cloudevents-binary"])
def test_cloudevents_in_both_modes(filled: Filled, kafka: KafkaBrokers, encoding: str) -> None:
    filled.commit(1)
    made = target(kafka, encoding)
    bridge(filled, made).run(once=True)
    (message,) = kafka.messages("edgeward.results")
    headers: dict[str, Any] = {name: value.decode() for name, value in message.headers()}
    body = json.loads(message.value())
    if encoding == "cloudevents":
        assert headers == {"content-type": "application/cloudevents+json; charset=UTF-8"}
        attributes, data = body, body["data"]
    else:
        assert headers["content-type"] == "application/json"
        attributes, data = {name.removeprefix("ce_"): value for name, value in headers.items()}, body
    assert attributes["id"] == "north/a/result/e/0" and attributes["type"] == "edgeward.result.v1"
    assert data["outputs"] == {"score": 0.0, "b": -1.0}
    made.close()


def test_properties_come_from_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "kafka.properties"
    file.write_text("# site\nbootstrap.servers = k:9093\n\nsasl.password=a=b#c\n")
    file.chmod(0o640)
    with pytest.raises(UsageError, match="others") as failure:
        read_properties(file)
    assert "chmod 600" in failure.value.hint
    file.chmod(0o600)
    assert read_properties(file) == {"bootstrap.servers": "k:9093", "sasl.password": "a=b#c"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("acks=0", "acks"),
        ("enable.idempotence=false", "enable.idempotence"),
        ("plugin.library.paths=/tmp/x.so", "load code"),
        ("ssl.engine.location=/tmp/x.so", "load code"),
        ("hush-word", "NAME=VALUE"),
        ("client.id=x", "bootstrap.servers"),
    ],
)
def test_what_would_break_the_promise_is_refused(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "kafka.properties"
    file.write_text(f"{'' if 'client.id' in line else 'bootstrap.servers=k:1'}\n{line}\n")
    file.chmod(0o600)
    with pytest.raises(UsageError, match=said) as failure:
        read_properties(file)
    assert "hush" not in str(failure.value)


def test_a_setting_that_librdkafka_does_not_know_is_told() -> None:
    with pytest.raises(UsageError, match=r"no\.such"):
        KafkaTarget({"bootstrap.servers": "k:1", "no.such": "1"}, threading.Event())
    with pytest.raises(UsageError, match="encoding"):
        KafkaTarget({"bootstrap.servers": "k:1"}, threading.Event(), "avro")


def test_a_device_always_has_one_partition() -> None:
    assert {partition_of("north/a", 6) for _ in range(3)} == {partition_of("north/a", 6)}
    assert {partition_of(f"north/{number}", 6) for number in range(200)} == set(range(6))
