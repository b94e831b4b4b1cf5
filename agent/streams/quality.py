"""Which samples must not reach a model: of an impossible time, missing, out of range, from a stuck sensor."""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from agent.streams.keys import Recent, groups
from agent.streams.samples import Samples
from edgeward.wire.rows import AHEAD_US, EARLIEST_US
from edgeward.wire.streams import Check


class Quality:
    """Marks samples by their values `[n, features]`; images pass unchanged.

    A missing reading (NaN, infinite) neither continues nor ends a run of equal readings. `counts` grows
    by `missing:F`, `range:F` and `stuck:F` for each reading concerned; a sample's problem names the first
    of its violations in that order. A problem that a sample has already stays as it is.

    A time that no trend store takes (before 2000, or more than a day ahead) is counted as `time`, and the
    sample's time becomes `now`, so that at least its arrival is on record.
    """

    def __init__(self, features: list[str], checks: dict[str, Check]) -> None:
        self.counts: Counter[str] = Counter()
        self._features = features
        self._checks = [checks.get(name, Check()) for name in features]
        self._low = np.array([-np.inf if c.minimum is None else c.minimum for c in self._checks])
        self._high = np.array([np.inf if c.maximum is None else c.maximum for c in self._checks])
        self._ranged = bool(np.isfinite(self._low).any() or np.isfinite(self._high).any())
        self._stuck = {i: c.stuck_after for i, c in enumerate(self._checks) if c.stuck_after is not None}
        # Per feature and key: the last reading and how often in a row it has been read.
        self._runs: dict[int, Recent[tuple[float, int]]] = {index: Recent() for index in self._stuck}

    def apply(self, samples: Samples, now: float) -> Samples:
        """The same samples with what is wrong with them; the very object when nothing is.

        `now` is the device's clock in seconds since 1970.
        """
        samples = self._timed(samples, round(now * 1e6))
        values = samples.values
        if values.ndim != 2 or len(samples) == 0:
            return samples
        found: dict[int, str] = {}
        # A finite sum has finite terms; an overflow only takes the longer way.
        with np.errstate(over="ignore", invalid="ignore"):
            complete = bool(np.isfinite(values.sum()))
        if not complete:
            self._missing(values, found)
        if self._ranged and bool(((values < self._low) | (values > self._high)).any()):
            self._range(values, found)
        for index, limit in self._stuck.items():
            self._find_stuck(samples, index, limit, found)
        return replace(samples, problems={**found, **samples.problems}) if found else samples

    def _timed(self, samples: Samples, now_us: int) -> Samples:
        at = samples.event_time
        # A device that has lost its clock cannot say what lies ahead.
        latest = now_us + AHEAD_US if now_us >= EARLIEST_US else np.iinfo(np.int64).max
        bad = (at < EARLIEST_US) | (at > latest)
        if not bad.any():
            return samples
        rows = np.flatnonzero(bad).tolist()
        self.counts["time"] += len(rows)
        found = {row: _untimely(int(at[row])) for row in rows}
        return replace(samples, event_time=np.where(bad, now_us, at), problems={**found, **samples.problems})

    def _missing(self, values: npt.NDArray[np.float64], found: dict[int, str]) -> None:
        for row, column in np.argwhere(~np.isfinite(values)).tolist():
            name, value = self._features[column], values[row, column]
            self.counts[f"missing:{name}"] += 1
            found.setdefault(row, f"{name}: missing" if np.isnan(value) else f"{name}: {value} is not finite")

    def _range(self, values: npt.NDArray[np.float64], found: dict[int, str]) -> None:
        # Infinite readings are counted as missing already.
        outside = ((values < self._low) | (values > self._high)) & np.isfinite(values)
        for row, column in np.argwhere(outside).tolist():
            name, value = self._features[column], float(values[row, column])
            self.counts[f"range:{name}"] += 1
            below = value < self._low[column]
            limit = float((self._low if below else self._high)[column])
            found.setdefault(
                row, f"{name}: {value:g} is {'below the minimum' if below else 'above the maximum'} {limit:g}"
            )

    def _find_stuck(self, samples: Samples, index: int, limit: int, found: dict[int, str]) -> None:
        name, state = self._features[index], self._runs[index]
        column = samples.values[:, index]
        for key, where in groups(samples.keys, len(samples)):
            read = column if where is None else column[where]
            finite = np.isfinite(read)
            if not finite.all():
                rows = np.flatnonzero(finite) if where is None else where[finite]
                read = read[finite]
            else:
                rows = np.arange(len(read)) if where is None else where
            if len(read) == 0:
                continue
            lengths = _run_lengths(read, *state.get(key, (np.nan, 0)))
            state[key] = (float(read[-1]), int(lengths[-1]))
            if lengths.max() < limit:
                continue
            over = np.flatnonzero(lengths >= limit)
            self.counts[f"stuck:{name}"] += len(over)
            for row, value, length in zip(
                rows[over].tolist(), read[over].tolist(), lengths[over].tolist(), strict=True
            ):
                found.setdefault(
                    row, f"{name}: stuck at {value:g} for {length} readings, the limit is {limit}"
                )


def _untimely(at_us: int) -> str:
    if at_us < EARLIEST_US:
        return f"time: {at_us / 1e6:g} s since 1970 lies before the year 2000"
    try:
        shown = f"{datetime.datetime.fromtimestamp(at_us // 10**6, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
    except (ValueError, OverflowError):
        shown = f"{at_us / 1e6:g} s since 1970"
    return f"time: {shown} is more than a day ahead of this device's clock"


def _run_lengths(read: npt.NDArray[np.float64], last: float, count: int) -> npt.NDArray[np.int64]:
    """How many equal readings in a row end at each, `[n]`; `last` was read `count` times before the first."""
    places = np.arange(len(read))
    begins = np.empty(len(read), np.bool_)
    begins[0] = True
    begins[1:] = read[1:] != read[:-1]
    lengths = places - np.maximum.accumulate(np.where(begins, places, 0)) + 1
    if read[0] == last:
        others = np.flatnonzero(begins[1:])
        lengths[: int(others[0]) + 1 if len(others) else len(read)] += count
    return lengths.astype(np.int64)
