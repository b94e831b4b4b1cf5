"""Exactly once from a numbering sensor: take what follows, drop repeats and what lies beyond a hole."""

from __future__ import annotations

import numpy as np

from agent.streams.samples import Samples

Position = tuple[str, int]


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
