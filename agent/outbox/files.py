"""The outbox's file: is it sound, and what becomes of one that is not."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

from agent.outbox.tables import Damaged
from edgeward.storage import fsync_folder

log = logging.getLogger(__name__)

#: Up to this size a file is read as a whole when it is opened: a second or two on slow flash. A larger one is
#: checked row by row as it is used.
CHECK_BYTES = 64 << 20
#: Damaged files that are kept as evidence once what could be read of them is safe.
KEPT = 2
#: SQLite's result codes for a file, or a disk under it, that does not give back what was written.
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}
_DAMAGE_IO = {sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS}


def damaged(error: sqlite3.Error) -> bool:
    """Whether the file is to blame, not a full disk or a lock.

    A table that is missing, or a number that is there twice, is damage as well: nothing here asks for either.
    """
    code = getattr(error, "sqlite_errorcode", None)
    if isinstance(error, Damaged):
        return True
    if code is None:  # Python's own: a text that is none
        return "decode" in str(error)
    missing = code == sqlite3.SQLITE_ERROR and "no such" in str(error)
    return code & 0xFF in _DAMAGE or code in _DAMAGE_IO or missing


def check(db: sqlite3.Connection, path: Path) -> None:
    """Raises Damaged, sqlite3.DatabaseError when the file's structure does not hold."""
    size = sum(file.stat().st_size for file in (path, wal(path)) if file.exists())
    if size > CHECK_BYTES:
        return
    (said,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if said != "ok":
        raise Damaged(f"quick_check: {str(said)[:200]}")


def wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def mark(path: Path) -> Path:
    return path.with_suffix(".mark")


def aside(path: Path) -> list[str]:
    """The names of damaged files, oldest first."""
    return sorted(file.name for file in path.parent.glob(f"{path.stem}.damaged-*.db"))


def put_aside(path: Path) -> str:
    """Rename the file, its log and its mark; the name it has now. Raises OSError.

    The log first: a new file must never meet the old one's log, which SQLite would play into it.
    """
    number = max((int(name.split("-")[1].removesuffix(".db")) for name in aside(path)), default=0) + 1
    name = f"{path.stem}.damaged-{number:04d}.db"
    target = path.with_name(name)
    if not path.exists():
        target.touch()
    for old, new in ((wal(path), wal(target)), (path, target), (mark(path), mark(target))):
        if old.exists():
            old.replace(new)
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    fsync_folder(path.parent)
    return name


def forget_oldest(path: Path) -> None:
    """Keep the newest damaged files only; those that are not salvaged yet are the newest."""
    for name in aside(path)[:-KEPT]:
        file = path.with_name(name)
        for part in (file, wal(file), mark(file), file.with_name(name + "-shm")):
            part.unlink(missing_ok=True)
