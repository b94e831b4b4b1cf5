"""How far the bridges of a store are."""

from __future__ import annotations

import datetime
import fcntl
import os
from pathlib import Path

from msgspec import Struct

from trends.bridges.cursor import Cursor, cursors
from trends.bridges.feed import Skipped
from trends.store import Store


class Line(Struct, frozen=True):
    """One table of a bridge; `behind` counts commits that are settled and not handed on yet."""

    bridge: str
    kind: str
    target: str
    table: str
    rows: int
    behind: int
    skipped_rows: int
    skipped: list[Skipped]
    last: str
    running: bool
    problem: str


def bridge_status(folder: Path, journal: str = "") -> list[Line]:
    """Raises NotFound where there is no trend store."""
    store = Store(folder, journal=journal)
    try:
        return [line for cursor in cursors(folder) for line in _of(cursor, store, folder)]
    finally:
        store.close()


def _of(cursor: Cursor, store: Store, folder: Path) -> list[Line]:
    running = is_locked(folder / "bridges" / f"{cursor.name}.lock")
    return [
        Line(
            cursor.name,
            cursor.state.kind,
            cursor.state.target,
            table,
            lane.rows,
            max(store.journal.flushed(table) - lane.position.version, 0),
            lane.skipped_rows,
            lane.skipped,
            datetime.datetime.fromtimestamp(lane.changed, datetime.UTC).isoformat("T", "seconds")
            if lane.changed
            else "",
            running,
            cursor.state.problem,
        )
        for table, lane in cursor.state.tables.items()
    ]


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a bridge."""
    try:
        lock = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(lock)
