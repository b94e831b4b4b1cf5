"""The loop of a source that asks a device for one sample every interval."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from agent.streams.decode.columns import arrival, keep_finite
from agent.streams.samples import Samples
from edgeward.clock import Clock
from edgeward.errors import InvalidDocument

log = logging.getLogger(__name__)


def one_sample(values: Sequence[float], features: Sequence[str], now: float, problem: str = "") -> Samples:
    """A sample of the readings at `now` (seconds since 1970), NaN where one is missing."""
    matrix: npt.NDArray[np.float64] = np.array([values], dtype=np.float64)
    problems = {0: problem} if problem else {}
    keep_finite(matrix, features, problems)
    return Samples(np.array([arrival(now)]), matrix, problems=problems)


class Pace:
    """When the next sample is due. Turns that were missed are left out, not made up for."""

    def __init__(self, clock: Clock, interval: float) -> None:
        self._clock = clock
        self._interval = interval
        self._due = clock.monotonic()

    def next(self) -> float:
        """Seconds until the next turn."""
        now = self._clock.monotonic()
        self._due = max(self._due + self._interval, now)
        return self._due - now


def check_features(features: Sequence[str], given: Sequence[str], field: str) -> None:
    """Raises InvalidDocument for a feature that the source says nothing about."""
    for name in features:
        if name not in given:
            raise InvalidDocument("missing for a feature of the stream", field=f"{field}.{name}")


class Reported:
    """Logs a failure once until it changes or ends, so that a day without a device is not a day of log lines."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._last = ""

    def failed(self, reason: str) -> None:
        if reason != self._last:
            log.warning("%s: %s", self._what, reason)
        self._last = reason

    def works(self) -> None:
        if self._last:
            log.info("%s: works again", self._what)
        self._last = ""


def start_thread(name: str, work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread
