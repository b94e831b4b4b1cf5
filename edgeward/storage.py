"""Durable writes: after a return the bytes survive a power cut, and a reader sees all or none."""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries (POSIX: a rename is durable only after its folder is)."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path, *, mode: int = 0o777) -> None:
    """Make `folder`, and those above it, if they are missing: durable, and so is what is fsynced in it."""
    if not folder.parent.is_dir():
        make_folder(folder.parent, mode=mode)
    folder.mkdir(mode=mode, exist_ok=True)
    # Also where it exists: whoever made it may have been killed before its entry was on the disk.
    fsync_folder(folder.parent)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `data`: write a temporary file, fsync, rename, fsync the folder."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """One SQLite transaction that writes; what was written is kept when the block has ended without an error.

    For a connection with `isolation_level=None`. Raises what the block raises, sqlite3.Error.
    """
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        # Of a full or broken disk SQLite has rolled back by itself; else the next one could not begin. The first
        # error says more than one of this.
        with suppress(sqlite3.Error):
            if database.in_transaction:
                database.execute("ROLLBACK")
        raise


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
