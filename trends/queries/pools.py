"""Many KLL sketches merged in bounded memory, and histograms added up. Pure.

A pool keeps values with weights. Beyond LIMIT of them they are summed up as POINTS values of equal weight,
each the middle one of its share of ranks, which moves a rank by at most 1 / (2 * POINTS); parts that were
summed up are joined two by two (like digits that carry), so that 2^j of them move it by j + 1 times that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trends.quantiles import read_sketch

LIMIT = 1 << 15
POINTS = 1 << 12

Weighted = list[tuple[float, int]]


def summed_up(items: Weighted, points: int = POINTS) -> Weighted:
    """At most `points` values for `items`, with the same total weight."""
    items.sort()
    total = sum(weight for _, weight in items)
    made: Weighted = []
    place, passed = 0, items[0][1] if items else 0
    for index in range(points):
        low, high = total * index // points, total * (index + 1) // points
        if low == high:
            continue
        middle = (low + high) // 2
        while passed <= middle:
            place += 1
            passed += items[place][1]
        made.append((items[place][0], high - low))
    return made


class Pool:
    """The merged sketches of one group. Small ones merge exactly, whatever their order."""

    def __init__(self) -> None:
        self._items: Weighted = []
        self._levels: list[Weighted | None] = []
        self._total = 0
        self.known = True
        """False once a part had values and no sketch of as many: quantiles of the others would mislead."""

    def add(self, count: int, sketch: bytes | None) -> None:
        if not self.known or count == 0:
            return
        weighted = read_sketch(sketch or b"")
        if weighted is None or sum(weight for _, weight in weighted) != count:
            self._forget()
            return
        self._total += count
        self._items += weighted
        if len(self._items) >= LIMIT:
            self._carry(summed_up(self._items), 0)
            self._items = []

    def merge(self, other: Pool) -> None:
        if not (self.known and other.known):
            self._forget()
            return
        self._total += other._total
        for level, items in enumerate(other._levels):
            if items is not None:
                self._carry(items, level)
        self._items += other._items
        if len(self._items) >= LIMIT:
            self._carry(summed_up(self._items), 0)
            self._items = []

    def _forget(self) -> None:
        self.known, self._items, self._levels = False, [], []

    def _carry(self, items: Weighted, level: int) -> None:
        self._levels += [None] * (level + 1 - len(self._levels))
        while (held := self._levels[level]) is not None:
            items, self._levels[level] = summed_up(held + items), None
            level += 1
            if level == len(self._levels):
                self._levels.append(None)
        self._levels[level] = items

    def quantiles(self, at: Sequence[float]) -> list[float | None]:
        """The smallest value below or at which the share `at` lies, for each; None where that is not known."""
        pooled = [*self._items, *(item for level in self._levels for item in level or ())]
        if not self.known or not pooled:
            return [None] * len(at)
        pooled.sort()
        found: dict[float, float] = {}
        waiting = sorted(set(at))
        passed = 0
        for value, weight in pooled:
            passed += weight
            while len(found) < len(waiting) and passed >= max(
                1, math.ceil(waiting[len(found)] * self._total)
            ):
                found[waiting[len(found)]] = value
        return [found[point] for point in at]


class Histogram:
    """Counts per bin, added up as long as all parts have the same edges."""

    def __init__(self) -> None:
        self.edges: list[float] | None = None
        self.counts: list[int] = []
        self.known = True

    def add(self, edges: list[float] | None, counts: list[int] | None) -> None:
        edges, counts = edges or [], counts or []
        if not self.known:
            return
        if len(counts) != len(edges) + 1 or (self.edges is not None and edges != self.edges):
            self.known, self.edges, self.counts = False, None, []
        elif self.edges is None:
            self.edges, self.counts = edges, list(counts)
        else:
            self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]

    def merge(self, other: Histogram) -> None:
        if not other.known:
            self.known, self.edges, self.counts = False, None, []
        elif other.edges is not None:
            self.add(other.edges, other.counts)


class Details:
    """What SQL does not merge, of one group."""

    def __init__(self) -> None:
        self.pool = Pool()
        self.histogram = Histogram()

    def merge(self, other: Details) -> None:
        self.pool.merge(other.pool)
        self.histogram.merge(other.histogram)
