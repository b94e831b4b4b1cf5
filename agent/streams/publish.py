"""Which results go up, besides alarms."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from agent.streams.keys import Recent, groups
from edgeward.wire.package import Decision
from edgeward.wire.streams import Publish

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Column = npt.NDArray[np.floating] | npt.NDArray[np.integer]


class Selection:
    """The choice of one stream, per key where samples have keys; state goes over calls.

    `every`: the first result and each `every`-th after it. `changes`: the first result, one whose alarm
    differs from the one before, and one of which an output is more than `tolerance` away from the last
    result chosen (so a slow drift is seen); an output that appears, disappears or becomes not-a-number or
    a number counts as a change. `uncertain`: the decision's output lies within `margin` of its threshold
    or is not a number; without a decision nothing is certain, and every result is chosen. `disagreeing`: none
    here, see `agent.streams.disagreeing`.

    `tolerance` and `margin` include their limit: a difference of exactly `tolerance` is no change, one of
    exactly `margin` is uncertain. Of at most MAX_KEYS keys the state is remembered.
    """

    def __init__(self, spec: Publish, decision: Decision | None) -> None:
        self._spec = spec
        self._decision = decision
        self._since: Recent[int] = Recent()  # results since the last chosen one
        self._last: Recent[tuple[Floats, bool]] = Recent()
        self._names: tuple[str, ...] = ()

    def choose(self, keys: tuple[str, ...], outputs: Mapping[str, Column], alarms: Bools) -> Bools:
        """For each of n results, in their order, whether it goes up: bool `[n]`.

        `keys` has n texts or is empty, `outputs` has a column `[n]` of numbers for each output and `alarms`
        is `[n]`.
        """
        count = len(alarms)
        match self._spec.results:
            case "all":
                return np.ones(count, np.bool_)
            case "none" | "disagreeing":  # whether a shadow disagrees is known later
                return np.zeros(count, np.bool_)
            case "uncertain":
                return self._uncertain(outputs, count)
            case "every":
                return self._every(keys, count)
            case "changes":
                return self._changes(keys, outputs, alarms)

    def _uncertain(self, outputs: Mapping[str, Column], count: int) -> Bools:
        if self._decision is None or self._decision.output not in outputs:
            return np.ones(count, np.bool_)
        distance = np.abs(np.asarray(outputs[self._decision.output], np.float64) - self._decision.threshold)
        return np.asarray(~(distance > self._spec.margin))

    def _every(self, keys: tuple[str, ...], count: int) -> Bools:
        every, chosen = self._spec.every, np.zeros(count, np.bool_)
        for key, where in groups(keys, count):
            place = self._since.get(key, 0)
            rows = count if where is None else len(where)
            taken = (np.arange(place, place + rows) % every) == 0
            chosen[slice(None) if where is None else where] = taken
            self._since[key] = (place + rows) % every
        return chosen

    def _changes(self, keys: tuple[str, ...], outputs: Mapping[str, Column], alarms: Bools) -> Bools:
        names = tuple(sorted(outputs))
        if names != self._names:  # another model: nothing can be compared
            self._names = names
            self._last.clear()
        count = len(alarms)
        matrix = np.empty((count, len(names)))
        for index, name in enumerate(names):
            matrix[:, index] = outputs[name]
        chosen = np.zeros(count, np.bool_)
        for key, where in groups(keys, count):
            part, flags = (matrix, alarms) if where is None else (matrix[where], alarms[where])
            chosen[slice(None) if where is None else where] = self._changed(key, part, flags)
        return chosen

    def _changed(self, key: str, matrix: Floats, alarms: Bools) -> Bools:
        tolerance, count = self._spec.tolerance, len(alarms)
        level, alarm = self._last.get(key, (None, False))
        chosen = np.zeros(count, np.bool_)
        chosen[0] = (
            level is None or bool(alarms[0]) != alarm or bool(_moved(matrix[0], level, tolerance).any())
        )
        chosen[1:] = alarms[1:] != alarms[:-1]
        if chosen[0] or level is None:
            level = matrix[0]
        if tolerance == 0:
            # What has not moved at all equals the level: the result before will do for it.
            chosen[1:] |= _moved(matrix[1:], matrix[:-1], 0.0).any(axis=1)
            level = matrix[-1]
        else:
            place, block = 1, 16
            while place < count:
                stop = min(place + block, count)
                here = chosen[place:stop] | _moved(matrix[place:stop], level, tolerance).any(axis=1)
                first = int(np.argmax(here))
                if here[first]:
                    chosen[place + first] = True
                    level = matrix[place + first]
                    place, block = place + first + 1, 16
                else:
                    place, block = stop, block * 2
        self._last[key] = (level.copy(), bool(alarms[-1]))
        return chosen


def _moved(one: Floats, other: Floats, tolerance: float) -> Bools:
    with np.errstate(invalid="ignore"):  # infinity less itself
        return np.asarray((np.abs(one - other) > tolerance) | (np.isnan(one) != np.isnan(other)))
