"""Whether a model's scores have moved since it became active: counted in bins, judged by the guard. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.streams.sketches import psi

#: Scores that the bins are made from, and that a window must hold to be judged: a PSI of two samples of one
#: distribution is about (bins - 1) * (1/n + 1/m), here 0.06 (Yurdakul, Statistical Properties of Population
#: Stability Index, 2018).
REFERENCE, MINIMUM = 500, 200
_BINS = 10


def edges_of(quantiles: Sequence[float]) -> list[float]:
    """Ascending inner edges of bins `(.., edge]`. A score that is several quantiles at once, as a label or a
    constant is, gets a bin of its own: what comes to lie below it must be seen as moved."""
    found: set[float] = set()
    for one, following in zip(quantiles, [*quantiles[1:], None], strict=True):
        found.add(float(one))
        if one == following:
            found.add(float(np.nextafter(np.float32(one), np.float32(-np.inf))))
    return sorted(found)


class ScoreBins:
    """A model's scores by tenths of its first REFERENCE ones. One thread adds at a time; any may read."""

    __slots__ = ("_edges", "_first", "counts", "proportions")

    def __init__(self) -> None:
        self._first: list[float] = []
        self._edges = np.zeros(0)
        #: Of the first scores, by bin; empty until there are enough.
        self.proportions: tuple[float, ...] = ()
        #: Of the scores after them.
        self.counts: tuple[int, ...] = ()

    def add(self, scores: npt.NDArray[np.floating]) -> None:
        """`scores` `[n]`; what is not finite is left out."""
        # In 32 bits, as `edges_of` reckons.
        values = np.asarray(scores).astype(np.float32).astype(np.float64)
        values = values[np.isfinite(values)]
        if not self.proportions:
            missing = REFERENCE - len(self._first)
            self._first += values[:missing].tolist()
            values = values[missing:]
            if len(self._first) < REFERENCE:
                return
            first = np.array(self._first)
            self._edges = np.array(edges_of(np.quantile(first, np.arange(1, _BINS) / _BINS).tolist()))
            self.counts = (0,) * (len(self._edges) + 1)
            self.proportions = tuple((self._binned(first) / REFERENCE).tolist())
            self._first = []
        if len(values):
            added = self._binned(values).tolist()
            self.counts = tuple(old + more for old, more in zip(self.counts, added, strict=True))

    def _binned(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        places = np.searchsorted(self._edges, values, side="left")
        return np.bincount(places, minlength=len(self._edges) + 1)


def last_column(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The score of each row: the last number of it."""
    return values.reshape(values.shape[0], -1)[:, -1] if values.ndim and values.size else values.reshape(-1)


def drift(
    proportions: Sequence[float], before: Sequence[int], after: Sequence[int]
) -> tuple[float, int] | None:
    """The PSI of the scores counted between two marks, and how many they are; None when they are too few."""
    old = before or (0,) * len(after)
    counts = [new - was for was, new in zip(old, after, strict=True)]
    if sum(counts) < MINIMUM:
        return None
    return psi(list(proportions), counts), sum(counts)
