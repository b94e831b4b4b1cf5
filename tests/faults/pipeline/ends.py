"""The two ends of the way up, as they run in production: an outbox with its uplink, a journal with its ingester.

Between them stands whatever a test puts there. `Produced` knows every row that was made, `compare` finds each of
them in the store.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from agent.outbox.outbox import Outbox
from agent.uplink import Uplink
from edgeward.clock import SystemClock
from edgeward.identifiers import DeviceName
from edgeward.mqtt import Broker, Link, Will
from edgeward.storage import write_atomic
from edgeward.trust import certificates, keys
from edgeward.trust.certificates import DeviceIdentity, Identity, StoreIdentity, TrustAnchor
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import topics
from edgeward.wire.envelope import seal
from edgeward.wire.reports import Status
from edgeward.wire.rows import AlarmRow, Batch, ResultRow, Row
from edgeward.wire.topics import Lane
from trends.completeness import lanes
from trends.databases import Database
from trends.ingest import Ingest, Ingester
from trends.journal import Journal
from trends.query import Queries
from trends.tables import Tables

SITES = frozenset({"north"})
#: One alarm for so many results.
ALARM_EVERY = 50
WAIT = 60.0


class Keyring(msgspec.Struct, frozen=True):
    """What both ends hold, so that a process of its own can be either: PEM keys, DER certificates."""

    ca: bytes
    device_key: bytes
    device: bytes
    store_key: bytes
    store: bytes
    name: DeviceName

    def anchor(self) -> TrustAnchor:
        return TrustAnchor(self.ca.decode())

    def device_signer(self) -> SigningIdentity:
        return SigningIdentity(keys.load_private(self.device_key), self.device)

    def store_signer(self) -> SigningIdentity:
        return SigningIdentity(keys.load_private(self.store_key), self.store)

    def write(self, path: Path) -> None:
        write_atomic(path, msgspec.msgpack.encode(self))

    @classmethod
    def read(cls, path: Path) -> Keyring:
        return msgspec.msgpack.decode(path.read_bytes(), type=cls)


def keyring(device: str = "turbine-1", now: float | None = None) -> Keyring:
    """`now` is when it is made, in seconds since 1970: valid for a day from then on."""
    now = SystemClock().now() if now is None else now
    key = keys.generate_key()
    ca = certificates.make_ca(key, now)

    def member(identity: Identity) -> tuple[bytes, bytes]:
        own = keys.generate_key()
        issued = certificates.issue(ca, key, own.public_key(), identity, now, lifetime=86400)
        return keys.private_pem(own), certificates.to_der(issued)

    name = DeviceName("north", device)
    return Keyring(
        certificates.to_pem(ca).encode(),
        *member(DeviceIdentity(name)),
        *member(StoreIdentity("plant", SITES)),
        name,
    )


def rows_from(first: int, count: int, epoch: str = "sensor") -> list[tuple[Lane, Row]]:
    """Samples `first ..` as results, and an alarm for every fiftieth."""
    now = int(SystemClock().now() * 1e6)
    made: list[tuple[Lane, Row]] = []
    for seq in range(first, first + count):
        made.append(
            ("result", ResultRow(now, "s", 1, "", epoch, seq, "d", "v", "CPU", {"score": 0.5}, False))
        )
        if seq % ALARM_EVERY == 0:
            made.append(("alarm", AlarmRow(now, "s", 1, "", epoch, seq, "d", "v", "CPU", 0.9, 0.5)))
    return made


class Agent:
    """An outbox, an uplink and a link, wired as the daemon wires them."""

    def __init__(self, folder: Path, ring: Keyring, url: str, *, trusts_broker: bool = False) -> None:
        """`trusts_broker` takes a message that the link took for one that has arrived: what a control needs."""
        folder.mkdir(exist_ok=True)
        self._trusts_broker = trusts_broker
        clock = SystemClock()
        self.outbox = Outbox(folder / "outbox.db", clock)
        signer = ring.device_signer()
        status = topics.status(ring.name)

        def state(word: str) -> bytes:
            return seal(Status(1, 0, clock.now(), word), status, signer, with_certificate=True)  # type: ignore[arg-type]

        def connected() -> None:
            self.link.publish(status, state("online"), retain=True)
            self.uplink.reconnected()

        self.link = Link(
            Broker(url),
            f"edgeward-agent-{ring.name.device}",
            subscriptions=tuple(topics.ack(ring.name, lane) for lane in topics.LANES),
            on_message=lambda message: self.uplink.on_ack(message.topic, message.payload),
            on_connect=connected,
            will=Will(status, state("offline")),
            max_reconnect_delay=1.0,
        )
        self.uplink = Uplink(
            self.outbox, ring.name, ring.anchor(), lambda: signer, clock, self._publish,
            lambda: self.link.connected, chance=lambda: 0.0, renew=self.link.renew,
        )  # fmt: skip
        self.uplink.start()
        self.link.start()

    def _publish(self, topic: str, payload: bytes) -> bool:
        taken = self.link.publish(topic, payload)
        if taken and self._trusts_broker:
            batch = msgspec.msgpack.decode(msgspec.msgpack.decode(payload)[2], type=Batch)
            lane = topics.parse(topic).lane
            assert lane is not None
            self.outbox.acknowledge(batch.epoch, lane, batch.first_seq + batch.count - 1)
        return taken

    def produce(self, first: int, count: int) -> None:
        self.outbox.commit_rows(rows_from(first, count), {"sensor/a": ("sensor", first + count - 1)})
        self.uplink.wake()

    @property
    def acknowledged(self) -> int:
        """Rows that the store has acknowledged."""
        return self.outbox.lane("result").acked + 1

    def drained(self) -> bool:
        return all(item.floor == item.next_seq for item in self.outbox.sequences())

    def close(self) -> None:
        self.link.stop()
        self.uplink.stop()
        self.outbox.close()


class Load:
    """A stream that makes rows all the time, for as long as the context lasts; never far ahead of the store."""

    def __init__(self, agent: Agent, first: int = 0, *, ahead: int = 5000, every: float = 0.004) -> None:
        self._agent = agent
        self.produced = first
        self._ahead = ahead
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        while not self._stop.wait(self._every):
            if self.produced - self._agent.acknowledged < self._ahead:
                self._agent.produce(self.produced, 50)
                self.produced += 50

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class Store:
    """A journal, an ingester and the tables; `steps` is told each durable step and the ones between."""

    def __init__(
        self,
        folder: Path,
        ring: Keyring,
        url: str,
        *,
        journal: Database | None = None,
        tables: Path | None = None,
        name: str = "plant",
        share: str = "",
        steps: Callable[[str], None] = lambda step: None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.journal = Journal(journal or folder / "journal.db")
        self.tables = Tables(tables or folder / "tables", self.journal, between=steps)
        self.ingest = Ingest(self.journal, ring.anchor(), SITES, SystemClock())
        self.ingester = Ingester(
            self.ingest, self.journal, Broker(url), ring.store_signer(), name, share=share, between=steps
        )
        self._stop = threading.Event()
        self._flushing = threading.Thread(target=self._flush, daemon=True)
        self.refused: list[Exception] = []

    def start(self) -> None:
        if self.journal.leads():
            self.tables.repair()
        self.ingester.start()
        self._flushing.start()

    def _flush(self) -> None:
        while not self._stop.wait(0.2):
            try:
                if self.journal.leads():
                    self.tables.flush()
            except Exception as error:  # as in trends/store.py
                self.refused.append(error)

    def close(self) -> None:
        self.ingester.stop()
        self._stop.set()
        self._flushing.join()
        self.journal.close()


@dataclass
class Outcome:
    """What the store's own account and the comparison with the produced rows say."""

    lost: dict[str, set[int]] = field(default_factory=dict)
    duplicated: dict[str, set[int]] = field(default_factory=dict)
    missing: int = 0
    twice: int = 0
    in_gaps: int = 0

    @property
    def exactly_once(self) -> bool:
        return not (any(self.lost.values()) or any(self.duplicated.values()) or self.missing or self.twice)


def compare(journal: Journal, tables: Tables, produced: int) -> Outcome:
    """Samples `0 .. produced - 1` and their alarms with what is in the tables and the journal."""
    queries = Queries(tables, journal)
    found = Outcome()
    wanted = {"results": set(range(produced)), "alarms": set(range(0, produced, ALARM_EVERY))}
    for table, numbers in wanted.items():
        answer = queries.sql(f"SELECT source_seq, count(*) AS n FROM {table} GROUP BY ALL").to_pylist()
        stored = {row["source_seq"] for row in answer}
        found.lost[table] = numbers - stored
        found.duplicated[table] = {row["source_seq"] for row in answer if row["n"] > 1} | (stored - numbers)
    for lane in lanes(queries):
        found.missing += lane.missing
        found.twice += lane.twice
        found.in_gaps += lane.in_gaps
    return found


def wait_for(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for: {what()}"
        time.sleep(0.005)
