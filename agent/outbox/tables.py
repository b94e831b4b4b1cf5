"""The tables of `outbox.db`, and each change to them that keeps the books: to be called in a transaction.

In a lane every number from its floor to `next_seq` is a row, or in a gap record, or acknowledged.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import msgspec

from agent.outbox.eviction import GAP_BYTES, ROW_BYTES, Degree, Tally, cut, joined
from agent.outbox.rows import Discarded, Found, Part, TrendChange, check, guarded, unguarded
from edgeward.intervals import contains, missing, runs, size, union
from edgeward.wire.rows import MAX_BATCH_LOST, Lost
from edgeward.wire.topics import LANES, Lane

#: `loading` lanes are still being salvaged and not to be sent; `lost` counts since the lane began; `sent` rows
#: may be at the store already; `born` is the outbox's age in seconds when the row came.
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lane (
    id INTEGER PRIMARY KEY, epoch TEXT NOT NULL, name TEXT NOT NULL, next_seq INTEGER NOT NULL,
    rows INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0, lost INTEGER NOT NULL DEFAULT 0,
    level INTEGER NOT NULL DEFAULT 0, at INTEGER NOT NULL DEFAULT 0, loading INTEGER NOT NULL DEFAULT 0,
    UNIQUE (epoch, name));
CREATE TABLE IF NOT EXISTS row (
    lane INTEGER, seq INTEGER, born INTEGER, crc INTEGER, data BLOB NOT NULL, sent INTEGER,
    PRIMARY KEY (lane, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS gap (
    lane INTEGER, first INTEGER, last INTEGER, first_event_time INTEGER, last_event_time INTEGER, reasons BLOB,
    PRIMARY KEY (lane, first)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS source (topic TEXT PRIMARY KEY, epoch TEXT, seq INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS trend (stream TEXT, n INTEGER, change BLOB NOT NULL, PRIMARY KEY (stream, n)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS salvaged (name TEXT PRIMARY KEY) WITHOUT ROWID;
"""

#: Rows in one statement: each step of `executemany` gives up the interpreter and waits to get it back.
_INSERTED = 100
_encode = msgspec.msgpack.Encoder().encode
_reasons = msgspec.msgpack.Decoder(dict[str, int]).decode


class Damaged(sqlite3.DatabaseError):
    """What is in the file cannot be what was written."""


class LaneRow(NamedTuple):
    id: int
    epoch: str
    name: Lane
    next_seq: int
    rows: int
    bytes: int
    lost: int
    level: int
    at: int
    loading: int

    @property
    def degree(self) -> Degree:
        return Degree(self.level, self.at)


@dataclass(frozen=True)
class Held:
    """A row as it is kept; `data` is None when its check fails."""

    seq: int
    born: int
    data: bytes | None
    size: int


class OutboxTables:
    """Over an open connection."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    # lanes

    def lanes(self) -> list[LaneRow]:
        return [_lane(row) for row in self.db.execute("SELECT * FROM lane ORDER BY id")]

    def lane(self, epoch: str, name: Lane) -> LaneRow | None:
        row = self.db.execute("SELECT * FROM lane WHERE epoch=? AND name=?", (epoch, name)).fetchone()
        return None if row is None else _lane(row)

    def open_lane(self, epoch: str, name: Lane, next_seq: int = 0, *, loading: bool = False) -> LaneRow:
        """The lane, made when there is none."""
        self.db.execute(
            "INSERT OR IGNORE INTO lane (epoch, name, next_seq, loading) VALUES (?,?,?,?)",
            (epoch, name, next_seq, loading),
        )
        return cast(LaneRow, self.lane(epoch, name))

    def holds(self, lane: int, seq: int) -> bool:
        """Whether a number is a row or in a gap record."""
        row = self.db.execute("SELECT 1 FROM row WHERE lane=? AND seq=?", (lane, seq)).fetchone()
        return row is not None or bool(self.gaps(lane, seq, 1, last=seq))

    def floor(self, lane: LaneRow) -> int:
        """The lowest number that is neither acknowledged nor to come."""
        (row,) = self.db.execute("SELECT min(seq) FROM row WHERE lane=?", (lane.id,)).fetchone()
        (gap,) = self.db.execute("SELECT min(first) FROM gap WHERE lane=?", (lane.id,)).fetchone()
        return min(lane.next_seq if row is None else row, lane.next_seq if gap is None else gap)

    def set_degree(self, lane: int, degree: Degree) -> None:
        self.db.execute("UPDATE lane SET level=?, at=? WHERE id=?", (degree.level, degree.at, lane))

    def _count(self, lane: int, rows: int, size: int, lost: int = 0) -> None:
        self.db.execute(
            "UPDATE lane SET rows=rows+?, bytes=bytes+?, lost=lost+? WHERE id=?", (rows, size, lost, lane)
        )

    # rows

    def append(self, lane: LaneRow, encoded: list[bytes], born: int) -> LaneRow:
        """Number rows on; the lane afterwards, but for its counts."""
        first = lane.next_seq
        self.insert(lane.id, list(enumerate(encoded, first)), born)
        self.db.execute("UPDATE lane SET next_seq=? WHERE id=?", (first + len(encoded), lane.id))
        return lane._replace(next_seq=first + len(encoded))

    def discard(self, lane: LaneRow, discarded: Discarded) -> LaneRow:
        """Number rows that could not be written, and note that they are lost; the lane afterwards."""
        next_seq = lane.next_seq + discarded.count
        times = (discarded.first_event_time, discarded.last_event_time)
        self.record(lane.id, [Tally(lane.next_seq, next_seq - 1, *times, {"disk-full": discarded.count})])
        self.db.execute("UPDATE lane SET next_seq=? WHERE id=?", (next_seq, lane.id))
        return lane._replace(next_seq=next_seq)

    def insert(self, lane: int, rows: list[tuple[int, bytes]], born: int) -> None:
        """Numbered rows that are not there yet."""
        size = 0
        for start in range(0, len(rows), _INSERTED):
            part = rows[start : start + _INSERTED]
            values: list[object] = []
            for seq, data in part:
                values += (lane, seq, born, check(lane, seq, data), data)
                size += len(data) + ROW_BYTES
            self.db.execute(f"INSERT INTO row VALUES {','.join(['(?,?,?,?,?,0)'] * len(part))}", values)  # noqa: S608  # only placeholders
        self._count(lane, len(rows), size)

    def insert_missing(self, lane: int, rows: list[tuple[int, bytes]], born: int) -> None:
        """Those of the rows, ascending, whose numbers are not accounted for yet."""
        first, last = rows[0][0], rows[-1][0]
        have = runs(
            seq
            for (seq,) in self.db.execute(
                "SELECT seq FROM row WHERE lane=? AND seq BETWEEN ? AND ? ORDER BY seq", (lane, first, last)
            )
        )
        for gap in self.gaps(lane, first, 1 << 31, last=last):
            have = union(have, gap.first, gap.last)
        self.insert(lane, [row for row in rows if not contains(have, row[0])], born)

    def held(
        self, lane: int, first: int, limit: int, *, below: int | None = None, unsent: bool = False
    ) -> Iterator[Held]:
        """Rows from `first` on (and `below` a number), ascending."""
        rows = self.db.execute(
            "SELECT seq, born, crc, data FROM row WHERE lane=? AND seq>=? AND seq<? AND sent<=?"
            " ORDER BY seq LIMIT ?",
            (lane, first, 1 << 62 if below is None else below, 0 if unsent else 1, limit),
        )
        for seq, born, crc, data in rows:
            sound = isinstance(data, bytes) and check(lane, seq, data) == crc
            yield Held(seq, born, data if sound else None, len(data) + ROW_BYTES)

    def replace(self, lane: int, seq: int, data: bytes) -> None:
        """Another row under the same number."""
        (old,) = self.db.execute(
            "SELECT length(data) FROM row WHERE lane=? AND seq=?", (lane, seq)
        ).fetchone()
        self.db.execute(
            "UPDATE row SET data=?, crc=? WHERE lane=? AND seq=?", (data, check(lane, seq, data), lane, seq)
        )
        self._count(lane, 0, len(data) - old)

    def mark_sent(self, lane: int, first: int, last: int) -> None:
        self.db.execute("UPDATE row SET sent=1 WHERE lane=? AND seq BETWEEN ? AND ?", (lane, first, last))

    def expired(self, lane: int, born: int) -> int:
        """The number below which all rows came before `born`: ages grow with the numbers."""
        row = self.db.execute(
            "SELECT seq FROM row WHERE lane=? AND born>=? ORDER BY seq LIMIT 1", (lane, born)
        ).fetchone()
        return 1 << 62 if row is None else int(row[0])

    # losses

    def lose(self, lane: int, rows: Iterable[Held], records: list[Tally]) -> None:
        """These rows die; `records` (ascending) say so, one for each run of their numbers."""
        gone = [(lane, row.seq) for row in rows]
        size = sum(row.size for row in rows)
        self.db.executemany("DELETE FROM row WHERE lane=? AND seq=?", gone)
        self._count(lane, -len(gone), -size)
        self.record(lane, records)

    def record(self, lane: int, records: list[Tally]) -> None:
        """Note losses, in one record with those that they touch."""
        for record in records:
            before = self._gap("first<? ORDER BY first DESC LIMIT 1", lane, record.first)
            after = self._gap("first=?", lane, record.last + 1)
            whole = joined([record], before if before and before.last + 1 == record.first else None, after)
            for old in (before, after):
                if old is not None and any(new.first <= old.first <= new.last for new in whole):
                    self._forget_gap(lane, old)
            for new in whole:
                self._put_gap(lane, new)
            self._count(lane, 0, 0, record.last - record.first + 1)

    def _gap(
        self, where: Literal["first<? ORDER BY first DESC LIMIT 1", "first=?"], lane: int, at: int
    ) -> Tally | None:
        row = self.db.execute(
            f"SELECT first, last, first_event_time, last_event_time, reasons FROM gap WHERE lane=? AND {where}",  # noqa: S608
            (lane, at),
        ).fetchone()
        return None if row is None else _tally(row)

    def _put_gap(self, lane: int, gap: Tally) -> None:
        self.db.execute(
            "INSERT INTO gap VALUES (?,?,?,?,?,?)",
            (lane, gap.first, gap.last, gap.first_event_time, gap.last_event_time, _encode(gap.reasons)),
        )
        self._count(lane, 0, GAP_BYTES)

    def _forget_gap(self, lane: int, gap: Tally) -> None:
        self.db.execute("DELETE FROM gap WHERE lane=? AND first=?", (lane, gap.first))
        self._count(lane, 0, -GAP_BYTES)

    def gaps(self, lane: int, first: int, limit: int, *, last: int = 1 << 62) -> list[Tally]:
        """Records that reach to `first` or beyond and begin up to `last`, ascending."""
        row = self.db.execute(
            "SELECT first FROM gap WHERE lane=? AND first<? ORDER BY first DESC LIMIT 1", (lane, first)
        ).fetchone()
        rows = self.db.execute(
            "SELECT first, last, first_event_time, last_event_time, reasons FROM gap"
            " WHERE lane=? AND first>=? AND first<=? AND last>=? ORDER BY first LIMIT ?",
            (lane, first if row is None else row[0], last, first, limit),
        )
        return [_tally(row) for row in rows]

    # what the store has

    def settle(self, lane: int, first: int, last: int) -> None:
        """The store has, or knows lost, numbers `first .. last`: rows and records of them die."""
        rows, bytes_ = self.db.execute(
            f"SELECT count(*), coalesce(sum(length(data) + {ROW_BYTES}), 0) FROM row WHERE lane=? AND seq BETWEEN ? AND ?",  # noqa: S608  # a number of ours
            (lane, first, last),
        ).fetchone()
        if rows:
            self.db.execute("DELETE FROM row WHERE lane=? AND seq BETWEEN ? AND ?", (lane, first, last))
            self._count(lane, -rows, -bytes_)
        for gap in self.gaps(lane, first, 1 << 31, last=last):
            self._forget_gap(lane, gap)
            for left in cut(gap, [(first, last)]):
                self._put_gap(lane, left)

    def end_loading(self, found: Found) -> int:
        """All rows of a damaged lane are here: what is neither a row nor in its gap records is lost.

        The number of those; they include what was acknowledged, where that cannot be told any more.
        """
        lane = self.open_lane(found.epoch, found.name, found.next_seq, loading=True)
        known = runs(
            seq for (seq,) in self.db.execute("SELECT seq FROM row WHERE lane=? ORDER BY seq", (lane.id,))
        )
        for gap in self.gaps(lane.id, 0, 1 << 31):
            known = union(known, gap.first, gap.last)
        for gap in found.gaps:
            self.record(lane.id, cut(gap, known))
            known = union(known, gap.first, gap.last)
        lost = missing(known, found.floor, found.next_seq - 1)
        self.record(
            lane.id, [Tally(first, last, 0, 0, {"corruption": last - first + 1}) for first, last in lost]
        )
        self.db.execute(
            "UPDATE lane SET loading=0, next_seq=max(next_seq, ?) WHERE id=?", (found.next_seq, lane.id)
        )
        return size(lost)

    # what is sent

    def part(
        self, lane: LaneRow, first: int, rows: int, limit: int, below: int
    ) -> tuple[Part | None, list[Held]]:
        """From the lowest open number from `first` on, up to `rows` rows of together `limit` bytes, `below` a number.

        None when nothing is there. Rows whose check fails come back apart: there is no part with them.
        """
        gaps = iter(self.gaps(lane.id, first, MAX_BATCH_LOST, last=below - 1))
        held = self.held(lane.id, first, rows, below=below)
        gap, row = next(gaps, None), next(held, None)
        begin = at = -1
        spent = 0
        data: list[bytes] = []
        lost: list[Lost] = []
        bad: list[Held] = []
        while gap is not None or row is not None:
            if gap is not None and (row is None or gap.first < row.seq):
                number, end = max(gap.first, first), min(gap.last, below - 1)
            else:
                assert row is not None
                number = end = row.seq
            if at >= 0 and number != at:
                break
            if gap is not None and number >= gap.first:
                lost.append(as_lost(gap, number, end))
                gap = next(gaps, None)
            elif row is not None:
                if data and spent + row.size > limit:
                    break
                spent += row.size
                if row.data is None:
                    bad.append(row)
                data.append(row.data or b"")
                row = next(held, None)
            begin = number if begin < 0 else begin
            at = end + 1
        if begin < 0 or bad:
            return None, bad
        return Part(begin, at - begin, self.floor(lane), data, lost), []

    def noted(self, trends: TrendChange) -> None:
        """Keep what is to be known of a stream's open trends."""
        stream = trends.stream
        if trends.whole:
            self.db.execute("DELETE FROM trend WHERE stream=?", (stream,))
        self.db.execute(
            "INSERT INTO trend SELECT ?, coalesce(max(n), -1) + 1, ? FROM trend WHERE stream=?",
            (stream, guarded(trends.data), stream),
        )

    def open_trends(self, stream: str) -> list[bytes]:
        """What was noted, in order, as far as it is undamaged: the first one is whole."""
        found: list[bytes] = []
        for (change,) in self.db.execute("SELECT change FROM trend WHERE stream=? ORDER BY n", (stream,)):
            data = unguarded(change) if isinstance(change, bytes) else None
            if data is None:
                break
            found.append(data)
        return found


def _lane(row: tuple[object, ...]) -> LaneRow:
    if row[2] not in LANES or not all(isinstance(value, int) for value in (row[0], *row[3:])):
        raise Damaged(f"a lane of {row!r}"[:200])
    return LaneRow(*row)  # type: ignore[arg-type]  # just checked


def _tally(row: tuple[int, int, int, int, bytes]) -> Tally:
    first, last, begin, end, packed = row
    try:
        reasons = _reasons(packed)
        if 0 <= first <= last and begin <= end and sum(reasons.values()) == last - first + 1:
            return Tally(first, last, begin, end, reasons)
    except (msgspec.DecodeError, TypeError):
        pass
    raise Damaged(f"a gap record of {row!r}"[:200])


def as_lost(gap: Tally, first: int, last: int) -> Lost:
    """The part of a gap record within `first .. last`, as it goes up."""
    (part,) = cut(gap, missing([(first, last)], gap.first, gap.last))
    return Lost(part.first, part.last, part.first_event_time, part.last_event_time, part.reasons)
