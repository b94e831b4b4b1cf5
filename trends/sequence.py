"""What to do with a batch, given what is stored already: a pure decision.

One (site, device, epoch, lane) is a sequence of rows numbered from 0. `expected` is the lowest number
that is not stored, None when the epoch was never seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Decision:
    """`take` of the batch's rows are new, from index `skip`; `expected` is the next number afterwards.

    `lost` is a range (first, last) that neither the device nor the store holds any more: the device
    was told that it is stored, so the store has lost it (restored from an old backup, say).
    """

    verdict: Literal["take", "duplicate", "ahead"]
    expected: int | None
    skip: int = 0
    take: int = 0
    lost: tuple[int, int] | None = None


def decide(expected: int | None, first_seq: int, count: int, floor: int) -> Decision:
    """Continue the sequence, or not.

    A store without memory of the epoch starts at the device's floor; so does one that expects less
    than the floor, which is recorded as a loss. A batch further ahead waits for those before it: the
    device sends again from its lowest unacknowledged row.
    """
    lost: tuple[int, int] | None = None
    start = expected
    if start is None:
        start = floor
    elif start < floor:
        lost = (start, floor - 1)
        start = floor
    end = first_seq + count
    if first_seq > start:
        return Decision("ahead", start if lost else expected, lost=lost)
    if end <= start:
        return Decision("duplicate", start, lost=lost)
    skip = start - first_seq
    return Decision("take", end, skip, count - skip, lost)
