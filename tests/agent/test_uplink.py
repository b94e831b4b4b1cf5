"""Outbox, uplink, ingest and journal together, over a link that loses, doubles and reorders."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.outbox.outbox import Outbox
from agent.outbox.pacing import FIRST_WINDOW
from agent.uplink import SILENCE_S, Uplink
from edgeward.clock import ManualClock
from edgeward.identifiers import DeviceName
from edgeward.trust import certificates, keys
from edgeward.trust.certificates import DeviceIdentity, Identity, StoreIdentity, TrustAnchor
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import topics
from edgeward.wire.envelope import seal
from edgeward.wire.lanes import LanePolicy
from edgeward.wire.reports import Status
from edgeward.wire.rows import TrendRow, decode_rows
from edgeward.wire.topics import LANES, Lane
from tests.agent.outboxes import row
from trends.completeness import lanes
from trends.ingest import Ingest
from trends.journal import Journal
from trends.query import Queries
from trends.tables import Tables

ME = DeviceName("north", "turbine-1")
WAIT = 120.0
BUDGETS: dict[Lane, LanePolicy] = {
    "alarm": LanePolicy(bytes=100_000, priority=40),
    "trend": LanePolicy(bytes=30_000, priority=30),
    "sample": LanePolicy(bytes=30_000, priority=20),
    "result": LanePolicy(bytes=50_000, priority=10),
}


class Site:
    """A device and its store, in one process; `chance` is what happens to each message between them."""

    def __init__(self, folder: Path, policies: dict[Lane, LanePolicy]) -> None:
        self.clock = ManualClock()
        self._key = keys.generate_key()
        self._ca = certificates.make_ca(self._key, self.clock.now())
        anchor = TrustAnchor(certificates.to_pem(self._ca))
        device, store = (
            self._member(DeviceIdentity(ME)),
            self._member(StoreIdentity("s", frozenset({"north"}))),
        )
        self.store = store
        self.journal = Journal(folder / "journal.db")
        self.ingest = Ingest(self.journal, anchor, frozenset({"north"}), self.clock)
        birth = topics.status(ME)
        with self.journal.transaction():
            self.ingest.handle(
                birth, seal(Status(1, 0, self.clock.now(), "online"), birth, device, with_certificate=True)
            )
        self.outbox = Outbox(folder / "outbox.db", self.clock, policies=policies)
        self.chance = random.Random(7)
        self.connected = False
        self.faults = 0.0
        self.order: list[tuple[Lane, int]] = []
        self.at_once = self.deaf = False
        self.renewed: list[float] = []
        self._messages: list[tuple[str, bytes]] = []
        self._arrived = threading.Condition()
        self.uplink = Uplink(
            self.outbox, ME, anchor, lambda: device, self.clock, self._publish, lambda: self.connected,
            chance=lambda: 0.0, renew=self._renew,
        )  # fmt: skip
        self._ended = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self.uplink.start()

    def _member(self, identity: Identity) -> SigningIdentity:
        key = keys.generate_key()
        issued = certificates.issue(
            self._ca, self._key, key.public_key(), identity, self.clock.now(), lifetime=365 * 86400
        )
        return SigningIdentity(key, certificates.to_der(issued))

    def _renew(self) -> None:
        self.renewed.append(self.clock.monotonic())

    def _publish(self, topic: str, payload: bytes) -> bool:
        if self.deaf:
            return True
        if self.at_once:
            self._deliver(topic, payload)
            return True
        with self._arrived:
            drawn = self.chance.random() if self.faults else 1.0
            if drawn < self.faults:
                return True  # lost
            self._messages.append((topic, payload))
            if drawn < 2 * self.faults:
                self._messages.append((topic, payload))
            elif drawn < 3 * self.faults:
                self.chance.shuffle(self._messages)
            self._arrived.notify()
        return True

    def _work(self) -> None:
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._messages or self._ended)
                if self._ended:
                    return
                topic, payload = self._messages.pop(0)
            self._deliver(topic, payload)

    def _deliver(self, topic: str, payload: bytes) -> None:
        with self.journal.transaction():
            reply = self.ingest.handle(topic, payload)
        if reply is not None and not (self.faults and self.chance.random() < self.faults):
            self.uplink.on_ack(reply.topic, seal(reply.ack, reply.topic, self.store, with_certificate=True))

    def until(self, condition: object) -> None:
        """Time passes until everything has gone up."""
        deadline = time.monotonic() + WAIT
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < deadline, (
                self.outbox.sequences(),
                self.uplink.counts,
                self.ingest.counts,
            )
            self.clock.advance(0.5)
            self.uplink.wake()
            threading.Event().wait(0.002)

    def drained(self) -> bool:
        return all(item.floor == item.next_seq for item in self.outbox.sequences())

    def stored(self, lane: Lane) -> list[int]:
        return sorted(
            item.first_seq + index
            for item in self.journal.waiting(lane, 10**6)
            for index in range(item.count)
        )

    def lost(self, lane: Lane) -> int:
        return sum(gap.count for gap in self.journal.waiting_gaps(10**6) if gap.lane == lane)

    def close(self) -> None:
        self.uplink.stop()
        with self._arrived:
            self._ended = True
            self._arrived.notify()
        self._thread.join(WAIT)
        self.outbox.close()
        self.journal.close()


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[list[Site]]:
    made: list[Site] = []
    yield made
    for site in made:
        site.close()


def test_the_stores_set_is_the_devices_set_whatever_the_link_does(sites: list[Site], tmp_path: Path) -> None:
    site = Site(tmp_path, {lane: LanePolicy() for lane in LANES})
    sites.append(site)
    site.connected, site.faults = True, 0.1
    site.uplink.reconnected()
    for start in range(0, 3000, 100):
        site.outbox.commit_rows([row(seq) for seq in range(start, start + 100)] + [row(start, "alarm")])
        site.uplink.wake()
        if start == 1500:
            site.uplink.reconnected()
    site.until(site.drained)
    assert site.stored("result") == list(range(3000)) and site.stored("alarm") == list(range(30))
    assert site.lost("result") == 0 and not site.ingest.counts["refused"]


def test_a_partition_with_too_small_a_budget_loses_no_alarm_no_trend_value_and_no_count(
    sites: list[Site], tmp_path: Path
) -> None:
    site = Site(tmp_path, BUDGETS)
    sites.append(site)
    for minute in range(72 * 60):
        rows = [row(minute * 4 + index) for index in range(4)] + [row(minute, "trend")]
        site.outbox.commit_rows(rows + ([row(minute, "alarm")] if minute % 60 == 0 else []))
        site.clock.advance(60)
    site.connected = True
    site.uplink.reconnected()
    site.until(site.drained)
    assert site.stored("alarm") == list(range(72)) and site.lost("alarm") == 0
    for lane, produced in (("result", 72 * 60 * 4), ("trend", 72 * 60)):
        assert len(site.stored(lane)) + site.lost(lane) == produced  # type: ignore[arg-type]
        assert 0 < len(site.stored(lane)) < produced  # type: ignore[arg-type]
    trends = [row for item in site.journal.waiting("trend", 10**6) for row in decode_rows("trend", item.rows)]
    assert sum(item.count for item in trends if isinstance(item, TrendRow)) == 72 * 60, (
        "complete at coarser resolution"
    )
    assert {gap.reason for gap in site.journal.waiting_gaps(10**6)} == {"thinned", "merged"}
    for account in lanes(Queries(Tables(tmp_path / "tables", site.journal), site.journal)):
        assert (account.first, account.missing, account.twice) == (0, 0, 0), (
            "each number is a row or in one gap"
        )
        assert account.last == site.outbox.lane(account.lane).next_seq - 1  # type: ignore[arg-type]


def test_fresh_rows_do_not_wait_for_the_backlog(sites: list[Site], tmp_path: Path) -> None:
    site = Site(tmp_path, {lane: LanePolicy() for lane in LANES})
    sites.append(site)
    for start in range(0, 60_000, 1000):
        site.outbox.commit_rows([row(seq) for seq in range(start, start + 1000)])
    site.connected = True
    site.uplink.reconnected()
    site.until(lambda: site.uplink.counts["batches"] > 0)
    fresh = site.outbox.lane("result").next_seq
    site.outbox.commit_rows([row(fresh)])
    site.until(lambda: fresh in site.stored("result"))
    assert len(site.stored("result")) < 40_000, "the backlog is still on its way"
    site.until(site.drained)
    assert len(site.stored("result")) == 60_001


def test_an_ack_that_is_quicker_than_the_thread_that_sends_ends_its_batch(
    sites: list[Site], tmp_path: Path
) -> None:
    """A batch is known before it goes: else its ack would find none, and it would count as timed out."""
    site = Site(tmp_path, {lane: LanePolicy() for lane in LANES})
    sites.append(site)
    site.at_once = True
    site.outbox.commit_rows([row(seq) for seq in range(100)])
    site.connected = True
    site.uplink.reconnected()
    site.until(site.drained)
    site.until(lambda: site.uplink.pace.window > FIRST_WINDOW)
    assert not site.uplink._schedule.flights


def test_a_disk_that_cannot_be_read_ends_no_thread_and_its_rows_are_salvaged(
    sites: list[Site], tmp_path: Path
) -> None:
    """Reads fail as the kernel fails them: the file's descriptor becomes that of a folder."""
    site = Site(tmp_path, {lane: LanePolicy() for lane in LANES})
    sites.append(site)
    for start in range(0, 60_000, 1000):  # more than SQLite keeps in memory
        site.outbox.commit_rows([row(seq) for seq in range(start, start + 1000)])
    files = {str(tmp_path / name) for name in ("outbox.db", "outbox.db-wal")}
    mine = [int(fd.name) for fd in Path("/proc/self/fd").iterdir() if _target(fd) in files]
    folder = os.open(tmp_path, os.O_RDONLY)
    for fd in mine:
        os.dup2(folder, fd)
    os.close(folder)
    epoch = site.outbox.epoch
    site.connected = True
    site.uplink.reconnected()
    site.until(lambda: site.outbox.epoch != epoch)
    site.outbox.sequences()  # which waits until the new file is there
    site.outbox.wait_salvaged()
    site.outbox.commit_rows([row(60_000)])
    site.until(site.drained)
    assert site.uplink._thread.is_alive() and len(mine) == 2
    assert site.stored("result") == sorted([0, *range(60_000)]) and not site.lost("result")


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:
        return ""


def test_a_connection_that_brings_no_ack_is_renewed_ever_more_rarely(
    sites: list[Site], tmp_path: Path
) -> None:
    site = Site(tmp_path, {lane: LanePolicy() for lane in LANES})
    sites.append(site)
    site.deaf = site.connected = True
    site.uplink.reconnected()
    site.until(lambda: site.clock.monotonic() > 4 * SILENCE_S)
    assert not site.renewed, "nothing waits for an ack"
    site.outbox.commit_rows([row(0)])
    for round_ in range(3):
        site.until(lambda round_=round_: len(site.renewed) > round_)
        site.uplink.reconnected()
    first, second, third = site.renewed
    assert second - first > SILENCE_S and third - second > 1.5 * (second - first)
    site.deaf = False
    site.until(site.drained)
    assert len(site.renewed) <= 4
