"""The way of rows from an outbox to the tables, for benchmarks.pipeline: with its limits and its peer.

The agent's end runs in the benchmark's process, the store's in one of its own (`python -m benchmarks.way`), and a
real Mosquitto between them: all on the machine that is measured.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pyarrow as pa
from deltalake import write_deltalake
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from agent.outbox.outbox import Outbox
from agent.uplink import Uplink
from benchmarks.report import Row, median, spread
from edgeward.broker import accepts, free_port
from edgeward.clock import SystemClock
from edgeward.identifiers import DeviceName
from edgeward.mqtt import Broker, Link
from edgeward.trust import certificates, keys
from edgeward.trust.certificates import DeviceIdentity, Identity, StoreIdentity, TrustAnchor
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import topics
from edgeward.wire.envelope import seal
from edgeward.wire.reports import Status
from edgeward.wire.rows import ResultRow, encode_rows
from edgeward.wire.rows import Row as WireRow
from edgeward.wire.topics import Lane
from trends.columns import to_arrow
from trends.ingest import Ingest, Ingester
from trends.journal import Journal
from trends.schemas import PARTITIONS
from trends.tables import NO_HOOKS, Tables

BATCH = 100
EVENT_US = 1_700_000_000_000_000
NAME = DeviceName("bench", "bench-1")
SITES = frozenset({"bench"})
_TOPIC = "bench/rows"
T = TypeVar("T")
DEADLINE = 120.0
#: Rows of one commit to a table, and of one batch in the journal.
COMMIT, ENTRY = 100_000, 1000


def result_rows(first: int, count: int = BATCH) -> list[tuple[Lane, WireRow]]:
    return [
        (
            "result",
            ResultRow(
                EVENT_US + seq, "press-vibration", 3, "", "a1b2c3d4", seq, "d" * 64, "onnx-fp32", "CPU",
                {"score": 0.25}, False,
            ),
        )
        for seq in range(first, first + count)
    ]  # fmt: skip


class Ring(msgspec.Struct):
    """What the store's process needs: the CA, and its own key and certificate."""

    ca: str
    key: bytes
    certificate: bytes


def _members() -> tuple[SigningIdentity, Ring]:
    now = SystemClock().now()
    ca_key = keys.generate_key()
    ca = certificates.make_ca(ca_key, now)

    def member(identity: Identity) -> tuple[keys.PrivateKey, bytes]:
        key = keys.generate_key()
        issued = certificates.issue(ca, ca_key, key.public_key(), identity, now, lifetime=86400)
        return key, certificates.to_der(issued)

    store_key, store = member(StoreIdentity("bench", SITES))
    ring = Ring(certificates.to_pem(ca), keys.private_pem(store_key), store)
    return SigningIdentity(*member(DeviceIdentity(NAME))), ring


@contextmanager
def mosquitto(folder: Path, extra: str = "") -> Iterator[str | None]:
    """The address of a Mosquitto with its defaults but for `extra`; None where it is not installed."""
    program = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        yield None
        return
    port = free_port()
    config = folder / f"mosquitto-{port}.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n{extra}\n")
    process = subprocess.Popen([program, "-c", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not accepts("127.0.0.1", port):
            if process.poll() is not None:
                raise RuntimeError("mosquitto did not start")
            time.sleep(0.02)
        yield f"mqtt://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _child(kind: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The other end: says a line when it listens, and a JSON line once its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.way", kind, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the {kind} end did not start")
        yield process
    finally:
        process.kill()
        process.wait()


def _ended(process: subprocess.Popen[str]) -> dict[str, float]:
    output, _ = process.communicate("")
    said: dict[str, float] = json.loads(output)
    return said


# ours


def ours(url: str, rows: int, members: tuple[SigningIdentity, Ring], folder: Path) -> tuple[float, float]:
    """Rows per second from a durable outbox until the last is acknowledged, and the ingester's peak memory in MB.

    The memory is that of the whole life: the journal's rows move to the tables at its end.
    """
    device, ring = members
    (folder / "ring").write_bytes(msgspec.msgpack.encode(ring))
    outbox = Outbox(folder / "outbox.db", SystemClock())
    for first in range(0, rows, 5000):
        outbox.commit_rows(result_rows(first, 5000))
    with _child("store", str(folder), url) as store:
        seconds = _send_all(url, outbox, device, TrustAnchor(ring.ca))
        said = _ended(store)
    outbox.close()
    if said["rows"] != rows:
        raise RuntimeError(f"{said['rows']} of {rows} rows are in the table")
    return rows / seconds, said["memory"]


def _send_all(url: str, outbox: Outbox, device: SigningIdentity, anchor: TrustAnchor) -> float:
    clock = SystemClock()
    done, born = threading.Event(), threading.Event()

    def on_ack(topic: str, payload: bytes) -> None:
        uplink.on_ack(topic, payload)
        state = outbox.lane("result")
        if state.acked == state.next_seq - 1:
            done.set()

    def connected() -> None:
        status = topics.status(NAME)
        birth = Status(1, 0, clock.now(), "online")
        link.publish(status, seal(birth, status, device, with_certificate=True), retain=True)
        born.set()

    link = Link(
        Broker(url), "bench-agent", subscriptions=(topics.ack(NAME, "result"),), on_connect=connected,
        on_message=lambda message: on_ack(message.topic, message.payload),
    )  # fmt: skip
    uplink = Uplink(
        outbox, NAME, anchor, lambda: device, clock, link.publish, lambda: born.is_set() and link.connected
    )
    link.start()
    born.wait()
    began = time.perf_counter()
    uplink.start()
    uplink.wake()
    arrived = done.wait(DEADLINE)
    seconds = time.perf_counter() - began
    uplink.stop()
    link.stop()
    if not arrived:
        raise RuntimeError(f"not all rows were acknowledged within {DEADLINE:.0f} s: {uplink.counts}")
    return seconds


def _peak_memory() -> float:
    """MB of this process, at its highest."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1000


def _store(folder: Path, url: str) -> dict[str, float]:
    ring = msgspec.msgpack.decode((folder / "ring").read_bytes(), type=Ring)
    journal = Journal(folder / "journal.db")
    signer = SigningIdentity(keys.load_private(ring.key), ring.certificate)
    ingest = Ingest(journal, TrustAnchor(ring.ca), SITES, SystemClock())
    ingester = Ingester(ingest, journal, Broker(url), signer, "bench")
    ingester.start()
    _say_ready(lambda: ingester.connected)
    sys.stdin.read()
    ingester.stop()
    tables = Tables(folder / "tables", journal)
    moved = tables.flush()
    journal.close()
    return {"memory": _peak_memory(), "rows": moved}


def _say_ready(connected: Callable[[], bool]) -> None:
    while not connected():
        time.sleep(0.01)
    time.sleep(0.1)  # the subscription follows the connection
    print("ready", flush=True)


# the pipe alone, and the peer


def _paho(url: str, name: str) -> Client:
    client = Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTProtocolVersion.MQTTv5)
    client.max_inflight_messages_set(200)
    client.connect(*_address(url))
    return client


def _address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("mqtt://").partition(":")
    return host, int(port)


def sent(url: str, rows: int, per_message: int, kind: str, folder: Path) -> float:
    """Rows per second from paho to paho: to one that drops them (`drain`), or that inserts each (`insert`)."""
    encode = msgspec.msgpack.encode
    payload = encode([row for _, row in result_rows(0, per_message)])
    with _child(kind, str(folder), url, str(rows // per_message)) as receiver:
        client = _paho(url, "bench-sender")
        client.loop_start()
        began = time.perf_counter()
        window = threading.Semaphore(500)
        client.on_publish = lambda *_: window.release()
        for _ in range(rows // per_message):
            window.acquire()
            client.publish(_TOPIC, payload, qos=1)
        assert receiver.stdout is not None
        if receiver.stdout.readline() != "done\n":
            raise RuntimeError(f"not all messages have reached the {kind} end")
        seconds = time.perf_counter() - began
        client.disconnect()
        client.loop_stop()
    return rows / seconds


def _receive(url: str, messages: int, take: Callable[[bytes], None]) -> None:
    left = messages
    subscribed = threading.Event()

    def on_message(client: Client, userdata: Any, message: MQTTMessage) -> None:
        nonlocal left
        take(bytes(message.payload))
        left -= 1
        if left == 0:
            print("done", flush=True)

    client = _paho(url, "bench-receiver")
    client.on_message = on_message
    client.on_subscribe = lambda *_: subscribed.set()
    client.subscribe(_TOPIC, qos=1)
    client.loop_start()
    _say_ready(subscribed.is_set)
    before = -1
    while left not in (0, before):  # ends when nothing comes any more
        before = left
        time.sleep(10)


def _insert(folder: Path) -> Callable[[bytes], None]:
    db = sqlite3.connect(folder / "peer.db", isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE row (seq INTEGER PRIMARY KEY, data BLOB)")

    def take(payload: bytes) -> None:
        db.execute("INSERT INTO row (data) VALUES (?)", (payload,))

    return take


def way(*, quick: bool) -> tuple[list[Row], list[str]]:
    """Agent, Mosquitto, journal and ack together; and the ingester's memory."""
    rows, times = (100_000, 2) if quick else (200_000, 5)
    found: list[tuple[float, float, float, float]] = []
    with (
        tempfile.TemporaryDirectory(prefix="edgeward-bench-", dir=Path.cwd()) as base,
        mosquitto(Path(base)) as url,
        # A sender that nobody holds back would lose what does not fit into the default queue.
        mosquitto(Path(base), "max_queued_messages 0") as roomy,
    ):
        if url is None or roomy is None:
            return [], ["agent -> journal -> ack: not measured, mosquitto is not installed"]
        members = _members()
        for _ in range(times):  # in turn, so that a machine that slows down slows all
            rate, memory = _in_folder(partial(ours, url, rows, members))
            pipe = _in_folder(partial(sent, roomy, rows, BATCH, "drain"))
            peer = _in_folder(partial(sent, roomy, rows // 200, 1, "insert"))
            found.append((rate, memory, pipe, peer))
    rates, memories, pipes, peers = (list(values) for values in zip(*found, strict=True))
    return [
        Row(
            "agent -> Mosquitto -> journal -> ack", "rows/s", median(rates), median(pipes), median(peers),
            "paho, an INSERT a row", ">= 60,000", spread(rates), median(rates) >= 60_000,
        ),
        Row(
            "an ingester's memory under this load, at its highest", "MB", max(memories), target="<= 400",
            spread=spread(memories), holds=max(memories) <= 400,
        ),
    ], []  # fmt: skip


def _in_folder(measure: Callable[[Path], T]) -> T:
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-", dir=Path.cwd()) as folder:
        return measure(Path(folder))


# from the journal to the tables


def _filled(folder: Path, rows: int) -> Journal:
    journal = Journal(folder / "journal.db")
    with journal.transaction():
        for first in range(0, rows, ENTRY):
            packed = encode_rows([row for _, row in result_rows(first, ENTRY)])
            journal.append(NAME, "e", "result", EVENT_US, first, ENTRY, packed)
    return journal


def flushed(rows: int, folder: Path) -> float:
    """Rows per second from the journal to a Delta table that outlasts a power cut, and out of the journal."""
    journal = _filled(folder, rows)
    tables = Tables(folder / "tables", journal)
    gc.collect()
    began = time.perf_counter()
    moved = tables.flush(COMMIT)
    seconds = time.perf_counter() - began
    journal.close()
    if moved != rows:
        raise RuntimeError(f"{moved} of {rows} rows moved")
    return rows / seconds


def written(rows: int, folder: Path) -> float:
    """The same rows, as ready columns, by deltalake alone."""
    journal = _filled(folder, rows)
    ready: list[pa.Table] = []
    last = 0
    while stored := journal.waiting("result", COMMIT, last):
        ready.append(to_arrow("result", stored))
        last = stored[-1].id
    journal.close()
    began = time.perf_counter()
    for part in ready:
        write_deltalake(
            str(folder / "tables" / "results"), part, mode="append", partition_by=PARTITIONS["results"],
            post_commithook_properties=NO_HOOKS,
        )  # fmt: skip
    return rows / (time.perf_counter() - began)


def delta(*, quick: bool) -> tuple[list[Row], list[str]]:
    """From the journal to a Delta table."""
    rows, times = (300_000, 2) if quick else (500_000, 5)
    pairs = [(_in_folder(partial(flushed, rows)), _in_folder(partial(written, rows))) for _ in range(times)]
    rates, limits = ([pair[index] for pair in pairs] for index in (0, 1))
    return [
        Row(
            "Delta table write, from the journal", "rows/s", median(rates), median(limits), None, "",
            ">= 250,000", spread(rates), median(rates) >= 250_000,
        )
    ], []  # fmt: skip


def main(kind: str, folder: str, url: str, messages: str = "0") -> None:
    if kind == "store":
        print(json.dumps(_store(Path(folder), url)), flush=True)
    elif kind == "insert":
        _receive(url, int(messages), _insert(Path(folder)))
    else:
        _receive(url, int(messages), lambda payload: None)


if __name__ == "__main__":
    main(*sys.argv[1:])
