"""A real sensor process against a real broker and an agent's side that forgets, lags and is away."""

import json
import subprocess
import sys
import threading
import time

import pytest

from edgeward.broker import EmbeddedBroker
from edgeward.errors import InvalidDocument
from edgeward.mqtt import Broker, Link
from simulators.sensors import Replay, Sensor, parse_rows, read_samples

TOPIC = "plant/north/turbine-1"


@pytest.fixture(scope="module")
def shared_broker(tmp_path_factory):
    with EmbeddedBroker(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


class Receiver:
    """The agent's side of the contract: in order only, cumulative acks, re-acks for old repeats."""

    def __init__(self, url, *, deaf_to=()):
        self.rows, self.expected, self.epoch = [], 0, None
        self.deaf_to = set(deaf_to)
        self.messages = 0
        self.lock = threading.Lock()
        self.link = Link(
            Broker(url), "receiver", subscriptions=(TOPIC,), on_message=self.take, max_reconnect_delay=1.0
        )
        self.link.start()
        deadline = time.monotonic() + 10
        while not self.link.connected:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def take(self, message):
        with self.lock:
            self.messages += 1
            if self.messages in self.deaf_to:
                return
            for row in json.loads(message.payload):
                self.epoch = row["epoch"]
                if row["seq"] == self.expected:
                    self.rows.append(row)
                    self.expected += 1
            body = {"epoch": self.epoch, "seq": self.expected - 1}
        self.link.publish(f"{TOPIC}/ack", json.dumps(body).encode())


def samples(count):
    return [{"f1": float(i)} for i in range(count)]


def test_all_rows_arrive_in_order_although_messages_are_lost(shared_broker, tmp_path):
    receiver = Receiver(shared_broker.url, deaf_to=(2, 3, 9))
    replay = Replay(TOPIC, "turbine-1", "vibration", rate=2000, speed=2000, batch=7, window=50, start=1000.0)
    produced = tmp_path / "produced.jsonl"
    try:
        progress = Sensor(Broker(shared_broker.url), replay, samples(300), produced=produced).run()
    finally:
        receiver.link.stop()
    assert progress.acked == 300
    assert progress.repeats >= 1
    assert [row["values"]["f1"] for row in receiver.rows] == [float(i) for i in range(300)]
    assert [row["t"] for row in receiver.rows] == [1000.0 + i for i in range(300)]
    lines = [json.loads(line) for line in produced.read_text().splitlines()]
    assert [seq for line in lines for seq in range(line["first_seq"], line["last_seq"] + 1)] == list(
        range(300)
    )
    assert {(line["device"], line["stream"], line["epoch"]) for line in lines} == {
        ("turbine-1", "vibration", receiver.epoch)
    }


def test_a_killed_broker_loses_nothing(tmp_path):
    broker = EmbeddedBroker(tmp_path / "broker")
    broker.start()
    receiver = Receiver(broker.url)
    replay = Replay(TOPIC, "turbine-1", "vibration", rate=300, batch=5, window=64)
    sensor = Sensor(Broker(broker.url), replay, samples(600))
    thread = threading.Thread(target=sensor.run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while sensor.progress().acked < 50:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        broker.kill()
        broker.start()
        thread.join(20)
        assert not thread.is_alive()
    finally:
        sensor.stop()
        receiver.link.stop()
        broker.stop()
    assert [row["seq"] for row in receiver.rows] == list(range(600))


def test_the_label_is_never_sent(shared_broker, tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("f1,f2,label\n" + "".join(f"{i},,{i % 2}\n" for i in range(10)))
    receiver = Receiver(shared_broker.url)
    command = [sys.executable, "-m", "edgeward.cli.main", "simulate", "sensors", "--data", str(data)]
    command += ["--broker", shared_broker.url, "--topic", TOPIC, "--device", "turbine-1"]
    command += ["--stream", "vibration", "--rate", "1000", "--rows", "0.2:1.0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    finally:
        receiver.link.stop()
    assert done.returncode == 0, done.stderr
    assert "all 8 rows are durable" in done.stdout
    assert [row["values"] for row in receiver.rows] == [{"f1": float(i)} for i in range(2, 10)]


def test_a_plain_sensor_numbers_nothing_and_waits_for_nobody(shared_broker, tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("f1\n" + "".join(f"{i}\n" for i in range(300)))
    heard, done = [], threading.Event()

    def listen(message):
        heard.extend(json.loads(message.payload))
        if len(heard) == 300:
            done.set()

    ready = threading.Event()
    link = Link(
        Broker(shared_broker.url), "ear", subscriptions=("plain/s",), on_message=listen, on_connect=ready.set
    )
    link.start()
    command = [sys.executable, "-m", "edgeward.cli.main", "simulate", "sensors", "--data", str(data)]
    command += ["--broker", shared_broker.url, "--topic", "plain/s", "--rate", "10000"]
    try:
        assert ready.wait(10)
        ended = subprocess.run([*command, "--plain"], capture_output=True, text=True, timeout=30)
        assert done.wait(10), len(heard)
    finally:
        link.stop()
    assert ended.returncode == 0 and "all 300 rows are sent" in ended.stdout, ended.stderr
    assert [set(row) for row in heard] == [{"t", "values"}] * 300
    assert [row["values"]["f1"] for row in heard] == list(range(300))
    refused = subprocess.run(
        [*command, "--produced", str(tmp_path / "p")], capture_output=True, text=True, timeout=30
    )
    assert refused.returncode == 2 and "--produced needs --device" in refused.stderr


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("f1,f2\n1,2\n3,x\n", "data.csv:3: f2: 'x' is not a number"),
        ("f1,f2\n1,2\n3\n", "data.csv:3: expected 2 columns, found 1"),
        ("f1,f1\n1,2\n", "distinct column names"),
        ("f1,f2\n", "selects no rows of 0"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, content, where):
    path = tmp_path / "data.csv"
    path.write_text(content)
    with pytest.raises(InvalidDocument) as caught:
        read_samples(path)
    assert where in str(caught.value)


def test_row_selections():
    assert parse_rows("0:10", 10) == (0, 10)
    assert parse_rows("0.7:1.0", 49_097) == (34_367, 49_097)
    assert parse_rows(":", 5) == (0, 5)
    for bad in ("5:5", "0:11", "x:1", "3", "0.5:1.5"):
        with pytest.raises(InvalidDocument):
            parse_rows(bad, 10)
