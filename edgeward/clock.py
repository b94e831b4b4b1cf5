"""Time is an input: the only module that reads the machine's clocks."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of time.

    `now` is wall-clock time in seconds since 1970-01-01T00:00Z; it may jump.
    `monotonic` is seconds since an arbitrary start, `monotonic_ns` the same in nanoseconds; it never goes
    back.
    """

    def now(self) -> float: ...

    def monotonic(self) -> float: ...

    def monotonic_ns(self) -> int: ...


class SystemClock:
    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()


class ManualClock:
    """A clock that moves only when told to; for tests and simulations."""

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self._now = start
        self._monotonic = 0.0

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def monotonic_ns(self) -> int:
        return int(self._monotonic * 1e9)

    def advance(self, seconds: float) -> None:
        self._now += seconds
        self._monotonic += max(0.0, seconds)

    def set_wall(self, at: float) -> None:
        """Let the wall clock jump, as a dead battery, a wrong hand or NTP does; monotonic time stays."""
        self._now = at
