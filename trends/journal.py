"""The trend store's journal: durable before it is acknowledged.

One SQLite file (WAL, synchronous=FULL). Rows wait here until the Delta table that holds them is on
disk; the position of each (site, device, epoch, lane) stays for ever, since it is what tells a repeat
from a new row.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgeward.identifiers import DeviceName
from edgeward.intervals import Interval
from edgeward.wire.rows import join_rows
from edgeward.wire.topics import Lane
from trends.sequence import Settled

_SCHEMA = """
CREATE TABLE IF NOT EXISTS position (
    site TEXT, device TEXT, epoch TEXT, lane TEXT, expected INTEGER NOT NULL, above BLOB NOT NULL DEFAULT x'90',
    PRIMARY KEY (site, device, epoch, lane)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batch (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    site TEXT, device TEXT, epoch TEXT, lane TEXT, first_seq INTEGER, count INTEGER, received INTEGER,
    rows BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS batch_of_lane ON batch (lane, id);
CREATE TABLE IF NOT EXISTS gap (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    site TEXT, device TEXT, epoch TEXT, lane TEXT, first_seq INTEGER, last_seq INTEGER, reason TEXT,
    first_event_time INTEGER, last_event_time INTEGER, received INTEGER, count INTEGER);
CREATE TABLE IF NOT EXISTS quarantine (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    received INTEGER, topic TEXT, seq INTEGER, reason TEXT, row BLOB);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS certificate (keyid TEXT PRIMARY KEY, der BLOB NOT NULL) WITHOUT ROWID;
"""

#: What journals of earlier versions lack: x'90' is an empty MessagePack array.
_ADDED = (
    ("position", "above", "BLOB NOT NULL DEFAULT x'90'"),
    ("gap", "count", "INTEGER"),
)

#: Refused rows are evidence, not data: a flood of them must not fill the disk.
MAX_QUARANTINED = 10_000

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Interval]).decode


@dataclass(frozen=True)
class Stored:
    """Rows `first_seq .. first_seq + count - 1` of one lane, as one entry of the journal.

    `rows` is as in a Batch (zstd MessagePack, an array of the lane's row type), `received` microseconds
    since 1970.
    """

    id: int
    site: str
    device: str
    epoch: str
    first_seq: int
    count: int
    received: int
    rows: bytes


@dataclass(frozen=True)
class GapRow:
    """`count` of the rows `first_seq .. last_seq` that nobody holds any more, for one reason.

    Rows of a range may be lost for several reasons: then it has one of these for each, and the counts add up.
    """

    id: int
    site: str
    device: str
    epoch: str
    lane: str
    first_seq: int
    last_seq: int
    reason: str
    first_event_time: int
    last_event_time: int
    received: int
    count: int


class Journal:
    """Thread-safe; every write happens inside `transaction`, which is durable when it returns.

    `identity` names this journal in the tables' application transactions: row ids start again in a
    new one.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        for table, column, declared in _ADDED:
            if column not in {row[1] for row in self._db.execute(f"PRAGMA table_info({table})")}:
                self._db.execute(f"ALTER TABLE {table} ADD COLUMN {column} {declared}")
        self._take_over_rows()
        self._db.execute("INSERT OR IGNORE INTO meta VALUES ('identity', ?)", (secrets.token_hex(8),))
        self.identity: str = self._db.execute("SELECT value FROM meta WHERE key='identity'").fetchone()[0]

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _take_over_rows(self) -> None:
        """Rows that an earlier version kept one by one; their ids go on, since tables know them."""
        if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name='journal'").fetchone():
            return
        with self.transaction():
            self._db.create_function("as_batch", 1, lambda row: join_rows([row]), deterministic=True)
            self._db.execute(
                "INSERT INTO batch"
                " SELECT id, site, device, epoch, lane, seq, 1, received, as_batch(row) FROM journal"
            )
            self._db.execute("DELETE FROM sqlite_sequence WHERE name='batch'")
            self._db.execute(
                "INSERT INTO sqlite_sequence SELECT 'batch', seq FROM sqlite_sequence WHERE name='journal'"
            )
            self._db.execute("DROP TABLE journal")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # positions and rows

    def settled(self, name: DeviceName, epoch: str, lane: Lane) -> Settled | None:
        """The sequence numbers that are stored or lost, None for an epoch never seen."""
        with self._lock:
            row = self._db.execute(
                "SELECT expected, above FROM position WHERE site=? AND device=? AND epoch=? AND lane=?",
                (*name, epoch, lane),
            ).fetchone()
        return None if row is None else Settled(row[0], _decode(row[1]))

    def settle(self, name: DeviceName, epoch: str, lane: Lane, settled: Settled) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO position VALUES (?,?,?,?,?,?)",
            (*name, epoch, lane, settled.expected, _encode(settled.above)),
        )

    def append(
        self, name: DeviceName, epoch: str, lane: Lane, received: int, first_seq: int, count: int, rows: bytes
    ) -> None:
        """Add rows with consecutive numbers, as they are in a Batch."""
        self._db.execute(
            "INSERT INTO batch (site, device, epoch, lane, first_seq, count, received, rows)"
            " VALUES (?,?,?,?,?,?,?,?)",
            (*name, epoch, lane, first_seq, count, received, rows),
        )

    def append_gap(
        self,
        name: DeviceName,
        epoch: str,
        lane: Lane,
        received: int,
        span: tuple[int, int],
        reason: str,
        times: tuple[int, int] = (0, 0),
        count: int | None = None,
    ) -> None:
        """Note that rows `span` are lost: all of them, or `count`."""
        count = span[1] - span[0] + 1 if count is None else count
        self._db.execute(
            "INSERT INTO gap (site, device, epoch, lane, first_seq, last_seq, reason,"
            " first_event_time, last_event_time, received, count) VALUES (?,?,?,?,?,?,?,?,?,?,?)",
            (*name, epoch, lane, *span, reason, *times, received, count),
        )

    # what was refused

    def quarantine(self, received: int, topic: str, seq: int | None, reason: str, row: bytes) -> None:
        """Keep a refused row or message with the reason; the oldest go when there are too many."""
        self._db.execute(
            "INSERT INTO quarantine (received, topic, seq, reason, row) VALUES (?,?,?,?,?)",
            (received, topic[:512], seq, reason[:1024], row[:4096]),
        )
        self._db.execute(
            "DELETE FROM quarantine WHERE id <= (SELECT max(id) FROM quarantine) - ?", (MAX_QUARANTINED,)
        )

    def quarantined(self) -> list[tuple[str, int | None, str]]:
        """`(topic, seq, reason)` of everything refused, oldest first."""
        with self._lock:
            return self._db.execute("SELECT topic, seq, reason FROM quarantine ORDER BY id").fetchall()

    # certificates seen in births

    def remember_certificate(self, keyid: str, der: bytes) -> None:
        self._db.execute("INSERT OR IGNORE INTO certificate VALUES (?,?)", (keyid, der))

    def certificate(self, keyid: str) -> bytes | None:
        with self._lock:
            row = self._db.execute("SELECT der FROM certificate WHERE keyid=?", (keyid,)).fetchone()
        return None if row is None else bytes(row[0])

    # towards the tables

    def waiting(self, lane: Lane, limit: int, after: int = 0) -> list[Stored]:
        """The oldest entries of a lane behind id `after` that are not known to be in its table: one or more
        with `limit` rows together, or as many as there are."""
        found: list[Stored] = []
        rows = 0
        with self._lock:
            for row in self._db.execute(
                "SELECT id, site, device, epoch, first_seq, count, received, rows FROM batch"
                " WHERE lane=? AND id>? ORDER BY id",
                (lane, after),
            ):
                entry = Stored(*row)
                if found and rows + entry.count > limit:
                    break
                found.append(entry)
                rows += entry.count
        return found

    def waiting_gaps(self, limit: int) -> list[GapRow]:
        with self._lock:
            rows = self._db.execute(
                "SELECT id, site, device, epoch, lane, first_seq, last_seq, reason, first_event_time,"
                " last_event_time, received, coalesce(count, last_seq - first_seq + 1)"
                " FROM gap ORDER BY id LIMIT ?",
                (limit,),
            ).fetchall()
        return [GapRow(*row) for row in rows]

    def count(self) -> int:
        """Rows that wait for a table."""
        with self._lock:
            return int(self._db.execute("SELECT coalesce(sum(count), 0) FROM batch").fetchone()[0])

    def forget_rows(self, lane: Lane, last_id: int) -> None:
        """Drop rows up to `last_id`: their table is on disk."""
        with self.transaction():
            self._db.execute("DELETE FROM batch WHERE lane=? AND id<=?", (lane, last_id))

    def forget_gaps(self, last_id: int) -> None:
        with self.transaction():
            self._db.execute("DELETE FROM gap WHERE id<=?", (last_id,))

    def flushed(self, table: str) -> int:
        """Up to which version a table outlasts a power cut where it lies; -1 for none."""
        with self._lock:
            row = self._db.execute("SELECT value FROM meta WHERE key=?", (f"flushed {table}",)).fetchone()
        return -1 if row is None else int(row[0])

    def set_flushed(self, table: str, version: int) -> None:
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?,?)", (f"flushed {table}", str(version)))
