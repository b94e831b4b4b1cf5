"""How many may download at once, for how long, and when the others shall ask again.

`Pace` and `retry_after` decide; `Downloads` counts. Nothing here does I/O.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edgeward.clock import Clock
from edgeward.errors import Unavailable

RETRY_MAX = 300.0
#: Above this many waiting the estimate is at RETRY_MAX anyway.
_REMEMBERED = 10_000
#: Weight of the newest download in the running mean of their duration.
_WEIGHT = 0.2


@dataclass(frozen=True)
class Limits:
    """`downloads` at once, `per_holder` of them for one device or person.

    A download whose reader takes less than `minimum_rate` bytes/s over `window` seconds, or that lasts
    longer than `deadline` seconds, is cut off: it can go on later from where it was (Range).
    One that runs elsewhere counts for as long as it takes at `reserved_rate` bytes/s, within the two bounds
    in seconds.
    """

    downloads: int = 32
    per_holder: int = 2
    reserved_rate: float = 4e6
    reserved_least: float = 1.0
    reserved_most: float = 60.0
    minimum_rate: float = 512.0
    window: float = 30.0
    deadline: float = 3600.0


class Busy(Unavailable):
    """All slots are taken: 503 with Retry-After."""


@dataclass
class Pace:
    """Judges one download by what its reader has taken. Times in monotonic seconds."""

    limits: Limits
    started: float

    def __post_init__(self) -> None:
        self._mark, self._marked = self.started, 0

    def problem(self, now: float, taken: int) -> str:
        """Why a download of which `taken` bytes have reached the reader must end now; empty if it need not."""
        limits = self.limits
        if now - self.started > limits.deadline:
            return f"not finished within {limits.deadline:.0f} s"
        if now - self._mark >= limits.window:
            rate = (taken - self._marked) / (now - self._mark)
            if rate < limits.minimum_rate:
                return (
                    f"its reader took {rate:.0f} B/s over {limits.window:.0f} s,"
                    f" at least {limits.minimum_rate:.0f} B/s are needed"
                )
            self._mark, self._marked = now, taken
        return ""


def reserved_seconds(limits: Limits, size: int) -> float:
    """How long a download of `size` bytes that runs elsewhere counts as running."""
    return min(max(size / limits.reserved_rate, limits.reserved_least), limits.reserved_most)


def retry_after(mean: float, ahead: int, slots: int, draw: float) -> float:
    """Whole seconds until it is the turn of one who has `ahead` others before them at `slots` slots.

    `mean` is what a download takes. `draw` in [0, 1) spreads the answer over half to one and a half of the
    estimate, so that those refused together do not come back together.
    """
    turn = mean * (1 + ahead / slots)
    return float(math.ceil(min(max(turn * (0.5 + draw), 1.0), RETRY_MAX)))


class Downloads:
    """The slots. Belongs to one event loop: no call may come from another thread."""

    def __init__(self, limits: Limits, clock: Clock, draw: Callable[[], float] = random.random) -> None:
        self.limits = limits
        self._clock = clock
        self._draw = draw
        self._open: Counter[str] = Counter()
        #: Holder and end of the downloads that run elsewhere, in the order in which they began.
        self._reserved: list[tuple[str, float]] = []
        self._mean = 1.0
        #: When those that were sent away will come again (a heap).
        self._coming: list[float] = []

    @property
    def open(self) -> int:
        """How many run now."""
        return self._open.total()

    @contextmanager
    def slot(self, holder: str) -> Iterator[None]:
        """A slot for the block, of `holder` (a device, a person). Raises Busy, with `retry_after`."""
        self._admit(holder)
        self._open[holder] += 1
        began = self._clock.monotonic()
        try:
            yield
        finally:
            self._open -= Counter({holder: 1})  # drops a count of 0, too
            self._mean += _WEIGHT * (self._clock.monotonic() - began - self._mean)

    def reserve(self, holder: str, size: int) -> None:
        """A slot for a download elsewhere, whose end nobody tells: it ends by itself after `reserved_seconds`.

        Where the holder has as many as it may have, or there is no slot left, its oldest one ends instead: who
        asks again has finished or lost it. Raises Busy when the slots are taken by others.
        """
        self._admit(holder)
        seconds = reserved_seconds(self.limits, size)
        self._open[holder] += 1
        self._reserved.append((holder, self._clock.monotonic() + seconds))
        self._mean += _WEIGHT * (seconds - self._mean)

    def _release(self, at: int) -> None:
        self._open -= Counter({self._reserved.pop(at)[0]: 1})

    def _end_reserved(self, now: float, holder: str) -> None:
        for at in reversed(range(len(self._reserved))):
            if self._reserved[at][1] <= now:
                self._release(at)
        if self._open[holder] >= self.limits.per_holder or self.open >= self.limits.downloads:
            mine = next((at for at, (who, _) in enumerate(self._reserved) if who == holder), None)
            if mine is not None:
                self._release(mine)

    def _admit(self, holder: str) -> None:
        limits, now = self.limits, self._clock.monotonic()
        self._end_reserved(now, holder)
        if self._open[holder] >= limits.per_holder:
            raise Busy(
                f"{holder} has {limits.per_holder} downloads running already",
                hint="wait for one of them",
                retry_after=retry_after(self._mean, 0, limits.downloads, self._draw()),
            )
        while self._coming and self._coming[0] <= now:
            heapq.heappop(self._coming)
        if self.open < limits.downloads:
            return
        wait = retry_after(self._mean, len(self._coming), limits.downloads, self._draw())
        if len(self._coming) < _REMEMBERED:
            heapq.heappush(self._coming, now + wait)
        raise Busy(
            f"{limits.downloads} downloads are running, which is the limit",
            hint=f"try again in {wait:.0f} s",
            retry_after=wait,
        )
