"""What time it may be: signed evidence bounds it, the machine's own clock only fills in between.

Boards without a battery boot in 1970, and a real-time clock may be ten years ahead. So the wall clock
proves nothing and never moves the floor. What does is signed: the times in desired states, certificates
and the release metadata's timestamp prove that a moment has passed. Recorded ones may be replayed, so they
prove nothing about how much later it is. The controller's answer to a question of this very process
(`edgeward/wire/signed_time.py`) bounds the time from both sides. Only such an answer may take the floor
back: that is the way out when the evidence itself was signed by a controller whose clock ran ahead.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from dataclasses import dataclass, replace
from typing import Protocol

from edgeward.clock import Clock

log = logging.getLogger(__name__)

#: How far a healthy wall clock may be from the controller's, in seconds.
TOLERANCE = 60.0
#: The most that a quartz in the heat runs wrong, as a share.
DRIFT = 200e-6
ASK_EVERY = 3600.0
#: The floor also rises by the time that this process runs; how far before that is written down.
KEEP_EVERY = 3600.0
#: How long after its start a device without an answer goes by its own clock to open a window.
PATIENCE = 60.0
#: The end of year 9999: later times fit no calendar, and so are no times.
LATEST = 253402300799.0


@dataclass(frozen=True)
class Knowledge:
    """What is proven at monotonic time `at`: it is `low` or later, and `high` or earlier.

    `high` is None until an answer bounds it. `offset` is wall minus monotonic time at the last answer,
    `answered` the monotonic time of that answer.
    """

    low: float
    at: float
    high: float | None = None
    offset: float = 0.0
    answered: float = 0.0


@dataclass(frozen=True)
class Moment:
    """The time as far as it is known: `now` to go by, `proven` at the earliest (seconds since 1970).

    Without `known`, `now` may be any later time: the machine's clock is refuted, or the controller has not been
    asked yet.
    """

    now: float
    known: bool = True
    proven: float = 0.0


def lower(known: Knowledge, monotonic: float) -> float:
    """The earliest time that it can be now."""
    return known.low + (monotonic - known.at) * (1 - DRIFT)


def upper(known: Knowledge, monotonic: float) -> float | None:
    """The latest time that it can be now; None when nothing says so."""
    return None if known.high is None else known.high + (monotonic - known.at) * (1 + DRIFT)


def read(known: Knowledge, wall: float, monotonic: float) -> float:
    """The time to go by: the wall clock's where evidence allows it, else the earliest possible."""
    low, high = lower(known, monotonic), upper(known, monotonic)
    return wall if low <= wall and (high is None or wall <= high) else low


def learn(known: Knowledge, at: float, monotonic: float) -> Knowledge:
    """A trusted key has signed at time `at`: that has passed. It cannot say how long ago."""
    low, high = lower(known, monotonic), upper(known, monotonic)
    if not low < at <= LATEST:
        return known
    if high is None or at > high:  # the answer is refuted, by a suspended machine for example
        return Knowledge(at, monotonic)
    return replace(known, low=at, at=monotonic, high=high)


def answer(known: Knowledge, at: float, asked: float, wall: float, monotonic: float) -> Knowledge:
    """The controller signed `at` between `asked` and `monotonic`: the newest word, also when it is less."""
    if not 0 <= at <= LATEST:
        return known
    low = lower(known, monotonic)
    if at < low <= at + TOLERANCE:  # two replicas of a controller differ by that much
        at = low
    high = at + max(0.0, monotonic - asked) + TOLERANCE
    return Knowledge(at, monotonic, high, wall - monotonic, monotonic)


def should_ask(known: Knowledge, wall: float, monotonic: float) -> bool:
    """Without an answer, an hour after the last one, or when the wall clock has jumped since."""
    if known.high is None or monotonic - known.answered >= ASK_EVERY:
        return True
    jumped = abs(wall - monotonic - known.offset)
    return jumped > TOLERANCE + (monotonic - known.answered) * DRIFT


class Floor(Protocol):
    """Where the floor outlives this process: `agent.state.State`."""

    def time_floor(self) -> float: ...

    def keep_time_floor(self, at: float) -> None: ...


class TrustedClock:
    """A Clock for everything that judges an expiry or states a time. Thread-safe."""

    def __init__(self, clock: Clock, floor: Floor) -> None:
        self._clock = clock
        self._floor = floor
        self._lock = threading.Lock()
        self._kept = floor.time_floor()
        self._known = Knowledge(self._kept, clock.monotonic())
        self._started = clock.monotonic()

    def now(self) -> float:
        return read(self._known, self._clock.now(), self._clock.monotonic())

    def wrong(self) -> bool:
        """Whether evidence says that the machine's clock is not to be gone by."""
        wall = self._clock.now()
        return read(self._known, wall, self._clock.monotonic()) != wall

    def moment(self) -> Moment:
        """For what must not happen too early. A wall clock that runs ahead is noticed by the controller's
        answer only: it has a minute to give one before that clock is believed."""
        known, wall, monotonic = self._known, self._clock.now(), self._clock.monotonic()
        low = lower(known, monotonic)
        alone = low <= wall and monotonic - self._started >= PATIENCE
        return Moment(read(known, wall, monotonic), known.high is not None or alone, low)

    def monotonic(self) -> float:
        return self._clock.monotonic()

    def monotonic_ns(self) -> int:
        return self._clock.monotonic_ns()

    def learn(self, at: float) -> None:
        """Take in a time out of something that a trusted key signed and whose signature was checked."""
        with self._lock:
            self._known = learn(self._known, at, self._clock.monotonic())
            self._keep(1.0)

    def answered(self, at: float, asked: float) -> None:
        """Take in the controller's signed answer to a question put at monotonic time `asked`."""
        with self._lock:
            wall, monotonic = self._clock.now(), self._clock.monotonic()
            before = lower(self._known, monotonic)
            self._known = answer(self._known, at, asked, wall, monotonic)
            if self._known.low < before:
                log.warning("the controller takes %.0f s of proven time back", before - self._known.low)
            if abs(wall - at) > TOLERANCE + monotonic - asked:
                log.warning("this machine's clock is wrong by %.0f s", wall - at)
            self._keep(1.0)

    def should_ask(self) -> bool:
        """Whether the controller should be asked for the time."""
        return should_ask(self._known, self._clock.now(), self._clock.monotonic())

    def keep(self) -> None:
        """Write down now and then how far the floor has come; for a caller that comes by every minute."""
        with self._lock:
            self._keep(KEEP_EVERY)

    def _keep(self, step: float) -> None:
        low = lower(self._known, self._clock.monotonic())
        if self._kept <= low < self._kept + step:
            return
        try:
            self._floor.keep_time_floor(low)
            self._kept = float(int(low))
        except sqlite3.Error as error:  # a full disk: the floor holds in memory and is tried again
            log.warning("the time floor cannot be written: %s", error)
