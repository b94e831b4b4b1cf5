"""Rows and gaps by their numbers, from the journal and the tables: what the store holds is its own outbox.

The journal is read before the table: a row that moves in between is seen twice, never missed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from edgeward.intervals import Interval, missing, runs
from edgeward.wire.rows import Row, decode_rows
from trends.columns import from_arrow
from trends.journal import Journal
from trends.outgoing import Gap
from trends.schemas import TABLE_OF
from trends.sequence import SequenceId
from trends.tables import Tables

_KEY = ["site", "device", "epoch"]
#: So many conditions are put to a table at once.
_AT_ONCE = 32


class Lot(NamedTuple):
    """Numbers `first .. last` of a sequence."""

    sequence: SequenceId
    first: int
    last: int

    @property
    def span(self) -> Interval:
        return self.first, self.last

    @property
    def key(self) -> tuple[str, ...]:
        """Site, device and epoch."""
        return (*self.sequence.name, self.sequence.epoch)


class ReadBack:
    """Numbers must have been settled before they are asked for."""

    def __init__(self, tables: Tables, journal: Journal) -> None:
        self._tables = tables
        self._journal = journal

    def rows(self, lots: Sequence[Lot]) -> list[dict[int, Row]]:
        """The rows of each lot by number; all lots are of one lane."""
        if not lots:
            return []
        lane = lots[0].sequence.lane
        found: list[dict[int, Row]] = []
        wanted: list[Lot] = []
        for lot in lots:
            rows: dict[int, Row] = {}
            for entry in self._journal.find(lot.sequence, lot.span):
                for seq, row in enumerate(decode_rows(lane, entry.rows), entry.first_seq):
                    if lot.first <= seq <= lot.last:
                        rows[seq] = row
            found.append(rows)
            for first, last in missing(runs(sorted(rows)), *lot.span):
                wanted.append(lot._replace(first=first, last=last))
        by_key: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for index, lot in enumerate(lots):
            by_key[lot.key].append(index)
        for table in self._scan(TABLE_OF[lane], wanted, "seq", "seq"):
            for key, seq, row in zip(
                _keys(table), table["seq"].to_pylist(), from_arrow(lane, table), strict=True
            ):
                for index in by_key[key]:
                    if lots[index].first <= seq <= lots[index].last:
                        found[index][seq] = row
        return found

    def gaps(self, lots: Sequence[Lot]) -> list[list[Gap]]:
        """The gaps that lie in each lot, at least in part, by their first number."""
        records: list[dict[Interval, Gap]] = [{} for _ in lots]
        for index, lot in enumerate(lots):
            # A gap that moves to the table meanwhile has the same range and reason there.
            for gap in self._journal.find_gaps(lot.sequence, lot.span):
                times = (gap.first_event_time, gap.last_event_time)
                _add(records[index], gap.first_seq, gap.last_seq, gap.reason, gap.count, times)
        for table in self._scan("gaps", lots, "first_seq", "last_seq", lanes=True):
            for key, record in zip(_keys(table), table.to_pylist(), strict=True):
                first, last = record["first_seq"], record["last_seq"]
                # Before there were counts, a gap was always the whole of its range.
                count = record.get("count") or last - first + 1
                times = (_micros(record["first_event_time"]), _micros(record["last_event_time"]))
                for index, lot in enumerate(lots):
                    meant = lot.key == key and lot.sequence.lane == record["lane"]
                    if meant and first <= lot.last and last >= lot.first:
                        _add(records[index], first, last, record["reason"], count, times)
        return [sorted(found.values(), key=lambda gap: gap.first) for found in records]

    def first_row(self, lot: Lot) -> int | None:
        """The lowest number of the lot that the store holds as a row."""
        numbers = [max(entry.first_seq, lot.first) for entry in self._journal.find(lot.sequence, lot.span)]
        for table in self._scan(TABLE_OF[lot.sequence.lane], [lot], "seq", "seq", columns=["seq"]):
            if table.num_rows:
                numbers.append(pc.min(table["seq"]).as_py())
        return min(numbers, default=None)

    def _scan(
        self,
        table: str,
        lots: Sequence[Lot],
        low: str,
        high: str,
        *,
        lanes: bool = False,
        columns: list[str] | None = None,
    ) -> list[pa.Table]:
        """What a table holds with numbers from `low` to `high` in one of the lots."""
        if not lots:
            return []
        opened, _ = self._tables.snapshot(table)
        if opened is None:
            return []
        dataset = opened.to_pyarrow_dataset()
        parts = []
        for at in range(0, len(lots), _AT_ONCE):
            conditions = [_condition(lot, low, high, lanes) for lot in lots[at : at + _AT_ONCE]]
            parts.append(dataset.to_table(columns=columns, filter=reduce(or_, conditions)))
        return parts


def _condition(lot: Lot, low: str, high: str, lanes: bool) -> pc.Expression:
    condition = (
        (pc.field("site") == lot.sequence.name.site)
        & (pc.field("device") == lot.sequence.name.device)
        & (pc.field("epoch") == lot.sequence.epoch)
        & (pc.field(low) <= lot.last)
        & (pc.field(high) >= lot.first)
    )
    return condition & (pc.field("lane") == lot.sequence.lane) if lanes else condition


def _keys(table: pa.Table) -> list[tuple[str, ...]]:
    return list(zip(*(table[name].to_pylist() for name in _KEY), strict=True))


def _micros(at: object) -> int:
    """Microseconds since 1970 of an Arrow timestamp as Python gives it."""
    value = pa.scalar(at, pa.timestamp("us", tz="UTC")).cast(pa.int64()).as_py()
    return int(value or 0)


def _add(
    found: dict[Interval, Gap], first: int, last: int, reason: str, count: int, times: tuple[int, int]
) -> None:
    known = found.get((first, last))
    reasons = known.reasons if known is not None else {}
    found[first, last] = Gap(first, last, {**reasons, reason: count}, times)
