"""Which results go up. Pure; alarms and what could not be predicted always do."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from edgeward.wire.package import Decision
from edgeward.wire.streams import Publish

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
T = TypeVar("T")

#: Keys whose last result is remembered; beyond, the oldest one starts anew.
MAX_KEYS = 10_000


class Selection:
    """A stream's policy with what it has to remember, per key."""

    def __init__(self, spec: Publish, decision: Decision | None) -> None:
        self._spec = spec
        self._decision = decision
        self._counts: dict[str, int] = {}
        self._last: dict[str, tuple[float, ...]] = {}

    def choose(self, keys: tuple[str, ...], outputs: dict[str, Floats], alarms: Bools) -> Bools:
        """Which of `n` results are published. `keys` has one text per result, or is empty."""
        count = len(alarms)
        match self._spec.results:
            case "all":
                return np.ones(count, np.bool_)
            case "none":
                return np.zeros(count, np.bool_)
            case "every":
                return self._every(keys, count)
            case "uncertain":
                return self._uncertain(outputs, count)
            case _:
                return self._changes(keys, outputs, alarms)

    def _every(self, keys: tuple[str, ...], count: int) -> Bools:
        every = self._spec.every
        if not keys:
            first = self._counts.get("", 0)
            self._counts[""] = (first + count) % every
            due: Bools = np.arange(first, first + count) % every == 0
            return due
        chosen = np.zeros(count, np.bool_)
        for index, key in enumerate(keys):
            number = self._counts.get(key, 0)
            chosen[index] = number == 0
            _remember(self._counts, key, (number + 1) % every)
        return chosen

    def _uncertain(self, outputs: dict[str, Floats], count: int) -> Bools:
        if self._decision is None or self._decision.output not in outputs:
            return np.ones(count, np.bool_)  # without a threshold nothing is certain
        distance: Floats = np.abs(outputs[self._decision.output] - self._decision.threshold)
        uncertain: Bools = np.logical_not(distance > self._spec.margin)
        return uncertain

    def _changes(self, keys: tuple[str, ...], outputs: dict[str, Floats], alarms: Bools) -> Bools:
        """Against the last published one, so that a slow drift is not lost in small steps."""
        chosen = np.zeros(len(alarms), np.bool_)
        columns = [values.tolist() for values in outputs.values()]
        tolerance = self._spec.tolerance
        for index, alarm in enumerate(alarms.tolist()):
            key = keys[index] if keys else ""
            now = (float(alarm), *(column[index] for column in columns))
            last = self._last.get(key)
            same = (
                last is not None
                and len(last) == len(now)
                and last[0] == now[0]
                and all(abs(one - other) <= tolerance for one, other in zip(last[1:], now[1:], strict=True))
            )
            if not same:
                chosen[index] = True
                _remember(self._last, key, now)
        return chosen


def _remember(table: dict[str, T], key: str, value: T) -> None:
    if key not in table and len(table) >= MAX_KEYS:
        del table[next(iter(table))]
    table[key] = value
