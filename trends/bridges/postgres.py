"""PostgreSQL, with or without TimescaleDB: each row exactly once.

A batch is copied into a temporary table, inserted where its key is new, and the position moved, in one
transaction: after whatever failure the database says itself up to where it has the rows.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
import pyarrow as pa

from edgeward.errors import Conflict, EdgewardError, MissingDependency, Unavailable, UsageError
from trends.bridges.bridge import KEYS
from trends.bridges.copy_text import copy_csv
from trends.bridges.feed import Position

if TYPE_CHECKING:
    import psycopg

log = logging.getLogger(__name__)

#: The column by which a table is cut into chunks where TimescaleDB is there.
TIMES = {"results": "event_time", "alarms": "event_time", "samples": "event_time", "trends": "bucket"}


def column_type(kind: pa.DataType) -> str:
    """The PostgreSQL type of an Arrow type; text for what has none, so that no new column is ever lost."""
    if pa.types.is_map(kind) or pa.types.is_struct(kind):
        return "jsonb"
    if pa.types.is_list(kind):
        return f"{column_type(kind.value_type)}[]"
    if pa.types.is_timestamp(kind):
        return "timestamptz"
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind):
        return "bigint"
    if pa.types.is_floating(kind):
        return "double precision"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "bytea"
    return "text"


def primary_key(table: str, *, timescale: bool) -> tuple[str, ...]:
    """A hypertable's unique keys must hold its time; a row's time never changes, so that it is one key still."""
    if timescale and table in TIMES:
        return (*KEYS[table], TIMES[table])
    return KEYS[table]


class PostgresTarget:
    """A schema of a database. One connection, made again when it is lost."""

    def __init__(
        self,
        url: str,
        bridge: str,
        schema: str = "edgeward",
        *,
        between: Callable[[str], None] = lambda step: None,
    ) -> None:
        """`url` is `postgresql://user@host:port/database`; a password comes best from PGPASSFILE.

        `between` is called in the transaction, before its end (fault tests).

        Raises UsageError for another kind of address, MissingDependency. Connects when it is first needed.
        """
        where = urlsplit(url)
        if where.scheme != "postgresql" or not where.hostname:
            raise UsageError(
                "the target's address is not PostgreSQL's",
                hint="expected postgresql://user@host:port/database",
            )
        try:
            import psycopg
            from psycopg import sql
        except ImportError:
            raise MissingDependency(
                "psycopg is not installed", hint="pip install 'edgeward[postgres]'"
            ) from None
        self._psycopg, self._sql = psycopg, sql
        self._url, self._bridge, self._schema = url, bridge, schema
        self.where = f"{where.hostname}:{where.port or 5432}{where.path}, schema {schema}"
        self._connection: psycopg.Connection | None = None
        self._known: dict[str, dict[str, str]] = {}
        self._timescale = False
        self._between = between

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def resume(self, table: str, position: Position) -> Position:
        """The database's own word; from the beginning where it has none, whatever the file says."""
        with self._failing_clearly():
            found = self._connect().execute(
                self._statement("SELECT position FROM {cursor} WHERE bridge = %s AND source = %s"),
                (self._bridge, table),
            )
            row = found.fetchone()
        return msgspec.json.decode(row[0], type=Position) if row else Position()

    def deliver(self, table: str, rows: pa.Table, before: Position, after: Position) -> None:
        with self._failing_clearly(), self._connect().transaction():
            self._move(table, before, after)
            if rows.num_rows:
                self._declare(table, rows.schema)
                self._insert(table, rows)
            self._between("inserted")

    def _move(self, table: str, before: Position, after: Position) -> None:
        """Raises Conflict when the position is not where this bridge has left it: another one is at work."""
        connection = self._connect()
        connection.execute(
            self._statement("INSERT INTO {cursor} VALUES (%s, %s, %s) ON CONFLICT DO NOTHING"),
            (self._bridge, table, _packed(Position())),
        )
        row = connection.execute(
            self._statement("SELECT position FROM {cursor} WHERE bridge = %s AND source = %s FOR UPDATE"),
            (self._bridge, table),
        ).fetchone()
        if row is None or row[0] != _packed(before):
            raise Conflict(
                f"another bridge named {self._bridge} has moved on in {self.where}",
                hint="give each bridge into one schema a --name of its own",
            )
        connection.execute(
            self._statement("UPDATE {cursor} SET position = %s WHERE bridge = %s AND source = %s"),
            (_packed(after), self._bridge, table),
        )

    def _insert(self, table: str, rows: pa.Table) -> None:
        connection, sql = self._connect(), self._sql
        names = sql.SQL(", ").join(map(sql.Identifier, rows.column_names))
        connection.execute(
            sql.SQL(
                "CREATE TEMPORARY TABLE arrived ON COMMIT DROP AS SELECT {names} FROM {table} WITH NO DATA"
            ).format(names=names, table=sql.Identifier(self._schema, table))
        )
        with (
            connection.cursor() as cursor,
            cursor.copy(sql.SQL("COPY arrived ({}) FROM STDIN WITH (FORMAT csv)").format(names)) as copy,
        ):
            copy.write(copy_csv(rows))
        connection.execute(
            sql.SQL(
                "INSERT INTO {table} ({names}) SELECT {names} FROM arrived ON CONFLICT DO NOTHING"
            ).format(names=names, table=sql.Identifier(self._schema, table))
        )

    def _declare(self, table: str, schema: pa.Schema) -> None:
        """The table, and the columns that it lacks."""
        wanted = {field.name: column_type(field.type) for field in schema}
        if wanted.items() <= self._known.get(table, {}).items():
            return
        connection, sql = self._connect(), self._sql
        where = sql.Identifier(self._schema, table)
        there = self._columns(table)
        if not there:
            key = primary_key(table, timescale=self._timescale)
            columns = [
                sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind)) for name, kind in wanted.items()
            ]
            connection.execute(
                sql.SQL("CREATE TABLE {} ({}, PRIMARY KEY ({}))").format(
                    where, sql.SQL(", ").join(columns), sql.SQL(", ").join(map(sql.Identifier, key))
                )
            )
            if self._timescale and table in TIMES:
                connection.execute(
                    sql.SQL("SELECT create_hypertable({}, by_range({}))").format(
                        sql.Literal(f'"{self._schema}"."{table}"'), sql.Literal(TIMES[table])
                    )
                )
        for name, kind in wanted.items():
            if there and name not in there:
                log.info("%s: the new column %s is added as %s", table, name, kind)
                connection.execute(
                    sql.SQL("ALTER TABLE {} ADD COLUMN {} {}").format(
                        where,
                        sql.Identifier(name),
                        sql.SQL(kind),
                    )
                )
        if wrong := {name: there[name] for name, kind in wanted.items() if there.get(name, kind) != kind}:
            raise UsageError(
                f"{self.where}: {table} has columns of other types than its rows: {wrong}",
                hint="this table was not made by a bridge: choose another --schema",
            )
        self._known[table] = {**there, **wanted}

    def _columns(self, table: str) -> dict[str, str]:
        found = self._connect().execute(
            "SELECT a.attname, format_type(a.atttypid, NULL) FROM pg_attribute a"
            " JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped",
            (self._schema, table),
        )
        return {name: kind.replace("timestamp with time zone", "timestamptz") for name, kind in found}

    def _connect(self) -> psycopg.Connection:
        if self._connection is None or self._connection.closed:
            self._known.clear()
            # Committed is on the server's disk, whatever its default is: the store will not send it again.
            self._connection = self._psycopg.connect(
                self._url,
                autocommit=True,
                connect_timeout=10,
                options="-c synchronous_commit=on -c timezone=UTC",
            )
            self._prepare(self._connection)
        return self._connection

    def _prepare(self, connection: psycopg.Connection) -> None:
        with connection.transaction():
            # Two that start at once would both make the schema, and one would fail.
            connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('edgeward bridge', 0))")
            connection.execute(self._statement("CREATE SCHEMA IF NOT EXISTS {schema}"))
            connection.execute(
                self._statement(
                    "CREATE TABLE IF NOT EXISTS {cursor} (bridge text, source text, position text NOT NULL,"
                    " PRIMARY KEY (bridge, source))"
                )
            )
        found = connection.execute("SELECT 1 FROM pg_extension WHERE extname = 'timescaledb'").fetchone()
        self._timescale = found is not None

    def _statement(self, text: Any) -> psycopg.sql.Composed:
        return self._sql.SQL(text).format(
            schema=self._sql.Identifier(self._schema),
            cursor=self._sql.Identifier(self._schema, "bridge_positions"),
        )

    @contextlib.contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        failures = self._psycopg
        try:
            yield
        except (failures.OperationalError, failures.InterfaceError) as error:
            # A statement cannot say what became of the connection: begin anew.
            self.close()
            self._connection = None
            raise Unavailable(
                f"{self.where}: {_first_line(error)}",
                hint="check the server, the database's name and the password (PGPASSFILE)",
            ) from None
        except failures.Error as error:
            self._known.clear()
            raise EdgewardError(
                f"{self.where}: {_first_line(error)}",
                hint="the bridge needs CREATE on the database or its schema, and tables that bridges made",
            ) from None
        except EdgewardError:
            self._known.clear()  # what was declared in the transaction is gone with it
            raise


def _packed(position: Position) -> str:
    return msgspec.json.encode(position, order="deterministic").decode()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
