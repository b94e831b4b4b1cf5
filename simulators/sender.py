"""Which samples a sensor sends next: a window of unacknowledged samples, and what to repeat.

Pure: the state, an observation and the time go in; the new state and a range to send come out.
Sequence numbers are per topic and contiguous from 0. The receiver acknowledges the highest contiguous
one that is durable and does not process a number above the next it expects, so a repeat always starts
at the first unacknowledged sample (go-back-N).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

#: Seconds without progress after which the first unacknowledged sample is sent again.
RESEND_AFTER = 1.0


class Range(NamedTuple):
    """Samples `first..last`, both included, in one message."""

    first: int
    last: int


@dataclass(frozen=True)
class SenderState:
    """`next` is the sample to send next, `acked` the highest acknowledged (-1: none), `sent` the highest
    ever sent, `progress_at` (monotonic seconds) the last time that an ack moved or the window opened.
    """

    total: int
    next: int = 0
    acked: int = -1
    sent: int = -1
    progress_at: float = 0.0
    repeats: int = 0

    @property
    def done(self) -> bool:
        return self.acked == self.total - 1


def send(
    state: SenderState, now: float, *, released: int, batch: int, window: int
) -> tuple[SenderState, Range | None]:
    """The next message's range, None when there is nothing to send now.

    `released` samples exist so far on the event clock; at most `window` are unacknowledged at a time.
    """
    if state.sent > state.acked and now - state.progress_at >= RESEND_AFTER:
        state = rewind(state, now)
    first = state.next
    last = min(first + batch, released, state.total, state.acked + 1 + window) - 1
    if last < first:
        return state, None
    # The clock of the time-out starts with the first sample that waits, not with the last ack.
    waits = first > state.acked + 1
    return (
        replace(
            state,
            next=last + 1,
            sent=max(state.sent, last),
            progress_at=state.progress_at if waits else now,
        ),
        Range(first, last),
    )


def acknowledge(state: SenderState, seq: int, now: float) -> SenderState:
    """Take an ack for this epoch. One that goes back, or covers what was never sent, changes nothing."""
    if not state.acked < seq <= state.sent:
        return state
    return replace(state, acked=seq, next=max(state.next, seq + 1), progress_at=now)


def rewind(state: SenderState, now: float) -> SenderState:
    """Send again from the first unacknowledged sample: after a time-out or a reconnect."""
    if state.next == state.acked + 1:
        return state
    return replace(state, next=state.acked + 1, progress_at=now, repeats=state.repeats + 1)
