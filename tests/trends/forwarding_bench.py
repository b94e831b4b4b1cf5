"""A site's store and a central one on real files and a real broker; devices hand their batches in directly."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeward.clock import SystemClock
from edgeward.identifiers import DeviceName
from edgeward.mqtt import Broker
from edgeward.trust import certificates, keys
from edgeward.trust.certificates import DeviceIdentity, Identity, StoreIdentity, TrustAnchor
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import topics
from edgeward.wire.envelope import seal
from edgeward.wire.residency import ResidencyPolicy
from edgeward.wire.resources import Residency
from edgeward.wire.rows import Batch, Lost, ResultRow, Row, SampleRow, TrendRow, encode_rows
from edgeward.wire.topics import Lane
from trends.completeness import lanes
from trends.forwarder import Forwarder, Pace
from trends.ingest import Ingest, Ingester
from trends.journal import Journal
from trends.ledger import Ledger
from trends.query import Queries
from trends.read_back import ReadBack
from trends.tables import Tables

DEVICE = DeviceName("north", "turbine-1")
CLOCK = SystemClock()
FAST = Pace(rows_every=0.0, withheld_every=0.0, patience=0.5)


def wait_until(condition: Callable[[], Any], timeout: float = 240.0) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not reached within {timeout} s"
        time.sleep(0.02)
    return value


class Fleet:
    def __init__(self, folder: Path | None = None) -> None:
        """Processes that share a folder are of one fleet."""
        self.key = keys.load_or_create(folder / "ca.key") if folder else keys.generate_key()
        self.ca = certificates.make_ca(self.key, time.time())
        self.anchor = TrustAnchor(certificates.to_pem(self.ca))

    def member(self, identity: Identity) -> SigningIdentity:
        key = keys.generate_key()
        issued = certificates.issue(
            self.ca, self.key, key.public_key(), identity, time.time(), lifetime=86400
        )
        return SigningIdentity(key, certificates.to_der(issued))


def row(lane: Lane, seq: int, **changes: Any) -> Row:
    at = int(time.time() * 1e6)
    common = {"stream": "s", "revision": 1}
    source = {"key": f"part-{seq}", "source_epoch": "se", "source_seq": seq}
    model = {"digest": "d" * 64, "variant": "v", "provider": "CPU"}
    values: dict[str, Any]
    match lane:
        case "result":
            values = {
                "event_time": at,
                **common,
                **source,
                **model,
                "outputs": {"score": seq / 10},
                "alarm": False,
            }
            return ResultRow(**{**values, **changes})
        case "sample":
            values = {"event_time": at, **common, **source, "values": {"x": float(seq)}}
            return SampleRow(**{**values, **changes})
        case _:
            series = "output:score" if seq % 2 else "feature:x"
            values = {
                "bucket": at, "width": 60_000_000, **common, **model, "series": series, "count": 100,
                "missing": seq, "mean": 5.0, "m2": 400.0, "minimum": 0.25, "maximum": 9.75, "edges": [5.0],
                "histogram": [50, 50], "sketch": b"sketch",
            }  # fmt: skip
            return TrendRow(**{**values, **changes})


class Half:
    """One store: its journal, its tables, and questions to them."""

    def __init__(self, folder: Path, fleet: Fleet, name: str, sites: frozenset[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.fleet = fleet
        self.identity = StoreIdentity(name, sites)
        self.signer = fleet.member(self.identity)
        self.open()

    def open(self) -> None:
        self.journal = Journal(self.folder / "journal.db")
        self.tables = Tables(self.folder / "tables", self.journal)
        self.queries = Queries(self.tables, self.journal)

    def close(self) -> None:
        self.journal.close()

    def ask(self, sql: str) -> list[dict[str, Any]]:
        return self.queries.sql(sql).to_pylist()

    def lanes(self) -> dict[tuple[str, str], tuple[int, int, int, int]]:
        """By device and lane: stored, in gaps, missing, twice."""
        return {
            (lane.device, lane.lane): (lane.stored, lane.in_gaps, lane.missing, lane.twice)
            for lane in lanes(self.queries)
        }


class Site(Half):
    def __init__(self, folder: Path, fleet: Fleet, name: str = "plant", site: str = "north") -> None:
        super().__init__(folder, fleet, name, frozenset({site}))
        self.devices: dict[DeviceName, SigningIdentity] = {}
        self.ingest = Ingest(self.journal, fleet.anchor, self.identity.sites, CLOCK)
        self.forwarder: Forwarder | None = None

    def produce(
        self,
        lane: Lane,
        first: int,
        count: int,
        name: DeviceName = DEVICE,
        lost: tuple[Lost, ...] = (),
        floor: int = 0,
        **changes: Any,
    ) -> None:
        signer = self.devices.get(name)
        if signer is None:
            signer = self.devices[name] = self.fleet.member(DeviceIdentity(name))
        gone = {seq for each in lost for seq in range(each.first_seq, each.last_seq + 1)}
        rows = [row(lane, seq, **changes) for seq in range(first, first + count) if seq not in gone]
        batch = Batch("e", first, count, floor, encode_rows(rows), lost=list(lost))
        topic = topics.up(name, lane)
        with self.journal.transaction():
            reply = self.ingest.handle(topic, seal(batch, topic, signer, with_certificate=True))
        assert reply is not None

    def forward(
        self,
        url: str,
        residency: Residency | None = None,
        pace: Pace = FAST,
        between: Callable[[str], None] = lambda step: None,
    ) -> Forwarder:
        self.ledger = Ledger(self.folder / "forward.db", time.time())
        self.forwarder = Forwarder(
            self.journal, ReadBack(self.tables, self.journal), self.ledger, Broker(url), self.fleet.anchor,
            self.identity, self.signer, CLOCK, pace, between=between,
        )  # fmt: skip
        if residency is not None:
            self.forwarder.policy = policy(**dict.fromkeys(self.identity.sites, residency))
        self.forwarder.start()
        return self.forwarder

    def stop(self) -> None:
        if self.forwarder is not None:
            self.forwarder.stop()
            self.ledger.close()
            self.forwarder = None

    def close(self) -> None:
        self.stop()
        super().close()

    @property
    def behind(self) -> int:
        """Numbers that the central store has not acknowledged."""
        from edgeward.intervals import size
        from trends.forwarding import pending

        there = self.ledger.cursors()
        return sum(
            size(pending(settled, there.get(sequence), ()))
            for sequence, settled in self.journal.positions().items()
        )


def policy(**sites: Residency) -> ResidencyPolicy:
    return ResidencyPolicy(time.time(), time.time() + 3600, dict(sites))


class Central(Half):
    def __init__(
        self, folder: Path, fleet: Fleet, url: str, sites: frozenset[str] = frozenset({"north"})
    ) -> None:
        super().__init__(folder, fleet, "cloud", sites)
        self.url = url
        self.ingester: Ingester | None = None

    def start(self, *, central: bool = True) -> None:
        self.ingest = Ingest(self.journal, self.fleet.anchor, self.identity.sites, CLOCK, central=central)
        self.ingester = Ingester(
            self.ingest, self.journal, Broker(self.url), self.signer, self.identity.name, central=central
        )
        self.ingester.start()
        wait_until(lambda: self.ingester is not None and self.ingester.connected)

    def stop(self) -> None:
        if self.ingester is not None:
            self.ingester.stop()
            self.ingester = None

    def close(self) -> None:
        self.stop()
        super().close()
