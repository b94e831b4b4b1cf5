"""A real PostgreSQL server for tests, started once and ended by its own process."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from edgeward.broker import free_port


def _postgres_folder() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


def _as_postgres() -> list[str]:
    """PostgreSQL refuses to run as root."""
    return ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []


class PostgresServer:
    """A fresh server on a free port of loopback; `crash` is its kill -9, after which it recovers."""

    def __init__(self, *, fsync: bool = False) -> None:
        binaries = _postgres_folder()
        if binaries is None:
            pytest.skip("no PostgreSQL server binaries in /usr/lib/postgresql")
        pytest.importorskip("psycopg")
        # Not below pytest's folder, which the user postgres may not enter.
        self._base = Path(tempfile.mkdtemp(prefix="edgeward-pg-"))
        run = _as_postgres()
        if run:
            shutil.chown(self._base, "postgres")
        data, self.port = self._base / "data", free_port()
        subprocess.run(
            [*run, str(binaries / "initdb"), "-D", str(data), "-A", "trust", "-U", "edgeward", "--no-sync"],
            check=True, capture_output=True, cwd="/",
        )  # fmt: skip
        self._options = f"-p {self.port} -k {self._base} -c listen_addresses=127.0.0.1 -c fsync={'on' if fsync else 'off'}"
        self._control = [*run, str(binaries / "pg_ctl"), "-D", str(data)]
        self.url = f"postgresql+psycopg://edgeward@127.0.0.1:{self.port}/postgres"
        self.start()

    def start(self) -> None:
        subprocess.run(
            [*self._control, "-w", "-l", str(self._base / "log"), "-o", self._options, "start"],
            check=True, cwd="/", stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def crash(self) -> None:
        subprocess.run([*self._control, "-m", "immediate", "stop"], check=False, capture_output=True, cwd="/")

    def remove(self) -> None:
        self.crash()
        shutil.rmtree(self._base, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of a fresh PostgreSQL server."""
    server = PostgresServer()
    try:
        yield server.url
    finally:
        server.remove()


@pytest.fixture
def postgres_url(postgres: str) -> Iterator[str]:
    """A database of its own per test."""
    name = f"t{os.getpid()}_{threading.get_ident()}_{os.urandom(4).hex()}"
    admin = sqlalchemy.create_engine(postgres, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    yield postgres.rsplit("/", 1)[0] + f"/{name}"
    admin.dispose()
