"""Rows of an agent that kept its outbox in `state.db` move into the outbox's own file, once.

First everything is copied, in the transaction that makes the outbox; then the old tables go. A kill between
the two leaves both, and the next start finds the epoch here and only drops.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from agent.outbox.rows import TrendChange
from agent.outbox.tables import OutboxTables
from edgeward.wire.topics import LANES

_CHUNK = 5000
_TABLES = ("outbox", "lane", "source", "trend")


def _has_outbox(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM sqlite_master WHERE name='outbox'").fetchone() is not None


def take_over(tables: OutboxTables, older: Path) -> None:
    """Copy epoch, lanes, rows, positions and open trends; to be called in a transaction of the outbox."""
    if not older.exists():
        return
    old = sqlite3.connect(f"file:{older}?mode=ro", uri=True, isolation_level=None, timeout=30)
    try:
        if not _has_outbox(old):
            return
        (epoch,) = old.execute("SELECT value FROM meta WHERE key='epoch'").fetchone()
        if tables.db.execute("SELECT 1 FROM lane WHERE epoch=?", (epoch,)).fetchone() is not None:
            return
        for name, next_seq in old.execute("SELECT name, next_seq FROM lane").fetchall():
            if name not in LANES:
                continue
            lane = tables.open_lane(epoch, name, next_seq)
            rows = old.execute("SELECT seq, row FROM outbox WHERE lane=? ORDER BY seq", (name,))
            while portion := rows.fetchmany(_CHUNK):
                tables.insert(lane.id, portion, 0)
        # An agent that was put back to an older version for a while has newer ones than this file.
        tables.db.execute("INSERT OR IGNORE INTO meta VALUES ('epoch', ?)", (epoch,))
        tables.db.executemany(
            "INSERT OR REPLACE INTO source VALUES (?,?,?)",
            old.execute("SELECT topic, epoch, seq FROM source"),
        )
        begun: set[str] = set()
        for stream, change in old.execute("SELECT stream, change FROM trend ORDER BY stream, n"):
            tables.noted(TrendChange(stream, change, whole=stream not in begun))
            begun.add(stream)
    finally:
        old.close()


def drop_taken(older: Path) -> None:
    """The old tables go: the outbox holds all of them, durably."""
    if not older.exists():
        return
    old = sqlite3.connect(older, isolation_level=None, timeout=30)
    try:
        old.execute("PRAGMA synchronous=FULL")
        if _has_outbox(old):
            old.execute("BEGIN IMMEDIATE")
            for table in _TABLES:
                old.execute(f"DROP TABLE IF EXISTS {table}")
            old.execute("DELETE FROM meta WHERE key='epoch'")
            old.execute("COMMIT")
    finally:
        old.close()
