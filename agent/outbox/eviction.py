"""What an outbox gives up when its lanes hold more bytes than they may: pure decisions.

Bytes are budgeted. Which lane gives way says `relief`; how it does is a ladder of steps per lane, from the
finest to the coarsest:

    result, sample   keep every 4th row, every 16th, ... every 1024th, then lose the oldest
    trend            merge into windows of 10 minutes, then of an hour, then lose the oldest
    alarm            lose the oldest

A step goes through its lane from the oldest row on, so that the past gets coarser before the present does,
and the next step begins when all rows have had this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from edgeward.intervals import Interval, runs
from edgeward.wire.lanes import LanePolicy
from edgeward.wire.rows import GapReason, TrendRow
from edgeward.wire.topics import Lane

T = TypeVar("T")

#: What is freed beyond the need, as a share of the budget: else each new row would begin it again.
SLACK = 10
#: What a row and a gap record cost on the disk besides their data.
ROW_BYTES, GAP_BYTES = 24, 64

MINUTE_US = 60_000_000
STRIDES = (4, 16, 64, 256, 1024)
WIDTHS_US = (10 * MINUTE_US, 60 * MINUTE_US)


@dataclass(frozen=True)
class Thin:
    """Of the rows from `at` on, those whose number `stride` divides survive."""

    stride: int
    at: int


@dataclass(frozen=True)
class Merge:
    """Trend rows from `at` on become rows of buckets of `width` microseconds."""

    width: int
    at: int


@dataclass(frozen=True)
class DropOldest:
    """The oldest rows go as they are."""


Step = Thin | Merge | DropOldest


@dataclass(frozen=True)
class Degree:
    """How coarse a lane is: each row below `at` has had the step `level` of its ladder."""

    level: int = 0
    at: int = 0


def relief(used: Mapping[Lane, int], policies: Mapping[Lane, LanePolicy], *, begun: bool) -> Lane | None:
    """The lane that gives way next; None when all is well.

    Nothing does while all lanes together hold no more bytes than the sum of their budgets; once `begun`, it
    goes on to a tenth below. Lanes beyond their own budget come first, lowest priority first; then any lane
    that still holds something, and the one of the highest priority last of all.
    """
    limit = sum(policies[lane].bytes for lane in used)
    if sum(used.values()) <= (limit - limit // SLACK if begun else limit):
        return None
    order = sorted(used, key=lambda lane: (policies[lane].priority, lane))
    for lane in order[:-1]:
        own = policies[lane].bytes
        if used[lane] > own - own // SLACK:
            return lane
    return next((lane for lane in order if used[lane] > 0), None)


def step(lane: Lane, degree: Degree, next_seq: int) -> tuple[Degree, Step]:
    """What to do with a lane whose rows are numbered below `next_seq`, and its degree meanwhile.

    A coarse lane first makes its new rows as coarse; only when all are does it lose the oldest.
    """
    ladder: int = {"result": len(STRIDES), "sample": len(STRIDES), "trend": len(WIDTHS_US), "alarm": 0}[lane]
    if degree.at >= next_seq and degree.level < ladder - 1:
        degree = Degree(degree.level + 1, 0)
    if degree.at >= next_seq or ladder == 0:
        return degree, DropOldest()
    level = min(degree.level, ladder - 1)
    if lane == "trend":
        return degree, Merge(WIDTHS_US[level], degree.at)
    return degree, Thin(STRIDES[level], degree.at)


def thinned(numbers: Iterable[int], stride: int) -> list[int]:
    """Those of the sequence numbers that do not survive."""
    return [number for number in numbers if number % stride]


def mergeable(rows: Sequence[tuple[int, TrendRow]], width: int) -> list[list[tuple[int, TrendRow]]]:
    """Numbered rows that belong into one bucket of `width` microseconds: two or more of each.

    Only what describes the same series of the same model and stream in the same bins can be merged.
    """
    groups: dict[object, list[tuple[int, TrendRow]]] = {}
    for seq, row in rows:
        if row.width <= width:
            key = (
                row.bucket // width, row.stream, row.revision, row.digest, row.variant, row.provider,
                row.series, tuple(row.edges),
            )  # fmt: skip
            groups.setdefault(key, []).append((seq, row))
    return [group for group in groups.values() if len(group) > 1]


@dataclass(frozen=True)
class Tally:
    """Rows `first .. last` that are lost: the span of their event times (0: unknown), counts by reason."""

    first: int
    last: int
    first_event_time: int
    last_event_time: int
    reasons: dict[str, int]

    def __add__(self, other: Tally) -> Tally:
        """One record of two ranges that touch."""
        assert self.last + 1 == other.first, "only neighbours become one"
        known = [tally for tally in (self, other) if tally.last_event_time]
        reasons = dict(self.reasons)
        for reason, count in other.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
        return Tally(
            self.first,
            other.last,
            min((tally.first_event_time for tally in known), default=0),
            max((tally.last_event_time for tally in known), default=0),
            reasons,
        )


def tallies(times: Mapping[int, int], reason: GapReason) -> list[Tally]:
    """What is lost by sequence number and event time, as records: one for each run of numbers."""
    found = []
    for first, last in runs(sorted(times)):
        within = [times[seq] for seq in range(first, last + 1) if times[seq]]
        found.append(
            Tally(first, last, min(within, default=0), max(within, default=0), {reason: last - first + 1})
        )
    return found


def cut(tally: Tally, known: Iterable[Interval]) -> list[Tally]:
    """What is left of a record when the store has settled the intervals `known`.

    Counts by reason are shared out in proportion: which row was lost for which reason is not kept.
    """
    parts, first = [], tally.first
    for begin, end in known:
        if begin > tally.last:
            break
        if end < first:
            continue
        if first < begin:
            parts.append((first, begin - 1))
        first = end + 1
    if first <= tally.last:
        parts.append((first, tally.last))
    left = dict(tally.reasons)
    found = []
    for first, last in parts:
        taken = _take(left, last - first + 1)
        found.append(Tally(first, last, tally.first_event_time, tally.last_event_time, taken))
    return found


def _take(left: dict[str, int], count: int) -> dict[str, int]:
    """`count` of what is `left`, which shrinks by it."""
    total = sum(left.values())
    taken = {reason: number * count // total for reason, number in left.items()}
    for reason in sorted(left, key=lambda name: (taken[name] - left[name], name)):
        if sum(taken.values()) < count:
            taken[reason] += min(left[reason] - taken[reason], count - sum(taken.values()))
    for reason, number in taken.items():
        left[reason] -= number
    return {reason: number for reason, number in taken.items() if number}


def joined(records: Sequence[Tally], before: Tally | None, after: Tally | None) -> list[Tally]:
    """`records`, ascending, with neighbours that touch made one; `before` and `after` stand next to them.

    As many records as there are rows that survive, and one: their number is bounded by the budget.
    """
    found: list[Tally] = []
    for record in [*([before] if before else []), *records, *([after] if after else [])]:
        if found and found[-1].last + 1 == record.first:
            found[-1] = found[-1] + record
        else:
            found.append(record)
    return found


def weight(rows: Iterable[T], length: Callable[[T], int]) -> int:
    """What rows cost in bytes."""
    return sum(length(row) + ROW_BYTES for row in rows)
