"""Exactly once from a numbering sensor: take what follows, drop repeats and what lies beyond a hole."""

from __future__ import annotations

import numpy as np

from agent.streams.samples import Samples

Position = tuple[str, int]

_MAX_BEGINS = 10_000


class Joining:
    """Where to begin with a sensor's numbers when the stream is newer than the sensor's epoch.

    The sensor repeats what is not acknowledged, so the number that a message begins with for a second time
    is the oldest it still has. Until then what does not begin at 0 is left to be repeated: number 0 may
    only be late.
    """

    def __init__(self) -> None:
        self._epoch = ""
        self._begins: set[int] = set()

    def position(self, samples: Samples, position: Position | None) -> Position | None:
        """The position to go on from, for samples `[n]` with n > 0 of one epoch."""
        assert samples.seq is not None
        first = int(samples.seq[0])
        joined = first == 0 or (position is not None and position[0] == samples.epoch)
        if joined or samples.epoch != self._epoch or len(self._begins) >= _MAX_BEGINS:
            self._epoch = samples.epoch
            self._begins.clear()
        if joined:
            return position
        if first in self._begins:
            return samples.epoch, first - 1
        self._begins.add(first)
        return position


def continue_sequence(samples: Samples, position: Position | None) -> tuple[Samples, Position | None]:
    """Of numbered samples of one epoch, those that follow `position` without a hole, and the position after.

    Repeats are dropped, and so is what lies beyond a hole: the sensor sends again in order. A new
    epoch starts at 0.
    """
    assert samples.seq is not None
    expected = position[1] + 1 if position is not None and position[0] == samples.epoch else 0
    count = len(samples)
    if np.array_equal(samples.seq, np.arange(expected, expected + count)):
        return samples, (samples.epoch, expected + count - 1) if count else position
    taken: list[int] = []
    for index, seq in enumerate(samples.seq.tolist()):
        if seq == expected:
            taken.append(index)
            expected += 1
    if not taken:
        return samples.take(np.array([], dtype=np.intp)), position
    return samples.take(np.array(taken, dtype=np.intp)), (samples.epoch, expected - 1)
