"""Open buckets of event time per series; a bucket closes when a later one has begun."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from agent.streams.results import Lineage
from agent.streams.sketches import Statistics
from edgeward.wire.desired import StreamTarget
from edgeward.wire.rows import Row, TrendRow

Floats = npt.NDArray[np.float64]


class Trends:
    """`width_us` is a bucket's length in microseconds of event time."""

    def __init__(self, width_us: int) -> None:
        self._width = width_us
        self._open: dict[tuple[str, int, Lineage], Statistics] = {}
        self._newest = 0

    def add(
        self,
        event_time: npt.NDArray[np.int64],
        lineage: Lineage,
        series: dict[str, Floats],
        edges: dict[str, list[float]],
    ) -> None:
        """Values `[n]` by series, with the event time of each; `edges` are histogram edges by series."""
        buckets = event_time // self._width * self._width
        if not len(buckets):
            return
        first, last = int(buckets.min()), int(buckets.max())
        self._newest = max(self._newest, last)
        for bucket in [first] if first == last else np.unique(buckets).tolist():
            mask = None if first == last else buckets == bucket
            for name, values in series.items():
                key = (name, bucket, lineage)
                statistics = self._open.get(key)
                if statistics is None:
                    statistics = self._open[key] = Statistics(edges.get(name, []))
                statistics.add(values if mask is None else values[mask])

    def take(self, target: StreamTarget, *, everything: bool = False) -> list[Row]:
        """The rows of all closed buckets (or of all), which are forgotten here."""
        rows: list[Row] = []
        for key in [key for key in self._open if everything or key[1] < self._newest]:
            series, bucket, lineage = key
            item = self._open.pop(key)
            empty = item.count == 0
            rows.append(
                TrendRow(
                    bucket, self._width, target.name, target.revision, lineage.digest, lineage.variant,
                    lineage.provider, series, item.count, item.missing, item.mean, item.m2,
                    0.0 if empty else item.minimum, 0.0 if empty else item.maximum, item.edges,
                    item.histogram, item.sketch.encoded(),
                )
            )  # fmt: skip
        return rows
