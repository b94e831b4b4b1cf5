"""Mergeable statistics per series and time bucket, and the drift figure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import datasketches
import numpy as np
import numpy.typing as npt

from edgeward.wire.package import FeatureBaseline

Floats = npt.NDArray[np.float64]

PSI_EPSILON = 1e-4
# A rank is right to 1.3 % with a probability of 99 %, in at most 3 KB.
SKETCH_K = 200
_LARGEST = float(np.finfo(np.float32).max)


def psi(expected: list[float], counts: list[int]) -> float:
    """Population stability index: sum of (live - base) * ln(live / base) over the bins.

    Proportions are floored at PSI_EPSILON, since an empty bin has no logarithm. Below 0.1 nothing has
    changed, above 0.25 much has (Siddiqi, Credit Risk Scorecards, 2006).
    """
    total = sum(counts)
    if total == 0:
        return 0.0
    figure = 0.0
    for base, count in zip(expected, counts, strict=True):
        old, live = max(base, PSI_EPSILON), max(count / total, PSI_EPSILON)
        figure += (live - old) * math.log(live / old)
    return figure


class Sketch:
    """A KLL sketch (Karnin, Lang, Liberty 2016): the quantiles of a stream in bounded memory, mergeable.

    Items are 32-bit floats, which halves what goes up: 7 digits are far finer than the error of a rank.
    What is larger than they can hold counts as the largest of them.
    """

    def __init__(self) -> None:
        self._sketch = datasketches.kll_floats_sketch(SKETCH_K)

    def add(self, values: Floats) -> None:
        """`values` `[n]`, finite."""
        if len(values):
            self._sketch.update(np.clip(values, -_LARGEST, _LARGEST).astype(np.float32))

    @classmethod
    def restored(cls, encoded: bytes) -> Sketch:
        """From this device's own durable state; never from bytes that came over a network."""
        made = cls()
        if encoded:
            made._sketch = datasketches.kll_floats_sketch.deserialize(encoded)
        return made

    def merge(self, other: Sketch) -> None:
        self._sketch.merge(other._sketch)

    def encoded(self) -> bytes:
        """In the binary form of Apache DataSketches; empty before the first value."""
        return b"" if self._sketch.is_empty() else bytes(self._sketch.serialize())


#: A number beyond it would make the sum of squares infinite, and cost the whole bucket.
_SQUARABLE = 1e150


@dataclass
class Statistics:
    """Count, mean, squared deviations, extremes and a histogram; merged exactly (Chan et al. 1979).

    `sketch` has the quantiles.
    """

    edges: list[float]
    count: int = 0
    missing: int = 0
    mean: float = 0.0
    m2: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf
    histogram: list[int] = field(default_factory=list)
    sketch: Sketch = field(default_factory=Sketch)

    def add(self, values: Floats) -> None:
        """Take in numbers whose squares are finite; others count as missing."""
        finite = values[np.abs(values) < _SQUARABLE]
        self.missing += len(values) - len(finite)
        if len(finite) == 0:
            return
        mean = float(finite.mean())
        m2 = float(((finite - mean) ** 2).sum())
        total = self.count + len(finite)
        delta = mean - self.mean
        self.m2 += m2 + delta * delta * self.count * len(finite) / total
        self.mean += delta * len(finite) / total
        self.count = total
        self.minimum = min(self.minimum, float(finite.min()))
        self.maximum = max(self.maximum, float(finite.max()))
        self.sketch.add(finite)
        if self.edges:
            bins = np.bincount(
                np.searchsorted(self.edges, finite, side="right"), minlength=len(self.edges) + 1
            )
            old = self.histogram or [0] * len(bins)
            self.histogram = [int(a + b) for a, b in zip(old, bins, strict=True)]

    def merge(self, other: Statistics) -> None:
        """Take in what `other` counted, in bins of the same edges."""
        total = self.count + other.count
        self.missing += other.missing
        if other.count:
            delta = other.mean - self.mean
            self.m2 += other.m2 + delta * delta * self.count * other.count / total
            self.mean += delta * other.count / total
            self.count = total
            self.minimum = min(self.minimum, other.minimum)
            self.maximum = max(self.maximum, other.maximum)
            self.sketch.merge(other.sketch)
        if other.histogram:
            old = self.histogram or [0] * len(other.histogram)
            self.histogram = [a + b for a, b in zip(old, other.histogram, strict=True)]


class LiveBaseline:
    """The live distribution of each feature in the bins of the package's baseline."""

    def __init__(self, baseline: dict[str, FeatureBaseline]) -> None:
        self._baseline = baseline
        self._counts = {name: np.zeros(len(item.proportions), np.int64) for name, item in baseline.items()}
        self.rows = 0

    def add(self, features: list[str], rows: Floats) -> None:
        """`rows` is `[n, features]`, finite."""
        self.rows += len(rows)
        for index, name in enumerate(features):
            if name in self._baseline:
                bins = np.searchsorted(self._baseline[name].edges, rows[:, index], side="right")
                self._counts[name] += np.bincount(bins, minlength=len(self._counts[name]))

    def psi(self) -> dict[str, float]:
        """The drift figure of each feature; empty before the first row."""
        if self.rows == 0:
            return {}
        return {
            name: psi(item.proportions, self._counts[name].tolist()) for name, item in self._baseline.items()
        }
