"""Two times compared, group by group: what moved most, and what a new version changed at each site."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import msgspec
import pyarrow as pa
from msgspec import Struct

from edgeward.errors import InvalidDocument, NotFound, UsageError
from edgeward.wire.trend_query import Group, TrendQuery, check_query
from trends.queries.engine import Engine, quantile_name

Figure = Literal["mean", "quantile", "alarm-rate"]
FIGURES: tuple[Figure, ...] = ("mean", "quantile", "alarm-rate")


class Side(Struct, frozen=True):
    """One group in one time. `figure` is what is compared."""

    count: int
    figure: float
    mean: float
    stddev: float


def effect(before: Side, after: Side, figure: Figure) -> float:
    """How large a change is, free of its unit; 0.2 is small, 0.8 large (Cohen 1988).

    Means and quantiles: the change by the pooled standard deviation (Cohen's d). Rates: Cohen's h,
    2 asin(sqrt(after)) - 2 asin(sqrt(before)). Infinite where neither time varies and the figure has changed.
    """
    if figure == "alarm-rate":
        return 2 * math.asin(math.sqrt(min(1.0, after.figure))) - 2 * math.asin(
            math.sqrt(min(1.0, before.figure))
        )
    change = after.figure - before.figure
    n = before.count + after.count
    pooled = math.sqrt((before.count * before.stddev**2 + after.count * after.stddev**2) / n) if n else 0.0
    if pooled == 0:
        return math.copysign(math.inf, change) if change else 0.0
    return change / pooled


def top_movers(
    engine: Engine,
    query: TrendQuery,
    *,
    before_since: str,
    figure: Figure = "mean",
    quantile: float = 0.95,
    top: int = 20,
) -> pa.Table:
    """The groups of `query` whose figure has changed most, by size of effect.

    After is `query.since` to `until`, before is `before_since` to `query.since`. Groups that are missing in one of
    both come last, with a null effect. Columns: the groups, count_before, count_after, before, after, change,
    effect. Raises InvalidDocument.
    """
    if not query.since or not query.until:
        raise UsageError("top movers need --since and --until", hint="they are the later of the two periods")
    if not query.group_by:
        raise UsageError("top movers need --group-by", hint="e.g. --group-by site,stream")
    if figure not in FIGURES:
        raise InvalidDocument(
            f"{figure!r} cannot be compared", field="figure", hint=f"one of {', '.join(FIGURES)}"
        )
    if len(query.series) != 1:
        raise UsageError("top movers need one series", hint="--series output:NAME")
    sides = []
    for since, until in ((before_since, query.since), (query.since, query.until)):
        part = msgspec.structs.replace(query, since=since, until=until)
        sides.append(groups(engine, part, figure, quantile))
    return movers(query.group_by, sides[0], sides[1], figure, top)


def movers(
    group_by: list[Group],
    before: dict[tuple[object, ...], Side],
    after: dict[tuple[object, ...], Side],
    figure: Figure,
    top: int,
) -> pa.Table:
    """Pure: the table of `top_movers`."""
    rows: list[tuple[float, dict[str, Any]]] = []
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        row: dict[str, Any] = dict(zip(group_by, key, strict=True))
        row |= {"count_before": old.count if old else 0, "count_after": new.count if new else 0}
        row |= {"before": old.figure if old else None, "after": new.figure if new else None}
        both = old is not None and new is not None
        row["change"] = new.figure - old.figure if old and new else None
        row["effect"] = effect(old, new, figure) if old and new else None
        rows.append((abs(row["effect"]) if both else -1.0, row))
    rows.sort(key=lambda item: (-item[0], str(item[1])))
    kinds: list[tuple[str, pa.DataType]] = [
        (key, pa.int64() if key == "version" else pa.string()) for key in group_by
    ]
    kinds += [("count_before", pa.int64()), ("count_after", pa.int64())]
    kinds += [(name, pa.float64()) for name in ("before", "after", "change", "effect")]
    return pa.Table.from_pylist([row for _, row in rows[:top]], schema=pa.schema(kinds))


def groups(
    engine: Engine, query: TrendQuery, figure: Figure, quantile: float
) -> dict[tuple[object, ...], Side]:
    """Every group of `query` over its whole time; groups without a figure are left out."""
    asked = msgspec.structs.replace(
        query,
        rollup="",
        measures=["count", "mean", "stddev"],
        quantiles=[quantile] if figure == "quantile" else [],
    )
    alarms: dict[tuple[object, ...], int] = {}
    if figure == "alarm-rate":
        if {"series"} & set(query.group_by):
            raise UsageError("alarms are of no series", hint="group by something else")
        span = check_query(query)
        if span.since is None or span.until is None:
            raise UsageError("an alarm rate needs a time", hint="give --since and --until")
        alarms = engine.count("alarms", query.group_by, query.filters, span.since, span.until)
    name = {"mean": "mean", "quantile": quantile_name(quantile), "alarm-rate": "mean"}[figure]
    found = {}
    for row in engine.ask(asked).to_pylist():
        if row["mean"] is None or row[name] is None:
            continue
        key = tuple(row[group] for group in query.group_by)
        value = alarms.get(key, 0) / row["count"] if figure == "alarm-rate" else row[name]
        found[key] = Side(row["count"], value, row["mean"], row["stddev"])
    return found


_SPAN_US = 86_400_000_000


def digests_of(engine: Engine, what: str) -> list[str]:
    """A digest (or its beginning), `MODEL@VERSION` or `MODEL-vVERSION` as digests that were seen here.

    Raises NotFound.
    """
    rows = engine.models.table().to_pylist()
    found = [
        row["digest"]
        for row in rows
        if what in (f"{row['model']}@{row['version']}", f"{row['model']}-v{row['version']}")
        or (len(what) >= 6 and row["digest"].startswith(what))
    ]
    if not found:
        raise NotFound(
            f"{what!r} is no version that was seen here",
            hint="`edgeward trends models --refresh` learns what is in the tables; then `edgeward trends models`",
        )
    if len(found) > 1:
        raise UsageError(f"{what!r} begins {len(found)} digests", hint="give more of its digits")
    return found


def before_after(
    engine: Engine,
    query: TrendQuery,
    digest: str,
    *,
    days: int = 7,
    quantiles: Iterable[float] = (0.5, 0.95),
) -> pa.Table:
    """What the version `digest` changed per site and stream: `days` before it took over, and as many after.

    A version takes over with its first trend bucket at the site and stream. Before are the other versions of
    the same model (where the dimension knows it; else all other digests) up to then, after is this one only: figures
    of devices that had not changed yet are in neither. Columns: site, stream, since, period, digests, count,
    mean, stddev, minimum, maximum, quantiles, alarms, alarm_rate, and for `after` the effect on the mean.
    """
    points = list(quantiles)
    rivals = _rivals(engine, digest)
    base = msgspec.structs.replace(
        query, rollup="", quantiles=points, measures=["count", "mean", "stddev", "minimum", "maximum"],
        since="", until="", limit=1000,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for place in engine.first_buckets(query, digest):
        at: int = place["at"]
        filters: dict[Group, list[str]] = {
            **query.filters,
            "site": [place["site"]],
            "stream": [place["stream"]],
        }
        pair: list[dict[str, Any] | None] = []
        for period, first, last, wanted in (
            ("before", at - days * _SPAN_US, at, rivals),
            ("after", at, at + days * _SPAN_US, [digest]),
        ):
            part = msgspec.structs.replace(
                base, since=_text(first), until=_text(last), filters={**filters, "digest": wanted}
            )
            answer = engine.ask(part).to_pylist() if wanted else []
            pair.append(answer[0] if answer and answer[0]["count"] else None)
            row: dict[str, Any] = {
                "site": place["site"], "stream": place["stream"], "took_over": at, "period": period,
                **(pair[-1] or {"count": 0}),
            }  # fmt: skip
            alarms = engine.count("alarms", [], {**filters, "digest": wanted}, first, last) if wanted else {}
            row["alarms"] = sum(alarms.values())
            row["alarm_rate"] = row["alarms"] / row["count"] if row["count"] else None
            row["effect"] = _effect(pair) if period == "after" else None
            rows.append(row)
    names = ["mean", "stddev", "minimum", "maximum", *(quantile_name(point) for point in points)]
    schema = pa.schema(
        [
            ("site", pa.string()), ("stream", pa.string()), ("took_over", pa.timestamp("us", tz="UTC")),
            ("period", pa.string()), ("count", pa.int64()), *((name, pa.float64()) for name in names),
            ("alarms", pa.int64()), ("alarm_rate", pa.float64()), ("effect", pa.float64()),
        ]
    )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schema)


def _effect(pair: list[dict[str, Any] | None]) -> float | None:
    old, new = pair
    if old is None or new is None:
        return None
    sides = [Side(row["count"], row["mean"], row["mean"], row["stddev"]) for row in (old, new)]
    return effect(sides[0], sides[1], "mean")


def _rivals(engine: Engine, digest: str) -> list[str]:
    known = engine.models.names().to_pylist()
    own = next((row["model"] for row in known if row["digest"] == digest), None)
    return [
        row["digest"] for row in known if row["digest"] != digest and (own is None or row["model"] == own)
    ]


def _text(at: int) -> str:
    import datetime

    return (
        datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(microseconds=at)
    ).isoformat()
