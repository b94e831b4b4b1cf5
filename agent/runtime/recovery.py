"""When a lost worker is started again, and when its losses are a crash loop. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

#: Seconds before a restart after so many losses in a row; the last one holds from then on.
BACKOFF = (0.0, 0.1, 0.5, 2.0, 5.0, 15.0, 30.0)
#: So many losses within so many seconds are a crash loop; it ends after as long without one.
LOOP_LOSSES = 5
LOOP_SECONDS = 60.0


@dataclass(frozen=True)
class Losses:
    """`times` are the losses of the last LOOP_SECONDS, `in_row` those since the last answered request."""

    times: tuple[float, ...] = ()
    in_row: int = 0
    looping: bool = False


def lost(state: Losses, now: float) -> tuple[Losses, float, bool]:
    """After a loss: the state, seconds until the restart, and whether a crash loop has begun just now."""
    times = (*(at for at in state.times if now - at < LOOP_SECONDS), now)
    looping = len(times) >= LOOP_LOSSES
    delay = BACKOFF[min(state.in_row, len(BACKOFF) - 1)]
    return Losses(times, state.in_row + 1, looping or state.looping), delay, looping and not state.looping


def answered(state: Losses) -> Losses:
    """After a request was answered: the next restart need not wait."""
    return replace(state, in_row=0) if state.in_row else state


def quiet(state: Losses, now: float) -> tuple[Losses, bool]:
    """As time passes: the state, and whether a crash loop has ended just now."""
    if not state.looping or any(now - at < LOOP_SECONDS for at in state.times):
        return state, False
    return replace(state, times=(), looping=False), True
