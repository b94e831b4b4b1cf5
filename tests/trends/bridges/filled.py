"""A trend store's journal and tables, filled as ingest and flushes fill them."""

from __future__ import annotations

from pathlib import Path

from edgeward.identifiers import DeviceName
from edgeward.wire.rows import AlarmRow, ResultRow, SampleRow, TrendRow, encode_rows
from edgeward.wire.topics import LANES, Lane
from trends.bridges.feed import Batch, Feed, Position
from trends.journal import Journal
from trends.tables import Tables
from trends.upkeep import DAY, Limits, Retention, Upkeep

NOW = 1_790_000_000.0
NAME = DeviceName("north", "a")
DIGEST = "d" * 64


class Filled:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = Journal(folder / "journal.db")
        self.tables = Tables(folder / "tables", self.journal)
        self.next = dict.fromkeys(LANES, 0)

    def root(self, table: str = "results") -> Path:
        return self.folder / "tables" / table

    def append(self, number: int, day: int = 0, lane: Lane = "result", name: DeviceName = NAME) -> None:
        """So many rows with the next numbers, `day` days before now, into the journal."""
        at, first = int((NOW - day * DAY) * 1e6), self.next[lane]
        made = [_row(lane, at + seq * 1000, seq) for seq in range(first, first + number)]
        with self.journal.transaction():
            self.journal.append(name, "e", lane, at, first, number, encode_rows(made))  # type: ignore[arg-type]
        self.next[lane] += number

    def commit(self, number: int = 10, day: int = 0, lane: Lane = "result", name: DeviceName = NAME) -> None:
        self.append(number, day, lane, name)
        self.tables.flush()

    def lose(self, first: int, last: int, reason: str = "budget") -> None:
        with self.journal.transaction():
            self.journal.append_gap(NAME, "e", "result", int(NOW * 1e6), (first, last), reason)
        self.tables.flush()

    def upkeep(self, **limits: int) -> None:
        Upkeep(self.tables, Retention(), Limits(**limits)).run(NOW)

    def keep_days(self, days: int) -> None:
        Upkeep(self.tables, Retention({"results": days}), Limits(files=10_000, checkpoint=10_000)).run(NOW)

    def vacuum(self) -> None:
        """As the upkeep does when nobody can still read the old files."""
        for table in self.root().parent.iterdir():
            opened, _ = self.tables.snapshot(table.name)
            assert opened is not None
            opened.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)
            self.tables.settle(table.name)

    def feed(self, table: str = "results") -> Feed:
        return Feed(self.tables, self.journal, table)

    def close(self) -> None:
        self.journal.close()


def _row(lane: Lane, at: int, seq: int) -> ResultRow | AlarmRow | TrendRow | SampleRow:
    source = ("k", "s-epoch", seq)
    model = (DIGEST, "fp32", "CPU")
    match lane:
        case "result":
            return ResultRow(at, "press", 1, *source, *model, {"score": seq / 2, "b": -1.0}, seq % 5 == 0)
        case "alarm":
            return AlarmRow(at, "press", 1, *source, *model, seq + 0.25, 0.5)
        case "sample":
            return SampleRow(at, "press", 1, *source, {"t\0": 1e300, "ü": float(seq)})
        case "trend":
            return TrendRow(
                at, 60_000_000, "press", 1, *model, "output:score", 3, 0, 1.5, 0.5, 1.0, 2.0,
                [1.0, 2.0], [1, 1, 1], b"\x00\xff",
            )  # fmt: skip


def seqs(batch: Batch) -> list[int]:
    found: list[int] = batch.rows.column("seq").to_pylist()
    return found


def read(feed: Feed, position: Position | None = None, limit: int = 1000) -> tuple[list[int], Position]:
    """All that the feed hands on from a position, and where it is afterwards."""
    after = position or Position()
    numbers: list[int] = []
    for batch in feed.batches(after, limit):
        numbers += seqs(batch)
        after = batch.after
    return numbers, after
