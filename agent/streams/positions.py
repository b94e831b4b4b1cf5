"""How far a numbering source may be told that its samples are durable. Pure."""

from __future__ import annotations

from collections import deque

from agent.streams.decode.sequence import Position
from agent.streams.samples import Samples


class Positions:
    """Counts samples in the order of their arrival; `at` gives the position of the first so many."""

    def __init__(self) -> None:
        self._batches: deque[tuple[int, Samples]] = deque()
        self._added = 0
        self._reached = 0

    def add(self, samples: Samples) -> None:
        """Samples of one epoch, numbered without a hole."""
        if len(samples):
            self._batches.append((self._added, samples))
            self._added += len(samples)

    def at(self, settled: int) -> Position | None:
        """The position after the first `settled` samples; None when it was given before."""
        position: Position | None = None
        if settled <= self._reached:
            return None
        self._reached = settled
        while self._batches:
            start, samples = self._batches[0]
            count = min(settled - start, len(samples))
            if count > 0 and samples.seq is not None:
                position = (samples.epoch, int(samples.seq[count - 1]))
            if count < len(samples):
                break
            self._batches.popleft()
        return position
