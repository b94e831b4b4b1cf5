"""Whether two trends move together, and which one first. A hint where to look, never a proof.

`correlate` is pure; `correlation_of` asks for the trends first.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import msgspec
import pyarrow as pa
from msgspec import Struct

from edgeward.errors import UsageError
from edgeward.wire.trend_query import TrendQuery, check_query
from trends.queries.engine import Engine

MIN_PAIRS = 8
_NORMAL = NormalDist()


class Correlation(Struct, frozen=True):
    """Of A at a bucket with B `lag` buckets later, over `n` buckets where both are known.

    `effective_n` is less than `n` where both follow their own past (Bartlett 1935). `low` and `high` are the 95 %
    interval of Pearson's r by Fisher's z with it; `p_value` is for r = 0, two-sided, multiplied by the
    number of lags that were looked at (Bonferroni).
    """

    lag: int
    n: int
    effective_n: float
    pearson: float
    spearman: float
    low: float
    high: float
    p_value: float


def pearson(a: list[float], b: list[float]) -> float | None:
    """None where one of them does not vary."""
    n = len(a)
    mean_a, mean_b = math.fsum(a) / n, math.fsum(b) / n
    aa = math.fsum((value - mean_a) ** 2 for value in a)
    bb = math.fsum((value - mean_b) ** 2 for value in b)
    if aa == 0 or bb == 0:
        return None
    ab = math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return max(-1.0, min(1.0, ab / math.sqrt(aa) / math.sqrt(bb)))


def ranks(values: list[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    at = 0
    while at < len(order):
        end = at
        while end + 1 < len(order) and values[order[end + 1]] == values[order[at]]:
            end += 1
        for index in order[at : end + 1]:
            found[index] = (at + end) / 2 + 1
        at = end + 1
    return found


def _own_past(values: dict[int, float]) -> float:
    """Correlation of a trend with its own last bucket, 0 where it cannot be told."""
    pairs = [(value, values[at + 1]) for at, value in values.items() if at + 1 in values]
    if len(pairs) < MIN_PAIRS:
        return 0.0
    return pearson([old for old, _ in pairs], [new for _, new in pairs]) or 0.0


def correlate(a: dict[int, float], b: dict[int, float], max_lag: int) -> list[Correlation]:
    """Trends by number of bucket, at every lag from `-max_lag` to `max_lag`; the strongest first.

    A positive lag means that A moves first. Lags with fewer than MIN_PAIRS common buckets or without variation
    are left out. Raises UsageError when none is left.
    """
    found = []
    own = _own_past(a) * _own_past(b)
    lags = 2 * max_lag + 1
    for lag in range(-max_lag, max_lag + 1):
        common = [at for at in sorted(a) if at + lag in b]
        if len(common) < MIN_PAIRS:
            continue
        left, right = [a[at] for at in common], [b[at + lag] for at in common]
        linear, monotone = pearson(left, right), pearson(ranks(left), ranks(right))
        if linear is None or monotone is None:
            continue
        n = len(common)
        effective = min(float(n), n * (1 - own) / (1 + own)) if own > -1 else float(n)
        low, high, p_value = _interval(linear, effective, lags)
        found.append(Correlation(lag, n, effective, linear, monotone, low, high, p_value))
    if not found:
        raise UsageError(
            f"the two trends have fewer than {MIN_PAIRS} buckets in common, or do not vary",
            hint="ask for a longer time or a narrower --rollup",
        )
    return sorted(found, key=lambda item: (-abs(item.pearson), abs(item.lag), item.lag))


def _interval(r: float, n: float, lags: int) -> tuple[float, float, float]:
    if n <= 4:
        return -1.0, 1.0, 1.0
    if abs(r) >= 1:
        return r, r, 0.0
    z, error = math.atanh(r), 1 / math.sqrt(n - 3)
    wide = _NORMAL.inv_cdf(0.975) * error
    p_value = min(1.0, lags * 2 * _NORMAL.cdf(-abs(z) / error))
    return math.tanh(z - wide), math.tanh(z + wide), p_value


def correlation_of(
    engine: Engine, query: TrendQuery, a: tuple[str, str], b: tuple[str, str], max_lag: int
) -> pa.Table:
    """The means of two (stream, series) per bucket of the query's rollup, correlated; see `correlate`.

    Columns as in Correlation, and lag_seconds. Raises UsageError, InvalidDocument.
    """
    width = check_query(query).width
    if width is None:
        raise UsageError("a correlation needs buckets", hint="give --rollup, e.g. 10m")
    sides = []
    for stream, series in (a, b):
        asked = msgspec.structs.replace(
            query, series=[series], group_by=[], measures=["mean"], quantiles=[], limit=1_000_000,
            filters={**query.filters, "stream": [stream]},
        )  # fmt: skip
        rows = engine.ask(asked)
        starts = rows.column("start").cast(pa.int64()).to_pylist()
        means = rows.column("mean").to_pylist()
        sides.append(
            {at // width: value for at, value in zip(starts, means, strict=True) if value is not None}
        )
    found = correlate(sides[0], sides[1], max_lag)
    rows = [{"lag_seconds": item.lag * width / 1e6, **msgspec.structs.asdict(item)} for item in found]
    return pa.Table.from_pylist(rows)
