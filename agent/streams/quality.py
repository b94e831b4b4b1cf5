"""What keeps a reading from a model: missing, out of range, stuck. Pure, over whole batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from agent.streams.samples import Samples
from edgeward.wire.streams import Check

#: Keys whose last readings are remembered; beyond, the oldest one starts anew.
MAX_KEYS = 10_000


class Quality:
    """Marks samples; `counts` says how many readings by kind and feature (`range:flow`)."""

    def __init__(self, features: Sequence[str], checks: Mapping[str, Check]) -> None:
        self._features = list(features)
        self.counts: Counter[str] = Counter()
        self._low = self._bounds({name: check.minimum for name, check in checks.items()}, -np.inf)
        self._high = self._bounds({name: check.maximum for name, check in checks.items()}, np.inf)
        self._ranged = bool(np.isfinite(self._low).any() or np.isfinite(self._high).any())
        self._stuck = {
            self._features.index(name): check.stuck_after
            for name, check in checks.items()
            if check.stuck_after is not None
        }
        self._runs: dict[tuple[str, int], tuple[float, int]] = {}

    def _bounds(self, bounds: dict[str, float | None], free: float) -> np.ndarray:
        given = [bounds.get(name) for name in self._features]
        return np.array([free if bound is None else bound for bound in given])

    def apply(self, samples: Samples) -> Samples:
        """The samples with a problem for each that must not reach a model; what had one keeps it."""
        values = samples.values
        if values.ndim != 2 or not len(values):
            return samples
        # The sum of finite readings may overflow, so this is only a hint that all is well.
        clean = bool(np.isfinite(values.sum()))
        if clean and self._ranged:
            clean = bool((values >= self._low).all() and (values <= self._high).all())
        if clean and not self._stuck:
            return samples
        problems = dict(samples.problems)
        if not clean:
            self._mark(samples, ~np.isfinite(values), "missing", problems)
            self._mark(samples, values < self._low, "range", problems)
            self._mark(samples, values > self._high, "range", problems)
        for feature, limit in self._stuck.items():
            self._mark_stuck(samples, feature, limit, problems)
        return replace(samples, problems=problems)

    def _mark(self, samples: Samples, bad: np.ndarray, kind: str, problems: dict[int, str]) -> None:
        for index, feature in zip(*(found.tolist() for found in np.nonzero(bad)), strict=True):
            name = self._features[feature]
            self.counts[f"{kind}:{name}"] += 1
            if index in problems:
                continue
            value = float(samples.values[index, feature])
            if kind == "missing":
                problems[index] = f"{name}: missing or not a finite number"
            else:
                low, high = self._low[feature], self._high[feature]
                problems[index] = f"{name}: {value:g} is outside {low:g} to {high:g}"

    def _mark_stuck(self, samples: Samples, feature: int, limit: int, problems: dict[int, str]) -> None:
        name = self._features[feature]
        column = samples.values[:, feature].tolist()
        for index, value in enumerate(column):
            key = (samples.key(index), feature)
            before, run = self._runs.get(key, (value, 0))
            run = run + 1 if value == before else 1
            if key not in self._runs and len(self._runs) >= MAX_KEYS:
                del self._runs[next(iter(self._runs))]
            self._runs[key] = (value, run)
            if run >= limit:
                self.counts[f"stuck:{name}"] += 1
                problems.setdefault(index, f"{name}: stuck at {value:g} for {run} readings, limit {limit}")
