"""What to do with a batch, given what is settled already: a pure decision.

One (site, device, epoch, lane) is a sequence of rows numbered from 0. A number is settled when its row is
stored, or known to be lost. The settled numbers are kept as a floor, below which all are, and the intervals
above it: batches may come in any order, since a device sends fresh rows before its backlog.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from edgeward.identifiers import DeviceName
from edgeward.intervals import Interval, missing, union
from edgeward.wire.topics import Lane

#: A device that skips about must not grow this table without end; its lowest rows are always taken.
MAX_INTERVALS = 1024


class SequenceId(NamedTuple):
    """Which sequence of rows: one lane of one device's epoch."""

    name: DeviceName
    epoch: str
    lane: Lane


@dataclass(frozen=True)
class Settled:
    """`expected` is the lowest number that is not settled, `above` the settled intervals beyond it."""

    expected: int
    above: list[Interval] = field(default_factory=list)

    def add(self, first: int, last: int) -> Settled:
        above = union(self.above, first, last) if last >= self.expected else self.above
        if above and above[0][0] <= self.expected:
            return Settled(max(self.expected, above[0][1] + 1), above[1:])
        return Settled(self.expected, above)


@dataclass(frozen=True)
class Decision:
    """`take` are the intervals of the batch that are new, `after` what is settled with them.

    `lost` are intervals that neither the device nor the store holds any more: the device was told that they
    are stored, so the store has lost them (restored from an old backup, say). `ahead`: nothing is taken, the
    device shall send what lies before.
    """

    verdict: Literal["take", "duplicate", "ahead"]
    after: Settled
    take: list[Interval] = field(default_factory=list)
    lost: list[Interval] = field(default_factory=list)


def decide(known: Settled | None, first_seq: int, count: int, floor: int) -> Decision:
    """Take what is new of `count` rows from `first_seq` on.

    A store without memory of the epoch (None) starts at the device's `floor`; what is not settled below the
    floor of one that it knows is recorded as its loss.
    """
    lost: list[Interval] = []
    after = known if known is not None else Settled(floor)
    if after.expected < floor:
        lost = missing(after.above, after.expected, floor - 1)
        after = after.add(after.expected, floor - 1)
    last = first_seq + count - 1
    take = missing(after.above, max(first_seq, after.expected), last)
    if not take:
        return Decision("duplicate", after, lost=lost)
    taken = after.add(first_seq, last)
    if len(taken.above) > MAX_INTERVALS:
        return Decision("ahead", after, lost=lost)
    return Decision("take", taken, take, lost)
