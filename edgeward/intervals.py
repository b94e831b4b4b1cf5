"""Sets of whole numbers as sorted, disjoint, closed intervals that do not touch: pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

Interval = tuple[int, int]


def _end(interval: Interval) -> int:
    return interval[1]


def _begin(interval: Interval) -> int:
    return interval[0]


def union(known: list[Interval], first: int, last: int) -> list[Interval]:
    """`known` with `first .. last` added."""
    # Neighbours that touch become one, hence the -1 and +1.
    low = bisect_left(known, first - 1, key=_end)
    high = bisect_right(known, last + 1, key=_begin)
    if low < high:
        first, last = min(first, known[low][0]), max(last, known[high - 1][1])
    return [*known[:low], (first, last), *known[high:]]


def missing(known: list[Interval], first: int, last: int) -> list[Interval]:
    """The parts of `first .. last` that are not in `known`."""
    parts: list[Interval] = []
    for begin, end in known[bisect_left(known, first, key=_end) :]:
        if begin > last:
            break
        if first < begin:
            parts.append((first, begin - 1))
        first = end + 1
    if first <= last:
        parts.append((first, last))
    return parts


def runs(numbers: Iterable[int]) -> list[Interval]:
    """Ascending numbers as intervals."""
    found: list[Interval] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def size(intervals: Iterable[Interval]) -> int:
    """How many numbers there are in disjoint intervals."""
    return sum(last - first + 1 for first, last in intervals)


def contains(intervals: list[Interval], number: int) -> bool:
    index = bisect_left(intervals, number, key=_end)
    return index < len(intervals) and intervals[index][0] <= number


def clip(intervals: list[Interval], first: int, last: int) -> list[Interval]:
    """The parts of `first .. last` that are in `intervals`."""
    parts: list[Interval] = []
    for begin, end in intervals[bisect_left(intervals, first, key=_end) :]:
        if begin > last:
            break
        parts.append((max(begin, first), min(end, last)))
    return parts
