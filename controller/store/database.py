"""Opening the database and its transactions; the only module that knows which database it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import sqlalchemy
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, OperationalError
from sqlmodel import Session

from edgeward.errors import Conflict, MissingDependency, Unavailable, UsageError

_MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 0x45444745  # "EDGE": controllers that start at once migrate one after the other


class Store:
    """The database. `reading` and `writing` are its transactions; a failed `writing` changes nothing.

    Raises UsageError for an address that is none, MissingDependency without the driver, Unavailable
    when the database does not answer. Inside transactions: Conflict when a unique name exists already.
    """

    def __init__(self, url: str) -> None:
        try:
            self.engine = sqlalchemy.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        except (ArgumentError, NoSuchModuleError) as error:
            raise UsageError(
                f"--database: not a database address: {error}",
                hint="sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME",
            ) from None
        except ImportError:
            raise MissingDependency(
                "the PostgreSQL driver is not installed", hint="pip install 'edgeward[postgres]'"
            ) from None
        self._shown = self.engine.url.render_as_string(hide_password=True)
        if self.engine.dialect.name == "sqlite":
            sqlalchemy.event.listen(self.engine, "connect", _configure_sqlite)
            sqlalchemy.event.listen(self.engine, "begin", _begin_sqlite)
        self._migrate()

    def close(self) -> None:
        self.engine.dispose()

    def _migrate(self) -> None:
        config = alembic.config.Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        with self._translated(), self.engine.begin() as connection:
            if self.engine.dialect.name == "postgresql":
                connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise Conflict("it was made by someone else at the same time", hint="try again") from None
        except OperationalError as error:
            raise Unavailable(
                f"the database {self._shown} does not answer: {str(error.orig).splitlines()[0]}"
            ) from None
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            raise Unavailable(f"the connection to the database {self._shown} was lost") from None

    @contextmanager
    def reading(self) -> Iterator[Session]:
        with (
            self._translated(),
            self.engine.connect().execution_options(readonly=True) as connection,
            Session(connection, autoflush=False, expire_on_commit=False) as session,
        ):
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        with self._translated(), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def leads(self, session: Session) -> bool:
        """Whether this controller may decide until the transaction ends: one at a time on PostgreSQL."""
        if self.engine.dialect.name != "postgresql":
            return True
        found = session.connection().exec_driver_sql(f"SELECT pg_try_advisory_xact_lock({_LOCK + 1})")
        return bool(found.scalar())


def _configure_sqlite(connection: Any, record: Any) -> None:
    # The driver would begin transactions too late to keep a read and the write after it together.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sqlalchemy.Connection) -> None:
    readonly = connection.get_execution_options().get("readonly")
    connection.exec_driver_sql("BEGIN" if readonly else "BEGIN IMMEDIATE")
