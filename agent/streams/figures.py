"""What a stream counts between two reports."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

import numpy as np

#: What a report has fields for; the rest goes under `other`.
KNOWN = ("rows", "predicted", "late", "alarms", "bad", "rejected", "dropped", "errors")


@dataclass(frozen=True)
class Taken:
    """`latency_ms` holds p50 and p95 of one inference call, empty without any."""

    counts: Counter[str]
    score_mean: float | None
    latency_ms: dict[str, float]

    @property
    def other(self) -> dict[str, int]:
        return {name: number for name, number in self.counts.items() if name not in KNOWN}


class Figures:
    """Counted from the source's threads and the stream's, taken by the daemon's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._score_sum = 0.0
        self._scores = 0
        self._latencies: list[float] = []

    def count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self._counts[what] += number

    def add(self, counts: dict[str, int], score_sum: float, scores: int, latency_ms: float) -> None:
        """One inference: `scores` values of the decision's output with their sum."""
        with self._lock:
            self._counts.update(counts)
            self._score_sum += score_sum
            self._scores += scores
            self._latencies.append(latency_ms)

    def take(self) -> Taken:
        """Since the last time."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            mean = self._score_sum / self._scores if self._scores else None
            self._score_sum, self._scores = 0.0, 0
            latencies, self._latencies = self._latencies, []
        latency = {}
        if latencies:
            p50, p95 = np.percentile(latencies, [50, 95]).tolist()
            latency = {"p50": p50, "p95": p95}
        return Taken(counts, mean, latency)
