"""Mergeable statistics per series and time bucket, and the drift figure.

Quantiles come from a KLL sketch (Karnin, Lang, Liberty 2016) of Apache DataSketches: with k = 200 its
ranks are within 1.3 % of the true ones at 99 % confidence, also after merging any number of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from datasketches import kll_floats_sketch

from edgeward.wire.package import FeatureBaseline

Floats = npt.NDArray[np.float64]

PSI_EPSILON = 1e-4
KLL_K = 200


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


@dataclass
class Statistics:
    """Count, mean, squared deviations, extremes and a histogram; merged exactly (Chan et al. 1979).

    `quantiles` is the KLL sketch of all values, `sketch` its serialised form.
    """

    edges: list[float]
    count: int = 0
    missing: int = 0
    mean: float = 0.0
    m2: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf
    histogram: list[int] = field(default_factory=list)
    quantiles: kll_floats_sketch = field(default_factory=lambda: kll_floats_sketch(KLL_K))

    def sketch(self) -> bytes:
        """As any implementation of Apache DataSketches reads it; empty without values."""
        return bytes(self.quantiles.serialize()) if self.count else b""

    def add(self, values: Floats) -> None:
        """Take in finite numbers; others count as missing."""
        finite = values[np.isfinite(values)]
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
        self.quantiles.update(finite.astype(np.float32))
        if self.edges:
            bins = np.bincount(
                np.searchsorted(self.edges, finite, side="right"), minlength=len(self.edges) + 1
            )
            old = self.histogram or [0] * len(bins)
            self.histogram = [int(a + b) for a, b in zip(old, bins, strict=True)]


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
