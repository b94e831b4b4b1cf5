"""`edgeward trends bridge` as it is used: real processes, stopped by a signal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from edgeward.broker import EmbeddedBroker
from edgeward.wire.enrollment import EnrollResponse, TrustBundle
from tests.contracts.test_brokers import wait_for
from tests.servers.kafka import KafkaBrokers
from tests.trends.bridges.filled import Filled

COMMAND = [sys.executable, "-m", "edgeward.cli.main", "trends", "bridge"]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Filled]:
    folder = tmp_path / "store"
    folder.mkdir()
    enrolled = EnrollResponse("plant", "store", ["north"], "", TrustBundle("", []), "", 0.0)
    (folder / "enrollment.json").write_bytes(msgspec.json.encode(enrolled))
    made = Filled(folder)
    yield made
    made.close()


def call(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def status(filled: Filled) -> dict[str, Any]:
    answer = call("status", "--dir", filled.folder, "--json")
    assert answer.returncode == 0, answer.stderr
    return {f"{line['bridge']} {line['table']}": line for line in json.loads(answer.stdout)}


def properties(folder: Path, kafka: KafkaBrokers) -> Path:
    file = folder / "kafka.properties"
    file.write_text(f"bootstrap.servers={kafka.address}\n")
    file.chmod(0o600)
    return file


def test_kafka_until_a_signal(filled: Filled, kafka: KafkaBrokers, tmp_path: Path) -> None:
    filled.commit(30)
    file = properties(tmp_path, kafka)
    arguments = ["kafka", "--dir", str(filled.folder), "--properties", str(file), "--table", "results"]
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: status(filled).get("kafka results", {}).get("rows") == 30, "the first rows")
    assert status(filled)["kafka results"]["running"] is True
    second = call(*arguments)
    assert second.returncode == 1 and "another process runs the bridge kafka" in second.stderr
    filled.commit(5)
    wait_for(lambda: status(filled)["kafka results"]["rows"] == 35, "the next rows")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 0 and "ends, 35 rows were handed on" in said
    line = status(filled)["kafka results"]
    assert (line["running"], line["behind"], line["skipped_rows"], line["problem"]) == (False, 0, 0, "")
    assert len(kafka.messages("edgeward.results")) == 35
    view = call("status", "--dir", filled.folder).stdout
    assert "stopped" in view and "35" in view


def test_from_now_on(filled: Filled, kafka: KafkaBrokers, tmp_path: Path) -> None:
    filled.commit(30)
    arguments = [
        "kafka",
        "--dir",
        filled.folder,
        "--properties",
        properties(tmp_path, kafka),
        "--once",
        "--from-now",
    ]
    assert call(*arguments).returncode == 0
    filled.commit(2)
    answer = call(*arguments)
    assert "2 rows were handed on" in answer.stdout
    assert [message.key() for message in kafka.messages("edgeward.results")] == [
        b"north/a/result/e/30",
        b"north/a/result/e/31",
    ]


@pytest.mark.postgres
def test_postgres_says_what_keeps_it(filled: Filled, postgres_url: str) -> None:
    filled.commit(30)
    url = postgres_url.replace("postgresql+psycopg", "postgresql")
    missing = call("postgres", "--dir", filled.folder)
    assert missing.returncode == 2 and "EDGEWARD_BRIDGE_POSTGRES" in missing.stderr
    answer = call("postgres", "--dir", filled.folder, "--once", EDGEWARD_BRIDGE_POSTGRES=url)
    assert answer.returncode == 0, answer.stderr
    assert "30 rows were handed on" in answer.stdout
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM edgeward.results").fetchone() == (30,)

    away = "postgresql://edgeward:hush@127.0.0.1:1/x"
    process = subprocess.Popen(
        [*COMMAND, "postgres", "--dir", str(filled.folder), "--name", "away"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "EDGEWARD_BRIDGE_POSTGRES": away},
    )  # fmt: skip
    wait_for(lambda: status(filled).get("away results", {}).get("problem", "") != "", "a problem")
    assert "127.0.0.1:1" in status(filled)["away results"]["problem"]
    process.terminate()
    said, complained = process.communicate()
    assert process.returncode == 0 and "hush" not in said + complained
    assert "next try in" in complained


def test_events_and_sparkplug_over_mqtt(filled: Filled, tmp_path: Path) -> None:
    filled.commit(30)
    broker = EmbeddedBroker(tmp_path / "broker")
    broker.start()
    for kind, extra in (("cloudevents-mqtt", []), ("sparkplug", ["--group", "plant"])):
        answer = call(kind, "--dir", filled.folder, "--broker", broker.url, *extra, "--once")
        assert answer.returncode == 0, answer.stderr
        assert "30 rows were handed on" in answer.stdout
    assert status(filled)["sparkplug results"]["target"].endswith("plant/plant")
    broker.stop()


def test_mistakes_are_said_before_anything_runs(filled: Filled, tmp_path: Path) -> None:
    broker = ["--broker", "mqtt://127.0.0.1:1"]
    for arguments, said in (
        (["cloudevents-mqtt", *broker, "--table", "result"], "there is no table result"),
        (["cloudevents-mqtt", "--broker", "http://x"], "not a broker address"),
        (["cloudevents-mqtt", "--broker", "mqtt://me:hush@x"], "seen by all"),
        (["cloudevents-mqtt", *broker, "--cert", "x.pem"], "needs its key"),
        (["sparkplug", *broker, "--group", "a/b"], "Sparkplug id"),
        (["sparkplug", *broker, "--group", "a", "--table", "gaps"], "gaps"),
        (["cloudevents-mqtt", *broker, "--name", "../x"], "valid name"),
    ):
        answer = call(*arguments, "--dir", filled.folder)
        shown = re.sub(r"\s+", " ", answer.stderr)
        assert answer.returncode == 2 and said in shown, (arguments, shown)
        assert "hush" not in shown
    nothing = call("status", "--dir", tmp_path / "nowhere")
    assert nothing.returncode == 1 and "no trend store" in nothing.stderr


def test_a_name_is_of_one_kind_of_bridge(filled: Filled, tmp_path: Path) -> None:
    (filled.folder / "bridges").mkdir()
    (filled.folder / "bridges" / "x.json").write_text('{"kind":"kafka"}')
    answer = call(
        "sparkplug", "--dir", filled.folder, "--broker", "mqtt://127.0.0.1:1", "--group", "g", "--name", "x"
    )
    assert answer.returncode == 2 and "is of kind kafka" in answer.stderr
    (filled.folder / "bridges" / "x.json").write_text('{"kind":')
    answer = call("status", "--dir", filled.folder)
    assert answer.returncode == 1 and "damaged" in answer.stderr
