"""Trend rows of fine buckets merged into one of a coarser bucket: exact but for the quantiles' own error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from agent.streams.sketches import Sketch, Statistics
from edgeward.wire.rows import TrendRow


def merge(rows: Sequence[TrendRow], width: int) -> TrendRow:
    """One row for the bucket of `width` microseconds that all `rows` (one or more) lie in.

    Counts, means, squared deviations (Chan et al. 1979), extremes and histograms are exact. Where one of the
    rows has no sketch the merged one has none either: quantiles of a part would mislead.
    """
    total = Statistics(rows[0].edges)
    complete = True
    for row in rows:
        complete = complete and bool(row.sketch or not row.count)
        total.merge(statistics_of(row))
    empty = total.count == 0
    return msgspec.structs.replace(
        rows[0],
        bucket=rows[0].bucket // width * width,
        width=width,
        count=total.count,
        missing=total.missing,
        mean=total.mean,
        m2=total.m2,
        minimum=0.0 if empty else total.minimum,
        maximum=0.0 if empty else total.maximum,
        histogram=total.histogram,
        sketch=total.sketch.encoded() if complete else b"",
    )


def statistics_of(row: TrendRow) -> Statistics:
    """What a row of this device's own outbox says."""
    return Statistics(
        row.edges,
        row.count,
        row.missing,
        row.mean,
        row.m2,
        row.minimum if row.count else math.inf,
        row.maximum if row.count else -math.inf,
        row.histogram,
        Sketch.restored(row.sketch),
    )
