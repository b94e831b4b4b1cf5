"""What to offer the central store next, and what its acks mean: pure decisions over settled numbers.

The central store's acks are taken at their word in both directions: what it has is not sent again, and what
it no longer has (it was restored from an older backup) is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from edgeward.intervals import Interval, missing, union
from edgeward.wire.rows import MAX_ACK_RANGES, Ack
from edgeward.wire.topics import LANES
from trends.read_back import Lot
from trends.sequence import SequenceId, Settled

#: Seconds after which a batch without an ack is sent again, at first and at most.
PATIENCE, MOST_PATIENCE = 5.0, 320.0
#: Seconds after which the newest row of a sequence that is all acknowledged is offered again: the answer says
#: whether the central store still has what it had.
DOUBT = 86_400.0


@dataclass(frozen=True)
class Flight:
    """Batches of one sequence without an ack: their numbers and when each is sent again (monotonic seconds).

    `patience` doubles while nothing is acknowledged, from `first` on.
    """

    spans: tuple[tuple[Interval, float], ...] = ()
    first: float = PATIENCE
    patience: float = 0.0

    def sent(self, span: Interval, now: float) -> Flight:
        return replace(self, spans=(*self.spans, (span, now + max(self.patience, self.first))))

    def at(self, now: float) -> Flight:
        """Without what is overdue."""
        left = tuple(each for each in self.spans if each[1] > now)
        late = len(left) < len(self.spans)
        patience = max(self.patience, self.first)
        return replace(self, spans=left, patience=min(patience * 2, MOST_PATIENCE) if late else patience)

    def acknowledged(self, settled: Settled) -> Flight:
        """Without what is settled, and without what was sent before that: it was overtaken or lost, and goes
        again at once (as in TCP's fast retransmit, RFC 5681)."""
        left: list[tuple[Interval, float]] = []
        for each in self.spans:
            left = [*left, each] if open_numbers(settled, each[0]) else []
        return replace(self, spans=tuple(left), patience=self.first)

    def numbers(self) -> list[Interval]:
        return [span for span, _ in self.spans]


def open_numbers(settled: Settled, span: Interval) -> list[Interval]:
    """The numbers of `span` that are not settled."""
    return missing(settled.above, max(span[0], settled.expected), span[1])


def settled_spans(settled: Settled) -> list[Interval]:
    return ([(0, settled.expected - 1)] if settled.expected else []) + settled.above


def pending(
    here: Settled, there: Settled | None, in_flight: Iterable[Interval], *, doubted: bool = False
) -> list[Interval]:
    """Numbers that are settled here, not known to be there, and not on their way; ascending.

    With `doubted`, and nothing else to send, the highest number that both have.
    """
    there = there if there is not None else Settled(0)
    flying = list(in_flight)
    found = [part for span in settled_spans(here) for part in open_numbers(there, span)]
    for span in flying:
        found = [part for begin, end in found for part in missing([span], begin, end)]
    if doubted and not found and not flying and (spans := settled_spans(here)):
        last = spans[-1][1]
        return [(last, last)]
    return found


def after_ack(known: Settled | None, ack: Ack) -> Settled:
    """What the central store has, by its newest ack. One that says less than is known counts, too.

    It may only have come late, or its store has lost rows: in either case they are offered again, and an ack
    says what is so.
    """
    said = Settled(ack.seq + 1)
    for first, last in ack.ranges:
        said = said.add(first, last)
    if known is not None and said.expected >= known.expected and len(ack.ranges) >= MAX_ACK_RANGES:
        # It names the highest ranges only: what is known of the others still counts.
        for first, last in known.above:
            said = said.add(first, last)
    return said


def choose(open_: Mapping[SequenceId, list[Interval]], room: int, start: int) -> list[Lot]:
    """Up to `room` lots: alarms first, then trends, results, samples; among devices in turn from `start` on."""
    order = ("alarm", "trend", *(lane for lane in LANES if lane not in ("alarm", "trend")))
    chosen: list[Lot] = []
    for lane in order:
        waiting = sorted((each for each in open_ if each.lane == lane and open_[each]), key=str)
        for index in range(len(waiting)):
            if len(chosen) >= room:
                return chosen
            sequence = waiting[(start + index) % len(waiting)]
            chosen.append(Lot(sequence, *open_[sequence][0]))
    return chosen


def cut(lot: Lot, gaps: Sequence[Interval], limit: int) -> Lot:
    """The beginning of a lot with at most `limit` numbers that are not in gaps (ascending)."""
    held: list[Interval] = []
    for gap in gaps:
        held = union(held, *gap)
    left = limit
    for first, last in missing(held, *lot.span):
        if last - first + 1 > left:
            # A gap that ends right before is in; the rest is for the next time.
            return lot._replace(last=first + left - 1) if left else lot._replace(last=first - 1)
        left -= last - first + 1
    return lot
