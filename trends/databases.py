"""What a journal is kept in: one SQLite file for one ingester, or PostgreSQL for several.

Both take the same SQL with `?` for parameters; what differs stands here.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from urllib.parse import urlsplit

from edgeward.errors import MissingDependency, Unavailable, UsageError
from edgeward.storage import transaction

if TYPE_CHECKING:
    import psycopg

Row = tuple[Any, ...]


class Database(Protocol):
    """One connection, for one thread at a time: `Journal` sees to that."""

    #: Column types: `serial` numbers rows in the order in which they are written.
    types: ClassVar[dict[str, str]]

    def run(self, statement: str, parameters: Sequence[object] = ()) -> list[Row]: ...

    def run_many(self, statement: str, rows: Sequence[Sequence[object]]) -> None: ...

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Durable when it returns."""

    def alone(self, name: str) -> None:
        """Until the transaction's end nobody else is alone for this name; waits for who is."""

    def in_order(self) -> None:
        """Until the transaction's end nobody else gets serial numbers: lower ones are visible before higher."""

    def leads(self) -> bool:
        """Whether this is the one connection that moves rows to the tables."""

    def columns(self, table: str) -> set[str]: ...

    def close(self) -> None: ...


class Sqlite:
    """A file of our own (WAL, synchronous=FULL)."""

    types: ClassVar[dict[str, str]] = {
        "serial": "INTEGER PRIMARY KEY AUTOINCREMENT",
        "bytes": "BLOB",
        "long": "INTEGER",
    }

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=FULL")

    def run(self, statement: str, parameters: Sequence[object] = ()) -> list[Row]:
        return self.connection.execute(statement, parameters).fetchall()

    def run_many(self, statement: str, rows: Sequence[Sequence[object]]) -> None:
        self.connection.executemany(statement, rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with transaction(self.connection):
            yield

    def alone(self, name: str) -> None:
        """Nobody else has a connection."""

    def in_order(self) -> None:
        """Nobody else writes."""

    def leads(self) -> bool:
        return True

    def columns(self, table: str) -> set[str]:
        return {row[1] for row in self.run(f"PRAGMA table_info({table})")}

    def close(self) -> None:
        self.connection.close()


#: First halves of advisory lock keys: so that other programs in the same database are not met.
_ORDER, _LEADER = 0x0ED9E001, 0x0ED9E002


class Postgres:
    """A database of a server, which several ingesters use. A lost connection is made again by the next transaction."""

    types: ClassVar[dict[str, str]] = {"serial": "BIGSERIAL PRIMARY KEY", "bytes": "BYTEA", "long": "BIGINT"}

    def __init__(self, url: str) -> None:
        """`url` is `postgresql://user@host:port/database`; a password comes best from PGPASSFILE.

        Raises UsageError for another kind of address, Unavailable when the server does not answer.
        """
        if urlsplit(url).scheme != "postgresql":
            raise UsageError(
                "the journal's address is not PostgreSQL's",
                hint="expected postgresql://user@host:port/database",
            )
        try:
            import psycopg
        except ImportError:
            raise MissingDependency(
                "psycopg is not installed", hint="pip install 'edgeward[postgres]'"
            ) from None
        self._psycopg = psycopg
        self._url = url
        self._connection: psycopg.Connection | None = None
        self._leader: psycopg.Connection | None = None
        self._leading = threading.Lock()
        self._connect()

    def _connect(self) -> psycopg.Connection:
        if self._connection is None or self._connection.closed:
            self._connection = self._open()
        return self._connection

    def _open(self) -> psycopg.Connection:
        try:
            # Commits are durable on the server whatever its default is.
            return self._psycopg.connect(
                self._url, autocommit=True, connect_timeout=10, options="-c synchronous_commit=on"
            )
        except self._psycopg.OperationalError as error:
            where = urlsplit(self._url)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no answer"
            raise Unavailable(
                f"the journal's database at {where.hostname}:{where.port or 5432} cannot be used: {reason}",
                hint="check the server, the database's name and the password (PGPASSFILE)",
            ) from None

    def run(self, statement: str, parameters: Sequence[object] = ()) -> list[Row]:
        cursor = self._connect().execute(_numbered(statement), parameters)
        return cursor.fetchall() if cursor.description is not None else []

    def run_many(self, statement: str, rows: Sequence[Sequence[object]]) -> None:
        with self._connect().cursor() as cursor:
            cursor.executemany(_numbered(statement), rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._connect().transaction():
            yield

    def alone(self, name: str) -> None:
        self.run("SELECT pg_advisory_xact_lock(hashtextextended(?, 0))", (name,))

    def in_order(self) -> None:
        self.run("SELECT pg_advisory_xact_lock(?, 0)", (_ORDER,))

    def leads(self) -> bool:
        # On a connection of its own: the lock goes with it, whatever becomes of this process.
        with self._leading:
            try:
                if self._leader is None or self._leader.closed:
                    self._leader = self._open()
                    found = self._leader.execute("SELECT pg_try_advisory_lock(%s, 0)", (_LEADER,)).fetchone()
                    if not (found and found[0]):
                        self._leader.close()
                        return False
                else:
                    self._leader.execute("SELECT 1")
            except self._psycopg.OperationalError:
                if self._leader is not None:
                    self._leader.close()
                return False
            return True

    def columns(self, table: str) -> set[str]:
        found = self.run(
            "SELECT column_name FROM information_schema.columns"
            " WHERE table_schema = current_schema() AND table_name = ?",
            (table,),
        )
        return {row[0] for row in found}

    def close(self) -> None:
        for connection in (self._connection, self._leader):
            if connection is not None:
                connection.close()


def _numbered(statement: str) -> Any:
    """`?` as psycopg's `%s`; our statements have neither in texts."""
    return re.sub(r"\?", "%s", statement)
