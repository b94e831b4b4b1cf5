"""Questions to the tables and the journal together, answered by DuckDB.

Delta is read through deltalake and Arrow (DuckDB's own Delta extension would be downloaded at run
time). Rows that still wait in the journal are part of every answer.
"""

from __future__ import annotations

from typing import cast

import duckdb
import pyarrow as pa
from deltalake import DeltaTable

from edgeward.errors import UsageError
from edgeward.wire.topics import LANES
from edgeward.wire.trend_query import GROUPS, Group, TrendQuery
from trends.columns import gaps_to_arrow, to_arrow
from trends.journal import Journal
from trends.queries.engine import Engine
from trends.schemas import SCHEMAS, TABLE_OF
from trends.tables import Tables

_POINTS = (0.5, 0.95, 0.99)


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
        """Merged statistics of `series` per `width` of event time, with p50, p95 and p99.

        A short form of `Engine.ask`. Raises InvalidDocument.
        """
        for column in group_by:
            if column not in GROUPS:
                raise UsageError(f"cannot group by {column!r}", hint=f"one of {', '.join(GROUPS)}")
        query = TrendQuery(
            series=[series], rollup=width, group_by=cast(list[Group], group_by), since=since or "", until=until or "",
            filters={"digest": [digest]} if digest else {}, quantiles=list(_POINTS),
        )  # fmt: skip
        return Engine(self._tables, self._journal).ask(query)

    def _register(self, database: duckdb.DuckDBPyConnection) -> None:
        # The journal is read before the table: a row that moves in between is seen twice, never
        # missed, and the position stated by that very version of the table tells which to drop.
        for lane in LANES:
            table = TABLE_OF[lane]
            waiting = self._journal.everything(lane)
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
