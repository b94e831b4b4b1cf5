"""From a query to SQL. Pure: identifiers come from closed sets, everything that a person wrote is a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgeward.wire.trend_query import GROUPS, Checked, Group, Measure, TrendQuery
from trends.queries.files import Wanted

#: A column that stands in where only sketches and histograms are asked for.
NOTHING = "nothing"
#: Where buckets of any width begin: a Monday, so that weeks do.
ORIGIN_US = 345_600_000_000
_WHOLE = 64
_MODEL = ("model", "version")
_OWN = tuple(name for name in GROUPS if name not in _MODEL)

_SCALAR: dict[Measure, str] = {
    "count": '"count"', "missing": "missing", "mean": "mean", "stddev": 'sqrt(m2 / nullif("count", 0)) AS stddev',
    "minimum": "minimum", "maximum": "maximum",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """`rows` selects the keys, `start` and what is merged from `source`, one row per trend row (or result);
    `parameters` are its `?`. The relations `source` and `models` are to be there when it runs.
    """

    keys: tuple[str, ...]
    rows: str
    parameters: tuple[object, ...]
    wanted: Wanted
    measures: tuple[Measure, ...]
    quantiles: tuple[float, ...]
    limit: int

    @property
    def details(self) -> bool:
        """Whether sketches or histograms are to be merged, too, which SQL cannot."""
        return bool(self.quantiles) or "histogram" in self.measures


def conditions(
    filters: Mapping[Group, list[str]], digests: Iterable[str] | None, checked: Checked, time: str
) -> tuple[list[str], list[object], Wanted]:
    """What a WHERE has, its parameters, and the same for file statistics.

    `digests` are those of the models and versions that `filters` name, None where it names none: nothing
    is in a file's statistics about models.
    """
    texts: list[str] = []
    parameters: list[object] = []
    values: dict[str, list[str]] = {}
    for name in _OWN:
        if name not in filters:
            continue
        wanted = filters[name]
        values[name] = wanted
        if name == "digest":
            texts.append("(" + (" OR ".join(_digest(value) for value in wanted) or "false") + ")")
            for value in wanted:
                parameters += [value] if len(value) == _WHOLE else [value, value, value + "g"]
        else:
            texts.append(_one_of(name, wanted))
            parameters += wanted
    if digests is not None:
        listed = sorted(digests)
        texts.append(_one_of("digest", listed))
        parameters += listed
        values.setdefault("digest", listed)
    for at, sign in ((checked.since, ">="), (checked.until, "<")):
        if at is not None:
            texts.append(f"{time} {sign} make_timestamptz(?::BIGINT)")
            parameters.append(at)
    return texts, parameters, Wanted(checked.since, checked.until, values)


def _digest(value: str) -> str:
    # A range, besides: it is what row groups are held against; "g" is above every hexadecimal digit.
    return "digest = ?" if len(value) == _WHOLE else "(starts_with(digest, ?) AND digest >= ? AND digest < ?)"


def _one_of(name: str, values: list[str]) -> str:
    # One value is compared with, not looked up in a list: that is what DuckDB holds against row groups.
    if len(values) == 1:
        return f"{name} = ?"
    return f"{name} IN ({', '.join('?' * len(values))})" if values else "false"


def plan(query: TrendQuery, checked: Checked, digests: Iterable[str] | None) -> Plan:
    """`query` has passed `check_query`, which gave `checked`; `digests` as for `conditions`."""
    trends = query.source == "trends"
    time = "bucket" if trends else "event_time"
    filters = dict(query.filters)
    if trends:
        filters["series"] = query.series
    texts, parameters, wanted = conditions(filters, digests, checked, time)
    keys: tuple[str, ...] = tuple(query.group_by)
    names = [_key(name) for name in keys]
    if checked.width is not None:
        # Arithmetic, since calendars of time zones are ten times slower and the width is never a month.
        start = f"make_timestamptz((epoch_us({time}) - {ORIGIN_US}) // {checked.width} * {checked.width} + {ORIGIN_US})"
        names.append(f"{start} AS start")
        keys = (*keys, "start")
    join = " LEFT JOIN models USING (digest)" if set(_MODEL) & set(query.group_by) else ""
    if trends:
        merged = '"count", missing, mean, m2, minimum, maximum, edges, histogram, sketch'
        source, before = "source", []
    else:
        merged = (
            '(value IS NOT NULL)::BIGINT AS "count", (value IS NULL)::BIGINT AS missing, value AS mean, 0.0 AS m2,'
            " value AS minimum, value AS maximum"
        )
        # Each result has its outputs together; one row for each that is asked for.
        marks = ", ".join("?" * len(query.series))
        source = f"(SELECT *, outputs[substr(series, 8)] AS value FROM source, (SELECT unnest([{marks}]) AS series))"  # noqa: S608
        before = list(query.series)
    where = f" WHERE {' AND '.join(texts)}" if texts else ""
    rows = f"SELECT {''.join(name + ', ' for name in names)}{merged} FROM {source}{join}{where}"  # noqa: S608  # see above
    return Plan(
        keys, rows, (*before, *parameters), wanted, tuple(query.measures), tuple(query.quantiles), query.limit
    )


def _key(name: str) -> str:
    assert name in GROUPS, name
    return name


def merged_sql(plan: Plan, rows: str) -> str:
    """Rows merged per key: sums, extremes, and means and squared deviations exactly (Chan et al. 1979).

    What comes out has the form of what goes in, so that parts which were merged apart merge further. Ordered by
    the keys, without a limit.
    """
    keys = ", ".join(plan.keys)
    by = f" GROUP BY {keys}" if keys else ""
    comma = f"{keys}, " if keys else ""
    sums = f"""
        SELECT {comma}sum("count")::BIGINT AS "count", sum(missing)::BIGINT AS missing,
            sum("count" * mean) / nullif(sum("count"), 0) AS mean,
            min(minimum) FILTER ("count" > 0) AS minimum, max(maximum) FILTER ("count" > 0) AS maximum"""
    # Without keys there is one row even of nothing, which is no answer.
    nothing = " HAVING count(*) > 0"
    if "stddev" not in plan.measures:
        return f"{sums}, NULL::DOUBLE AS m2 FROM ({rows}){by}{nothing}"
    same = " AND ".join(f"parts.{key} IS NOT DISTINCT FROM means.{key}" for key in plan.keys) or "true"
    own = "".join(f"means.{key}, " for key in plan.keys)
    return f"""
        WITH parts AS MATERIALIZED (
            SELECT {comma}"count", missing, mean, m2, minimum, maximum FROM ({rows})),
        means AS ({sums} FROM parts{by}{nothing})
        SELECT {own}any_value(means."count") AS "count", any_value(means.missing) AS missing,
            any_value(means.mean) AS mean, any_value(means.minimum) AS minimum, any_value(means.maximum) AS maximum,
            sum(parts.m2 + parts."count" * (parts.mean - means.mean) * (parts.mean - means.mean))
                FILTER (parts."count" > 0) AS m2
        FROM parts JOIN means ON {same} GROUP BY {own.rstrip(", ") or "()"}{nothing}"""  # noqa: S608  # keys of GROUPS only


def answer_sql(plan: Plan, merged: str) -> str:
    """The measures that were asked for, from merged rows."""
    columns = [*plan.keys, *(_SCALAR[measure] for measure in plan.measures if measure in _SCALAR)]
    order = ", ".join(sorted(plan.keys, key=lambda key: key != "start"))
    ordered = f" ORDER BY {order}" if order else ""
    return (
        f"SELECT {', '.join(columns) or f'1 AS {NOTHING}'} FROM ({merged}){ordered} LIMIT {int(plan.limit)}"  # noqa: S608
    )


def details_sql(plan: Plan) -> str:
    """Sketches and histograms, sorted by key."""
    order = ", ".join(sorted(plan.keys, key=lambda key: key != "start"))
    columns = ['"count"', "edges", "histogram" if "histogram" in plan.measures else "NULL AS histogram"]
    columns.append("sketch" if plan.quantiles else "NULL AS sketch")
    ordered = f" ORDER BY {order}" if order else ""
    return f'SELECT {", ".join([*plan.keys, *columns])} FROM ({plan.rows}) WHERE "count" > 0{ordered}'  # noqa: S608
