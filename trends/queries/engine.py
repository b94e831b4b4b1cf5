"""Queries answered by DuckDB on this machine, over the tables' files and what still waits in the journal.

Files are chosen by Delta's log (partition, statistics) and read by DuckDB itself where they lie in a local
folder; elsewhere through deltalake and Arrow, since DuckDB's own Delta and S3 extensions would be
downloaded at run time.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pyarrow as pa

from edgeward.errors import EdgewardError, UsageError
from edgeward.wire.topics import Lane
from edgeward.wire.trend_query import Checked, Group, LineageQuery, TrendQuery, check_lineage, check_query
from trends.columns import to_arrow
from trends.journal import Journal
from trends.models import Models
from trends.queries.files import Wanted, alike, data_files, local_path, prune
from trends.queries.plan import NOTHING, Plan, answer_sql, conditions, details_sql, merged_sql, plan
from trends.queries.pools import Details
from trends.schemas import TABLE_OF
from trends.tables import Tables

BATCH_ROWS = 16_384
MEMORY_LIMIT = "2GB"
_LANE_OF: dict[str, Lane] = {table: lane for lane, table in TABLE_OF.items()}
_LINEAGE_COLUMNS = (
    "event_time", "site", "device", "stream", "revision", "key", "source_epoch", "source_seq", "digest",
    "variant", "provider", "outputs", "alarm", "epoch", "seq", "received",
)  # fmt: skip


class Stopped(EdgewardError):
    """The query was told to stop before it was through."""


class Stop:
    """From another thread: end a query that runs, or that is about to. `why` becomes the error's message."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._interrupt: Callable[[], object] | None = None
        self.why = ""

    def stop(self, why: str) -> None:
        with self._lock:
            self.why = why
            if self._interrupt is not None:
                self._interrupt()

    def watch(self, interrupt: Callable[[], object] | None) -> None:
        with self._lock:
            self._interrupt = interrupt
            if self.why and interrupt is not None:
                interrupt()

    def check(self) -> None:
        if self.why:
            raise Stopped(self.why, hint="ask for a shorter time, a wider rollup or fewer groups")


@dataclass(frozen=True)
class Prepared:
    """A plan with the files to read and the rows that are in none yet; `elsewhere` when there is no folder."""

    plan: Plan
    files: list[str]
    fresh: pa.Table
    elsewhere: bool


class Engine:
    """A read-only view of one trend store.

    With `sites`, nothing of other sites is in any answer.
    """

    def __init__(self, tables: Tables, journal: Journal, *, sites: frozenset[str] | None = None) -> None:
        self._tables = tables
        self._journal = journal
        self._sites = sites
        self.models = Models(tables)

    def ask(self, query: TrendQuery, stop: Stop | None = None) -> pa.Table:
        """Columns: the groups, `start` (UTC) with a rollup, the measures, `p50` and so on for quantiles.

        At most `query.limit` rows, by start and groups. `stddev` is that of the population. Raises
        InvalidDocument for what makes no sense, Stopped.
        """
        query = self._permitted(query)
        made = self.plan(query)
        with self._running(stop) as database:
            self._register(database, query.source, made.wanted)
            self.register_models(database)
            answer = arrow_of(database, answer_sql(made, merged_sql(made, made.rows)), made.parameters)
            if not made.details:
                return answer
            details = merge_details(
                made, batches_of(database, details_sql(made), made.parameters), stop or Stop()
            )
        return with_details(made, answer, details)

    def plan(self, query: TrendQuery) -> Plan:
        """Raises InvalidDocument."""
        return plan(query, check_query(query), self.models.digests(query.filters))

    def lineage(self, query: LineageQuery, stop: Stop | None = None) -> Iterator[pa.RecordBatch]:
        """The predictions of a model one by one, in batches; memory stays bounded however many there are.

        Raises InvalidDocument before the first batch, Stopped.
        """
        checked = check_lineage(query)
        filters = self._within_sites({**query.filters, "digest": [query.digest]})
        texts, parameters, wanted = conditions(filters, self.models.digests(filters), checked, "event_time")
        sql = (
            f"SELECT {', '.join(_LINEAGE_COLUMNS)} FROM source WHERE {' AND '.join(texts)}"  # noqa: S608  # conditions() binds values
            f" ORDER BY event_time, site, device, stream, seq LIMIT {int(query.limit)}"
        )
        return self._stream("results", wanted, sql, tuple(parameters), stop)

    def seen(self) -> list[dict[str, Any]]:
        """Which digests results and trends name: `digest, site, variant, first_seen, last_seen, rows`."""
        found: dict[tuple[str, str, str], dict[str, Any]] = {}
        for table, time in (("trends", "bucket"), ("results", "event_time")):
            sql = (
                f"SELECT digest, site, variant, min({time}) AS first_seen, max({time}) AS last_seen,"  # noqa: S608  # names above
                " count(*) AS rows FROM source GROUP BY ALL"
            )
            for batch in self._stream(table, Wanted(), sql, (), None):
                for row in batch.to_pylist():
                    key = (row["digest"], row["site"], row["variant"])
                    held = found.setdefault(key, row)
                    if held is not row:
                        held["first_seen"] = min(held["first_seen"], row["first_seen"])
                        held["last_seen"] = max(held["last_seen"], row["last_seen"])
                        held["rows"] += row["rows"]
        return list(found.values())

    def count(
        self, table: str, group_by: list[Group], filters: dict[Group, list[str]], since: int, until: int
    ) -> dict[tuple[object, ...], int]:
        """Rows of `alarms` or `results` by group, `since` to `until` in microseconds since 1970."""
        filters = self._within_sites(filters)
        span = Checked(since, until, None)
        texts, parameters, wanted = conditions(filters, self.models.digests(filters), span, "event_time")
        keys = "".join(f"{key}, " for key in group_by)
        join = " LEFT JOIN models USING (digest)" if {"model", "version"} & set(group_by) else ""
        sql = f"SELECT {keys}count(*) AS n FROM source{join} WHERE {' AND '.join(texts)} GROUP BY ALL"  # noqa: S608  # closed sets
        answer: dict[tuple[object, ...], int] = {}
        for batch in self._stream(table, wanted, sql, tuple(parameters), None):
            for row in batch.to_pylist():
                answer[tuple(row[key] for key in group_by)] = row["n"]
        return answer

    def first_buckets(self, query: TrendQuery, digest: str) -> list[dict[str, Any]]:
        """When a model's trends begin: `site, stream, at` (microseconds since 1970), of the query's series."""
        filters = self._within_sites({**query.filters, "series": query.series, "digest": [digest]})
        texts, parameters, wanted = conditions(filters, None, Checked(None, None, None), "bucket")
        sql = (
            f"SELECT site, stream, epoch_us(min(bucket)) AS at FROM source WHERE {' AND '.join(texts)}"  # noqa: S608
            " GROUP BY ALL ORDER BY ALL"
        )
        batches = self._stream("trends", wanted, sql, tuple(parameters), None)
        return [row for batch in batches for row in batch.to_pylist()]

    def _stream(
        self, table: str, wanted: Wanted, sql: str, parameters: tuple[object, ...], stop: Stop | None
    ) -> Iterator[pa.RecordBatch]:
        with self._running(stop) as database:
            self._register(database, table, wanted)
            self.register_models(database)
            for batch in batches_of(database, sql, parameters):
                if stop is not None:
                    stop.check()
                yield batch

    def _permitted(self, query: TrendQuery) -> TrendQuery:
        check_query(query)
        return msgspec.structs.replace(query, filters=self._within_sites(query.filters))

    def _within_sites(self, filters: dict[Group, list[str]]) -> dict[Group, list[str]]:
        if self._sites is None:
            return dict(filters)
        asked = filters.get("site")
        return {
            **filters,
            "site": sorted(self._sites.intersection(asked) if asked is not None else self._sites),
        }

    @contextmanager
    def _running(self, stop: Stop | None) -> Iterator[duckdb.DuckDBPyConnection]:
        with tempfile.TemporaryDirectory(prefix="edgeward-query-") as spill, connected(spill) as database:
            if stop is not None:
                stop.watch(database.interrupt)
            try:
                yield database
            except duckdb.InterruptException:
                (stop or Stop()).check()
                raise
            except duckdb.Error as error:
                line = str(error).strip().splitlines()[0]
                raise UsageError(
                    f"the query failed: {line}", hint="ask for a shorter time, a wider rollup or fewer groups"
                ) from None
            finally:
                if stop is not None:
                    stop.watch(None)

    def prepare(self, query: TrendQuery) -> Prepared:
        """All that another machine needs to answer a query. Raises InvalidDocument."""
        query = self._permitted(query)
        made = self.plan(query)
        fresh, opened = self._waiting(query.source)
        files = self._files(query.source, opened, made.wanted)
        return Prepared(made, files or [], fresh, files is None)

    def _files(self, table: str, opened: Any, wanted: Wanted) -> list[str] | None:
        """The files in the tables' folder that can hold what is wanted; None when they are not in a folder."""
        if opened is None:
            return []
        if self._tables.options is not None:
            return None
        root = Path(self._tables.uri(table))
        return [local_path(root, file.path) for file in prune(data_files(opened), wanted)]

    def _waiting(self, table: str) -> tuple[pa.Table, Any]:
        # The journal is read before the table: a row that moves in between is seen twice, never
        # missed, and the position stated by that very version of the table tells which to drop.
        lane = _LANE_OF[table]
        waiting = self._journal.everything(lane)
        opened, done = self._tables.snapshot(table)
        return to_arrow(lane, [item for item in waiting if item.id > done]), opened

    def register_models(self, database: duckdb.DuckDBPyConnection) -> None:
        database.register("models", self.models.names())

    def _register(self, database: duckdb.DuckDBPyConnection, table: str, wanted: Wanted) -> None:
        fresh, opened = self._waiting(table)
        files = self._files(table, opened, wanted)
        if files is None:
            database.register("elsewhere", opened.to_pyarrow_dataset())
            database.register("fresh", fresh)
            database.execute(
                "CREATE TEMP VIEW source AS SELECT * FROM fresh UNION ALL BY NAME SELECT * FROM elsewhere"
            )
        else:
            make_source(database, files, fresh)


@contextmanager
def connected(spill: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database of its own in memory, which spills into the folder `spill`."""
    with duckdb.connect(
        ":memory:", config={"memory_limit": MEMORY_LIMIT, "temp_directory": spill}
    ) as database:
        database.execute("SET TimeZone='UTC'")
        database.execute("SET enable_progress_bar=false")
        yield database


def make_source(database: duckdb.DuckDBPyConnection, files: list[str], fresh: pa.Table) -> None:
    """The view `source` over data files and rows in memory; a column that an older file lacks is null."""
    database.register("fresh", fresh)
    if not files:
        database.execute("CREATE TEMP VIEW source AS SELECT * FROM fresh")
        return
    # Read together are files with the same columns: to match them by name, DuckDB would open every file twice.
    parts = [
        f"SELECT * FROM read_parquet([{', '.join(map(_literal, same))}], hive_partitioning=false)"  # noqa: S608
        for same in alike(files)
    ]
    rows = " UNION ALL BY NAME ".join([*parts, "SELECT * FROM fresh"])
    database.execute(f"CREATE TEMP VIEW source AS {rows}")


def _literal(path: str) -> str:
    # Paths come from the table's log: they must not end the string.
    return "'" + path.replace("'", "''") + "'"


def arrow_of(database: duckdb.DuckDBPyConnection, sql: str, parameters: tuple[object, ...]) -> pa.Table:
    return database.sql(sql, params=list(parameters)).to_arrow_table()


def batches_of(
    database: duckdb.DuckDBPyConnection, sql: str, parameters: tuple[object, ...]
) -> Iterator[pa.RecordBatch]:
    """At least one, which may be empty: it has the columns."""
    reader = database.sql(sql, params=list(parameters)).to_arrow_reader(BATCH_ROWS)
    batch = next(reader, None)
    if batch is None:
        yield pa.RecordBatch.from_pylist([], schema=reader.schema)
    else:
        yield batch
        yield from reader


def merge_details(
    plan: Plan, batches: Iterator[pa.RecordBatch], stop: Stop
) -> dict[tuple[object, ...], Details]:
    """Sketches and histograms by key."""
    merged: dict[tuple[object, ...], Details] = {}
    for batch in batches:
        stop.check()
        columns = [batch.column(batch.schema.get_field_index(key)).to_pylist() for key in plan.keys]
        rest = (batch.column(name).to_pylist() for name in ("count", "sketch", "edges", "histogram"))
        keys = zip(*columns, strict=True) if columns else ((),) * batch.num_rows
        for key, count, sketch, edges, histogram in zip(keys, *rest, strict=True):
            details = merged.get(key)
            if details is None:
                details = merged[key] = Details()
            if plan.quantiles:
                details.pool.add(count, sketch)
            if "histogram" in plan.measures:
                details.histogram.add(edges, histogram)
    return merged


def with_details(plan: Plan, answer: pa.Table, details: dict[tuple[object, ...], Details]) -> pa.Table:
    """`answer` with its quantiles and histograms."""
    columns = [answer.column(key).to_pylist() for key in plan.keys]
    keys = list(zip(*columns, strict=True)) if columns else [()] * answer.num_rows
    found = [details.get(key) or Details() for key in keys]
    made = {name: answer.column(name) for name in answer.column_names if name != NOTHING}
    points = [item.pool.quantiles(plan.quantiles) for item in found]
    for index, point in enumerate(plan.quantiles):
        made[quantile_name(point)] = pa.array([row[index] for row in points], pa.float64())
    if "histogram" in plan.measures:
        known = [item.histogram if item.histogram.edges is not None else None for item in found]
        made["edges"] = pa.array([item and item.edges for item in known], pa.list_(pa.float64()))
        made["histogram"] = pa.array([item and item.counts for item in known], pa.list_(pa.int64()))
    return pa.table(made)


def quantile_name(point: float) -> str:
    """`p95` for 0.95, `p99.9` for 0.999."""
    return f"p{point * 100:.10g}"
