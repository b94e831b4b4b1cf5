"""Questions to the tables and the journal together, answered by DuckDB.

Delta is read through deltalake and Arrow (DuckDB's own Delta extension would be downloaded at run
time). Rows that still wait in the journal are part of every answer.
"""

from __future__ import annotations

import datetime

import duckdb
import pyarrow as pa
from deltalake import DeltaTable

from edgeward.errors import UsageError
from edgeward.wire.topics import LANES
from trends.columns import gaps_to_arrow, to_arrow
from trends.journal import Journal
from trends.quantiles import quantiles
from trends.schemas import SCHEMAS, TABLE_OF
from trends.tables import Tables

GROUPS = ("site", "device", "stream", "digest", "variant", "provider", "series")

_POINTS = (0.5, 0.95, 0.99)
_UNITS = {"s": "second", "m": "minute", "h": "hour", "d": "day"}


def interval(text: str) -> str:
    """`10m`, `1h`, `2d` as a DuckDB interval. Raises UsageError."""
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS or not number.isdigit() or int(number) == 0:
        raise UsageError(
            f"{text!r} is not a width of time", hint="expected a number and s, m, h or d, e.g. 10m"
        )
    return f"INTERVAL {int(number)} {_UNITS[unit]}"


def _check_time(name: str, text: str) -> None:
    # DuckDB would not look at it where there is no row to compare it with.
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"{name}: {text!r} is not a time", hint="expected e.g. 2026-03-01 or 2026-03-01T06:00Z"
        ) from None


class Queries:
    """A read-only view of one trend store."""

    def __init__(self, tables: Tables, journal: Journal) -> None:
        self._tables = tables
        self._journal = journal

    def sql(self, query: str, parameters: list[object] | None = None) -> pa.Table:
        """Run one SQL statement over results, alarms, trends, samples and gaps.

        The statement can read these views only: no files, no network. Raises UsageError.
        """
        with duckdb.connect(":memory:") as database:
            self._register(database)
            database.execute("SET enable_external_access=false")
            database.execute("SET lock_configuration=true")
            try:
                relation = database.sql(query, params=parameters or [])
                if relation is None:
                    raise UsageError("the query failed: it asks for no rows", hint="expected a SELECT")
                return relation.to_arrow_table()
            except duckdb.Error as error:
                line = str(error).strip().splitlines()[0]
                raise UsageError(f"the query failed: {line}", hint=f"tables: {', '.join(SCHEMAS)}") from None

    def rollup(
        self,
        *,
        series: str,
        width: str,
        group_by: list[str],
        since: str | None = None,
        until: str | None = None,
        digest: str | None = None,
    ) -> pa.Table:
        """Merged statistics of `series` per `width` of event time.

        Means and variances of buckets are merged exactly (Chan, Golub, LeVeque 1979). `p50`, `p95` and
        `p99` come from the buckets' sketches, their ranks right to about 1.3 %; they are null where a bucket
        has none.
        """
        for column in group_by:
            if column not in GROUPS:
                raise UsageError(f"cannot group by {column!r}", hint=f"one of {', '.join(GROUPS)}")
        if not series.startswith(("output:", "feature:")):
            raise UsageError(f"{series!r} is not a series", hint="expected output:NAME or feature:NAME")
        for name, text in (("since", since), ("until", until)):
            if text:
                _check_time(name, text)
        keys = "".join(f"{column}, " for column in group_by)
        conditions, parameters = ["series = ?"], [series]
        filters = (
            ("bucket >= ?::TIMESTAMPTZ", since),
            ("bucket < ?::TIMESTAMPTZ", until),
            ("starts_with(digest, ?)", digest),
        )
        for text, value in filters:
            if value:
                conditions.append(text)
                parameters.append(value)
        # Only names from GROUPS and a checked interval are put into the text; values are parameters.
        query = f"""
            WITH parts AS (
                SELECT {keys} time_bucket({interval(width)}, bucket) AS start,
                       "count" AS n, missing, mean, m2, minimum, maximum, sketch
                FROM trends WHERE {" AND ".join(conditions)} AND "count" > 0),
            means AS (
                SELECT *, sum(n * mean) OVER (PARTITION BY {keys} start) / sum(n) OVER (PARTITION BY {keys} start) AS m
                FROM parts)
            SELECT {keys} start, sum(n)::BIGINT AS "count", sum(missing)::BIGINT AS missing, any_value(m) AS mean,
                   sqrt(sum(m2 + n * (mean - m) * (mean - m)) / sum(n)) AS stddev,
                   min(minimum) AS minimum, max(maximum) AS maximum, list(struct_pack(n := n, sketch := sketch)) AS parts
            FROM means GROUP BY {keys} start ORDER BY start {"".join(", " + column for column in group_by)}
        """  # noqa: S608  # see the comment above
        merged = self.sql(query, list(parameters))
        points = [
            quantiles(((part["n"], part["sketch"]) for part in parts.as_py()), _POINTS)
            for parts in merged["parts"]
        ]
        merged = merged.drop_columns(["parts"])
        for index, point in enumerate(_POINTS):
            values = pa.array([row and row[index] for row in points], pa.float64())
            merged = merged.append_column(f"p{point * 100:.0f}", values)
        return merged

    def _register(self, database: duckdb.DuckDBPyConnection) -> None:
        # The journal is read before the table: a row that moves in between is seen twice, never
        # missed, and the position stated by that very version of the table tells which to drop.
        for lane in LANES:
            table = TABLE_OF[lane]
            waiting = self._journal.waiting(lane, 1_000_000)
            opened, done = self._tables.snapshot(table)
            fresh = to_arrow(lane, [item for item in waiting if item.id > done])
            self._view(database, table, fresh, opened)
        gaps = self._journal.waiting_gaps(1_000_000)
        opened, done = self._tables.snapshot("gaps")
        self._view(database, "gaps", gaps_to_arrow([gap for gap in gaps if gap.id > done]), opened)

    def _view(
        self, database: duckdb.DuckDBPyConnection, table: str, fresh: pa.Table, opened: DeltaTable | None
    ) -> None:
        """One view over both; the names come from SCHEMAS, never from a user."""
        columns = ", ".join(f'"{name}"' for name in SCHEMAS[table].names)
        database.register(f"{table}_journal", fresh)
        parts = [f"SELECT {columns} FROM {table}_journal"]  # noqa: S608
        if opened is not None:
            dataset = opened.to_pyarrow_dataset()
            database.register(f"{table}_delta", dataset)
            # A table from an older store lacks columns until the next commit.
            held = ", ".join(
                f'"{name}"' if name in dataset.schema.names else f'NULL AS "{name}"'
                for name in SCHEMAS[table].names
            )
            if table == "gaps":  # before there were counts, a gap was always the whole of its range
                whole = "last_seq - first_seq + 1"
                old = f'coalesce("count", {whole})' if "count" in dataset.schema.names else whole
                held = (
                    held.removesuffix(', NULL AS "count"').removesuffix(', "count"') + f', {old} AS "count"'
                )
            parts.append(f"SELECT {held} FROM {table}_delta")  # noqa: S608
        database.execute(f"CREATE VIEW {table} AS {' UNION ALL '.join(parts)}")
