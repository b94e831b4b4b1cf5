"""Whatever happens between a device and its store: each number is stored or counted as lost, once."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agent.outbox.eviction import GAP_BYTES, ROW_BYTES
from agent.outbox.outbox import Outbox
from agent.outbox.rows import Discarded, Part
from edgeward.clock import ManualClock
from edgeward.intervals import missing
from edgeward.wire.lanes import LanePolicy
from edgeward.wire.rows import Batch, TrendRow, encode_rows
from edgeward.wire.topics import LANES, Lane
from tests.agent.outboxes import contents, row
from trends.losses import losses, share
from trends.sequence import Settled, decide

POLICIES: dict[Lane, LanePolicy] = {
    "alarm": LanePolicy(bytes=4000, time_to_live=1000.0, priority=40),
    "trend": LanePolicy(bytes=4000, time_to_live=1000.0, priority=30),
    "sample": LanePolicy(bytes=3000, time_to_live=200.0, priority=20, fsync="before-send"),
    "result": LanePolicy(bytes=5000, time_to_live=500.0, priority=10),
}
LANE = st.sampled_from(LANES)
Key = tuple[str, Lane]


class Store:
    """The reference: what a trend store keeps of each sequence."""

    def __init__(self) -> None:
        self.settled: dict[Key, Settled] = {}
        self.rows: dict[Key, dict[int, bytes]] = {}
        self.gaps: dict[Key, Counter[str]] = {}

    def take(self, key: Key, part: Part) -> None:
        batch = Batch(key[0], part.first, part.count, part.floor, encode_rows([]), lost=part.lost)
        lost = losses(batch)
        decision = decide(self.settled.get(key), part.first, part.count, part.floor)
        assert not decision.lost, "the outbox has forgotten what was never acknowledged"
        self.settled[key] = decision.after
        numbers = [
            seq
            for first, last in missing(
                [(item.first_seq, item.last_seq) for item in lost], part.first, part.first + part.count - 1
            )
            for seq in range(first, last + 1)
        ]
        new = {seq for first, last in decision.take for seq in range(first, last + 1)}
        stored = self.rows.setdefault(key, {})
        stored |= {seq: data for seq, data in zip(numbers, part.rows, strict=True) if seq in new}
        for item in lost:
            count = len(new & set(range(item.first_seq, item.last_seq + 1)))
            if count:
                self.gaps.setdefault(key, Counter()).update(share(item.reasons, count))


class Machine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "outbox.db"
        self.clock = ManualClock()
        self.outbox = Outbox(self.path, self.clock, policies=POLICIES)
        self.store = Store()
        self.produced: Counter[Key] = Counter()
        self.next = 0

    @property
    def epoch(self) -> str:
        return self.outbox.epoch

    @rule(lane=LANE, count=st.integers(1, 60))
    def append(self, lane: Lane, count: int) -> None:
        self.outbox.commit_rows([row(self.next + index, lane) for index in range(count)])
        self.produced[self.epoch, lane] += count
        self.next += count

    @rule(lane=LANE, count=st.integers(1, 20))
    def give_up(self, lane: Lane, count: int) -> None:
        self.outbox.commit_rows([row(self.next, lane)], lost={lane: Discarded(count, 5, 9)})
        self.produced[self.epoch, lane] += count + 1
        self.next += 1

    @rule(
        lane=LANE,
        at=st.integers(0, 300),
        rows=st.integers(1, 50),
        span=st.integers(1, 100),
        arrives=st.booleans(),
    )
    def send(self, lane: Lane, at: int, rows: int, span: int, arrives: bool) -> None:
        for item in self.outbox.sequences():
            if item.lane == lane:
                part = self.outbox.read(item.epoch, lane, at, rows=rows, size=4000, below=at + span)
                if part is not None and arrives:
                    assert at <= part.first and part.first + part.count <= at + span
                    self.store.take((item.epoch, lane), part)

    @rule(lane=LANE)
    def acknowledge(self, lane: Lane) -> None:
        for (epoch, name), settled in self.store.settled.items():
            if name == lane:
                self.outbox.acknowledge(epoch, lane, settled.expected - 1, settled.above)

    @rule(seconds=st.sampled_from([1.0, 100.0, 400.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.outbox.tend()

    @rule()
    def reopen(self) -> None:
        self.outbox.close()
        self.outbox = Outbox(self.path, self.clock, policies=POLICIES)

    @rule()
    def crash(self) -> None:
        """The files as a kill leaves them: nothing is closed."""
        copy = Path(tempfile.mkdtemp())
        for file in self.folder.iterdir():
            if not file.name.endswith("-shm"):
                shutil.copy(file, copy)
        self.outbox.close()
        shutil.rmtree(self.folder)
        self.folder, self.path = copy, copy / "outbox.db"
        self.outbox = Outbox(self.path, self.clock, policies=POLICIES)

    @rule(at=st.integers(0, 20), length=st.integers(1, 6000), salt=st.binary(min_size=1, max_size=8))
    def damage(self, at: int, length: int, salt: bytes) -> None:
        """Bytes of the closed file change: pages, or the beginning of it."""
        self.outbox.close()
        data = bytearray(self.path.read_bytes())
        start = at * 4096 % len(data)
        for index in range(start, min(start + length, len(data))):
            data[index] = salt[index % len(salt)]
        self.path.write_bytes(data)
        self.outbox = Outbox(self.path, self.clock, policies=POLICIES)
        self.outbox.wait_salvaged()

    @invariant()
    def every_number_is_a_row_or_lost_or_settled(self) -> None:
        for key, produced in self.produced.items():
            rows, lost = contents(self.outbox, key[1], key[0])
            held = {seq for seq, _ in rows}
            gone = {seq for first, last, _ in lost for seq in range(first, last + 1)}
            assert not held & gone
            assert all(sum(reasons.values()) == last - first + 1 for first, last, reasons in lost)
            settled = self.store.settled.get(key, Settled(0))
            stored = set(range(settled.expected)) | {n for a, b in settled.above for n in range(a, b + 1)}
            assert held | gone | stored >= set(range(produced)), key
            assert max(held | gone, default=-1) < produced

    @invariant()
    def the_books_are_right_and_within_the_budget(self) -> None:
        total = 0
        for lane in self.outbox._tables.lanes():
            count, size = self.outbox._db.execute(
                "SELECT count(*), coalesce(sum(length(data)), 0) FROM row WHERE lane=?", (lane.id,)
            ).fetchone()
            (gaps,) = self.outbox._db.execute("SELECT count(*) FROM gap WHERE lane=?", (lane.id,)).fetchone()
            assert (lane.rows, lane.bytes) == (count, size + ROW_BYTES * count + GAP_BYTES * gaps)
            assert gaps <= count + len(self.store.settled.get((lane.epoch, lane.name), Settled(0)).above) + 1
            total += lane.bytes if lane.rows else 0
        # One commit beyond: room is made before the next.
        assert total <= sum(policy.bytes for policy in POLICIES.values()) + 60 * 200

    def teardown(self) -> None:
        if not hasattr(self, "outbox"):
            return
        self.outbox.close()
        self.outbox = Outbox(self.path, self.clock, policies=POLICIES)
        self.outbox.wait_salvaged()
        for item in self.outbox.sequences():
            at = 0
            while part := self.outbox.read(item.epoch, item.lane, at, rows=100, size=4000, below=1 << 40):
                self.store.take((item.epoch, item.lane), part)
                at = part.first + part.count
        for key, produced in self.produced.items():
            rows, gaps = self.store.rows.get(key, {}), self.store.gaps.get(key, Counter())
            assert len(rows) + sum(gaps.values()) == produced, key
            if key[1] == "trend":
                values = sum(msgspec.msgpack.decode(data, type=TrendRow).count for data in rows.values())
                assert values <= produced, "counted twice"
                if set(gaps) <= {"merged"}:
                    assert values == produced, "a merge has lost values"
        self.outbox.close()
        shutil.rmtree(self.folder)


TestOutbox = Machine.TestCase
TestOutbox.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
