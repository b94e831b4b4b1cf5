"""The trend store's journal: durable before it is acknowledged.

Batches wait here until the Delta table that holds their rows is on disk; the position of each (site,
device, epoch, lane) stays for ever, since it is what tells a repeat from a new row.
"""

from __future__ import annotations

import secrets
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
from trends.databases import Database, Sqlite
from trends.sequence import SequenceId, Settled

_SCHEMA = (
    "position (site TEXT, device TEXT, epoch TEXT, lane TEXT, expected {long} NOT NULL, above {bytes},"
    " PRIMARY KEY (site, device, epoch, lane))",
    "batch (id {serial}, site TEXT, device TEXT, epoch TEXT, lane TEXT, first_seq {long}, count {long},"
    " received {long}, rows {bytes} NOT NULL)",
    "gap (id {serial}, site TEXT, device TEXT, epoch TEXT, lane TEXT, first_seq {long}, last_seq {long},"
    " reason TEXT, first_event_time {long}, last_event_time {long}, received {long}, count {long})",
    "quarantine (id {serial}, received {long}, topic TEXT, seq {long}, reason TEXT, row {bytes})",
    "meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "certificate (keyid TEXT PRIMARY KEY, der {bytes} NOT NULL)",
)

#: What journals of earlier versions lack.
_ADDED = (("position", "above", "bytes"), ("gap", "count", "long"))

#: Refused rows are evidence, not data: a flood of them must not fill the disk.
MAX_QUARANTINED = 10_000
#: Entries that are read at once at most.
MAX_ENTRIES = 10_000

_GAPS = (
    "SELECT id, site, device, epoch, lane, first_seq, last_seq, reason, first_event_time,"
    " last_event_time, received, coalesce(count, last_seq - first_seq + 1) FROM gap"
)

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

    `identity` names this journal in the tables' application transactions: ids start again in a new one.
    """

    def __init__(self, database: Database | Path) -> None:
        """A path is that of a SQLite file, made when it is missing."""
        self._lock = threading.RLock()
        self._db = Sqlite(database) if isinstance(database, Path) else database
        self._new_batches: list[tuple[object, ...]] = []
        self._new_gaps: list[tuple[object, ...]] = []
        with self._lock, self._db.transaction():
            self._db.alone("schema")
            for declared in _SCHEMA:
                self._db.run(f"CREATE TABLE IF NOT EXISTS {declared.format(**self._db.types)}")
            self._db.run("CREATE INDEX IF NOT EXISTS batch_of_lane ON batch (lane, id)")
            for table, column, kind in _ADDED:
                if column not in self._db.columns(table):
                    self._db.run(f"ALTER TABLE {table} ADD COLUMN {column} {self._db.types[kind]}")
            if isinstance(self._db, Sqlite):
                _take_over_rows(self._db)
            self._db.run(
                "INSERT INTO meta VALUES ('identity', ?) ON CONFLICT DO NOTHING", (secrets.token_hex(8),)
            )
            self.identity: str = self._db.run("SELECT value FROM meta WHERE key='identity'")[0][0]

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def leads(self) -> bool:
        """Whether rows are moved to the tables from here, and not by another ingester of the same journal."""
        return self._db.leads()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._lock:
            self._new_batches, self._new_gaps = [], []
            with self._db.transaction():
                yield
                self._write_new()

    def _write_new(self) -> None:
        """Last of all, since ids must be in the order of the commits: tables know rows by the highest."""
        if not self._new_batches and not self._new_gaps:
            return
        self._db.in_order()
        self._db.run_many(
            "INSERT INTO batch (site, device, epoch, lane, first_seq, count, received, rows)"
            " VALUES (?,?,?,?,?,?,?,?)",
            self._new_batches,
        )
        self._db.run_many(
            "INSERT INTO gap (site, device, epoch, lane, first_seq, last_seq, reason,"
            " first_event_time, last_event_time, received, count) VALUES (?,?,?,?,?,?,?,?,?,?,?)",
            self._new_gaps,
        )

    # positions and rows

    def settled(self, name: DeviceName, epoch: str, lane: Lane) -> Settled | None:
        """The sequence numbers that are stored or lost, None for an epoch never seen.

        Inside a transaction: until its end no other ingester gets an answer for the same lane.
        """
        self._db.alone(f"{name} {epoch} {lane}")
        found = self._db.run(
            "SELECT expected, above FROM position WHERE site=? AND device=? AND epoch=? AND lane=?",
            (*name, epoch, lane),
        )
        if not found:
            return None
        return _settled(*found[0])

    def settle(self, name: DeviceName, epoch: str, lane: Lane, settled: Settled) -> None:
        self._db.run(
            "INSERT INTO position (site, device, epoch, lane, expected, above) VALUES (?,?,?,?,?,?)"
            " ON CONFLICT (site, device, epoch, lane) DO UPDATE SET expected = excluded.expected, above = excluded.above",
            (*name, epoch, lane, settled.expected, _encode(settled.above)),
        )

    def append(
        self, name: DeviceName, epoch: str, lane: Lane, received: int, first_seq: int, count: int, rows: bytes
    ) -> None:
        """Add rows with consecutive numbers, as they are in a Batch."""
        self._new_batches.append((*name, epoch, lane, first_seq, count, received, rows))

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
        self._new_gaps.append((*name, epoch, lane, *span, _text(reason), *times, received, count))

    # what was refused

    def quarantine(self, received: int, topic: str, seq: int | None, reason: str, row: bytes) -> None:
        """Keep a refused row or message with the reason; the oldest go when there are too many."""
        self._db.run(
            "INSERT INTO quarantine (received, topic, seq, reason, row) VALUES (?,?,?,?,?)",
            (received, _text(topic[:512]), seq, _text(reason[:1024]), row[:4096]),
        )
        self._db.run(
            "DELETE FROM quarantine WHERE id <= (SELECT max(id) FROM quarantine) - ?", (MAX_QUARANTINED,)
        )

    def quarantined(self) -> list[tuple[str, int | None, str]]:
        """`(topic, seq, reason)` of everything refused, oldest first."""
        with self._lock:
            return [
                (row[0], row[1], row[2])
                for row in self._db.run("SELECT topic, seq, reason FROM quarantine ORDER BY id")
            ]

    # certificates seen in births

    def remember_certificate(self, keyid: str, der: bytes) -> None:
        self._db.run("INSERT INTO certificate VALUES (?,?) ON CONFLICT DO NOTHING", (keyid, der))

    def certificate(self, keyid: str) -> bytes | None:
        with self._lock:
            found = self._db.run("SELECT der FROM certificate WHERE keyid=?", (keyid,))
        return bytes(found[0][0]) if found else None

    # towards the tables

    def newest(self) -> tuple[int, int]:
        """The highest ids of entries and of gaps that wait for their tables; 0 where none does."""
        with self._lock:
            (found,) = self._db.run(
                "SELECT coalesce((SELECT max(id) FROM batch), 0), coalesce((SELECT max(id) FROM gap), 0)"
            )
        return int(found[0]), int(found[1])

    def waiting(self, lane: Lane, limit: int, after: int = 0) -> list[Stored]:
        """The oldest entries of a lane behind id `after` that are not known to be in its table: one or more
        with `limit` rows together, or as many as there are."""
        with self._lock:
            # An entry is read when what lies before it leaves room.
            found = self._db.run(
                "SELECT id, site, device, epoch, first_seq, count, received, rows FROM"
                " (SELECT *, sum(count) OVER (ORDER BY id) AS reached FROM"
                " (SELECT * FROM batch WHERE lane=? AND id>? ORDER BY id LIMIT ?) AS oldest) AS summed"
                " WHERE reached <= ? OR reached = count ORDER BY id",
                (lane, after, MAX_ENTRIES, limit),
            )
        return [Stored(*row) for row in found]

    def everything(self, lane: Lane) -> list[Stored]:
        """All entries of a lane that are not known to be in its table, for an answer that must have them."""
        found: list[Stored] = []
        while part := self.waiting(lane, 1 << 60, found[-1].id if found else 0):
            found += part
        return found

    def waiting_gaps(self, limit: int) -> list[GapRow]:
        with self._lock:
            rows = self._db.run(f"{_GAPS} ORDER BY id LIMIT ?", (limit,))
        return [GapRow(*row) for row in rows]

    def find(self, sequence: SequenceId, span: Interval) -> list[Stored]:
        """The entries with numbers of `span` that are not known to be in their table."""
        with self._lock:
            found = self._db.run(
                "SELECT id, site, device, epoch, first_seq, count, received, rows FROM batch WHERE lane=?"
                " AND site=? AND device=? AND epoch=? AND first_seq<=? AND first_seq+count>? ORDER BY id",
                (sequence.lane, *sequence.name, sequence.epoch, span[1], span[0]),
            )
        return [Stored(*row) for row in found]

    def find_gaps(self, sequence: SequenceId, span: Interval) -> list[GapRow]:
        """The gaps with numbers of `span` that are not known to be in their table."""
        with self._lock:
            found = self._db.run(
                f"{_GAPS} WHERE site=? AND device=? AND epoch=? AND lane=? AND first_seq<=? AND last_seq>=?"
                " ORDER BY id",
                (*sequence.name, sequence.epoch, sequence.lane, span[1], span[0]),
            )
        return [GapRow(*row) for row in found]

    def positions(self) -> dict[SequenceId, Settled]:
        """What is settled of every sequence that was ever seen."""
        with self._lock:
            found = self._db.run("SELECT site, device, epoch, lane, expected, above FROM position")
        return {
            SequenceId(DeviceName(site, device), epoch, lane): _settled(expected, above)
            for site, device, epoch, lane, expected, above in found
        }

    def count(self) -> int:
        """Rows that wait for a table."""
        with self._lock:
            return int(self._db.run("SELECT coalesce(sum(count), 0) FROM batch")[0][0])

    def forget_rows(self, lane: Lane, last_id: int) -> None:
        """Drop rows up to `last_id`: their table is on disk."""
        with self.transaction():
            self._db.run("DELETE FROM batch WHERE lane=? AND id<=?", (lane, last_id))

    def forget_gaps(self, last_id: int) -> None:
        with self.transaction():
            self._db.run("DELETE FROM gap WHERE id<=?", (last_id,))

    def flushed(self, table: str) -> int:
        """Up to which version a table outlasts a power cut where it lies; -1 for none."""
        with self._lock:
            found = self._db.run("SELECT value FROM meta WHERE key=?", (f"flushed {table}",))
        return int(found[0][0]) if found else -1

    def set_flushed(self, table: str, version: int) -> None:
        with self.transaction():
            self._db.run(
                "INSERT INTO meta (key, value) VALUES (?,?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                (f"flushed {table}", str(version)),
            )


def _settled(expected: int, above: bytes | None) -> Settled:
    return Settled(expected, [] if above is None else _decode(above))


def _text(value: str) -> str:
    """What a sender chose, without the one character that PostgreSQL does not take."""
    return value.replace("\0", "\ufffd")


def _take_over_rows(database: Sqlite) -> None:
    """Rows that an earlier version kept one by one; their ids go on, since tables know them."""
    if not database.run("SELECT 1 FROM sqlite_master WHERE name='journal'"):
        return
    database.connection.create_function("as_batch", 1, lambda row: join_rows([row]), deterministic=True)
    database.run(
        "INSERT INTO batch SELECT id, site, device, epoch, lane, seq, 1, received, as_batch(row) FROM journal"
    )
    database.run("DELETE FROM sqlite_sequence WHERE name='batch'")
    database.run("INSERT INTO sqlite_sequence SELECT 'batch', seq FROM sqlite_sequence WHERE name='journal'")
    database.run("DROP TABLE journal")
