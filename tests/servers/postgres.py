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


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a fresh PostgreSQL server."""
    binaries = _postgres_folder()
    if binaries is None:
        pytest.skip("no PostgreSQL server binaries in /usr/lib/postgresql")
    pytest.importorskip("psycopg")
    # Not below pytest's folder, which the user postgres may not enter.
    base = Path(tempfile.mkdtemp(prefix="edgeward-pg-"))
    if _as_postgres():
        shutil.chown(base, "postgres")
    data, port = base / "data", free_port()
    run = _as_postgres()
    subprocess.run(
        [*run, str(binaries / "initdb"), "-D", str(data), "-A", "trust", "-U", "edgeward", "--no-sync"],
        check=True, capture_output=True, cwd="/",
    )  # fmt: skip
    options = f"-p {port} -k {base} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = [*run, str(binaries / "pg_ctl"), "-D", str(data)]
    log = base / "log"
    subprocess.run([*control, "-w", "-l", str(log), "-o", options, "start"], check=True, cwd="/",
                   stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        yield f"postgresql+psycopg://edgeward@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=False, capture_output=True, cwd="/")
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres: str) -> Iterator[str]:
    """A database of its own per test."""
    name = f"t{os.getpid()}_{threading.get_ident()}_{os.urandom(4).hex()}"
    admin = sqlalchemy.create_engine(postgres, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    yield postgres.rsplit("/", 1)[0] + f"/{name}"
    admin.dispose()
