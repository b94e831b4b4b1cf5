"""What can be read of a damaged outbox goes into the new one, on a thread of its own.

Rows keep their epoch and their numbers, so that the store recognises those that it has. Every number of a
lane that is found neither as a row nor in a gap record is lost, as far as this device can tell; the store
leaves out of that what it has.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

import msgspec

from agent.outbox import files
from agent.outbox.eviction import Tally
from agent.outbox.rows import Found, check, unguarded
from agent.outbox.salvage_pages import rows_in
from agent.outbox.watermark import read as read_mark
from edgeward.wire.topics import LANES

log = logging.getLogger(__name__)

_CHUNK = 500
_HEADER = 100
_MAGIC = b"SQLite format 3\x00"
_reasons = msgspec.msgpack.Decoder(dict[str, int]).decode
_RETRY_S = 5.0


Keep = Callable[[Found, list[tuple[int, bytes]]], None]
End = Callable[[str, list[Found]], None]


def copy_small(damaged: Path, to: sqlite3.Connection) -> None:
    """Positions and open trends, as far as they can be read; without them streams start anew.

    To be called in a transaction of `to`.
    """
    with _opened(damaged) as db:
        for topic, epoch, seq in _readable(db, "SELECT topic, epoch, seq FROM source"):
            if isinstance(topic, str) and isinstance(epoch, str) and isinstance(seq, int):
                to.execute("INSERT OR IGNORE INTO source VALUES (?,?,?)", (topic, epoch, seq))
        holes: set[object] = set()
        for stream, n, change in _readable(db, "SELECT stream, n, change FROM trend ORDER BY stream, n"):
            # Additions to what is damaged would count a part as the whole.
            sound = isinstance(stream, str) and isinstance(change, bytes) and unguarded(change) is not None
            if not sound:
                holes.add(stream)
            elif stream not in holes:
                to.execute("INSERT OR IGNORE INTO trend VALUES (?,?,?)", (stream, n, change))
        for (name,) in _readable(db, "SELECT name FROM salvaged"):
            to.execute("INSERT OR IGNORE INTO salvaged VALUES (?)", (name,))
        for (age,) in _readable(db, "SELECT value FROM meta WHERE key='age'"):
            if isinstance(age, int):
                to.execute("INSERT OR REPLACE INTO meta VALUES ('age', ?)", (age,))


class Salvage:
    """`keep` gets rows in portions, `end` the lanes when a file's rows are all kept; both may raise."""

    def __init__(self, folder: Path, names: list[str], keep: Keep, end: End) -> None:
        self._folder = folder
        self._names = names
        self._keep = keep
        self._end = end
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="salvage", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def add(self, names: list[str]) -> None:
        """More files: those that are not known yet."""
        self._names += [name for name in names if name not in self._names]

    def stop(self) -> None:
        self._stop.set()
        self.join()

    def join(self) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self) -> None:
        for name in self._names:
            while not self._stop.is_set():
                try:
                    self._one(name)
                    break
                except (OSError, sqlite3.Error) as error:
                    # A full disk, most likely: the damaged file stays, nothing is lost by waiting.
                    log.warning("salvaging %s waits: %s", name, error)
                    self._stop.wait(_RETRY_S)

    def _one(self, name: str) -> None:
        path = self._folder / name
        with _opened(path) as db:
            lanes = lanes_of(db, path)
            for lane in lanes:
                if not self._all(lane, rows_of(db, lane)):
                    return
                lane.gaps = list(gaps_of(db, lane))
        if self._pages(path, {lane.id: lane for lane in lanes}):
            self._end(name, lanes)

    def _all(self, lane: Found, rows: Iterable[tuple[int, bytes]]) -> bool:
        """Keep rows in portions; False when it was stopped."""
        portion: list[tuple[int, bytes]] = []
        for row in rows:
            portion.append(row)
            if len(portion) >= _CHUNK:
                self._keep(lane, portion)
                portion = []
            if self._stop.is_set():
                return False
        if portion:
            self._keep(lane, portion)
        return True

    def _pages(self, path: Path, lanes: dict[int, Found]) -> bool:
        """What SQLite did not find. Pages may hold rows from before they were evicted, too: those are kept after all.

        But for trends: their values may be in a coarser row already, and would count twice.
        """
        waiting: dict[int, dict[int, bytes]] = {id_: {} for id_ in lanes}
        for cell in rows_in(path, files.wal(path)):
            lane = lanes.get(cell.lane)
            if lane is None or not lane.floor <= cell.seq < lane.next_seq or lane.name == "trend":
                continue
            rows = waiting[cell.lane]
            rows[cell.seq] = cell.data
            if len(rows) >= _CHUNK:
                if not self._all(lane, sorted(rows.items())):
                    return False
                rows.clear()
        return all(self._all(lanes[id_], sorted(rows.items())) for id_, rows in waiting.items())


class _opened:
    """A connection to a damaged file, whatever is left of it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> sqlite3.Connection:
        _mend_header(self._path)
        self._db = sqlite3.connect(self._path, isolation_level=None, timeout=30)
        self._db.text_factory = lambda data: data.decode(errors="replace")
        return self._db

    def __exit__(self, *_: object) -> None:
        self._db.close()


def _mend_header(path: Path) -> None:
    """A file that begins with anything else is refused as a whole, so put back what always stands there.

    The database header (SQLite file format, section 1.3): page size 4096, WAL, schema format 4, UTF-8, no
    free pages; the rest of the first page, the schema, is left as it is.
    """
    size = path.stat().st_size
    if size < 4096:
        return
    with path.open("r+b") as file:
        if file.read(16) == _MAGIC:
            return
        head = bytearray(_HEADER)
        head[:16] = _MAGIC
        head[16:24] = b"\x10\x00\x02\x02\x00\x40\x20\x20"
        head[28:32] = (size // 4096).to_bytes(4, "big")
        head[40:48] = (1).to_bytes(4, "big") + (4).to_bytes(4, "big")
        head[56:60] = (1).to_bytes(4, "big")
        file.seek(0)
        file.write(head)


def _readable(
    db: sqlite3.Connection, query: str, values: tuple[object, ...] = ()
) -> Iterator[tuple[object, ...]]:
    """Rows until the first that cannot be read."""
    try:
        yield from db.execute(query, values)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        log.warning("damaged outbox: %s", error)


def lanes_of(db: sqlite3.Connection, path: Path) -> list[Found]:
    """The lanes in the file, by its own word where that is possible, and by its mark."""
    found: dict[tuple[object, object], Found] = {}
    for id_, epoch, name, next_seq in _readable(db, "SELECT id, epoch, name, next_seq FROM lane"):
        if isinstance(id_, int) and isinstance(epoch, str) and name in LANES and isinstance(next_seq, int):
            found[epoch, name] = Found(id_, epoch, name, next_seq)
    mark = read_mark(files.mark(path))
    for lane in mark.lanes if mark is not None else ():
        known = found.setdefault((lane.epoch, lane.name), Found(lane.id, lane.epoch, lane.name, 0))
        known.id = lane.id
        known.next_seq = max(known.next_seq, lane.next_seq)
        known.floor = min(lane.floor, known.next_seq)
    return list(found.values())


def rows_of(db: sqlite3.Connection, lane: Found) -> Iterator[tuple[int, bytes]]:
    """Sound rows in the order of their numbers, stepping over what cannot be read.

    Only numbers of rows whose check holds are believed: a flipped bit in one misleads SQLite's search, and
    ends a scan early as if there were nothing more.
    """
    at = lane.floor
    while at < lane.next_seq:
        # The whole rest and not only this lane's: a number that looks like another's must not end it.
        try:
            for key, seq, crc, data in db.execute(
                "SELECT lane, seq, crc, data FROM row WHERE (lane, seq) >= (?, ?) ORDER BY lane, seq",
                (lane.id, at),
            ):
                if (
                    key == lane.id
                    and isinstance(seq, int)
                    and at <= seq < lane.next_seq
                    and isinstance(data, bytes)
                    and check(lane.id, seq, data) == crc
                ):
                    at = seq + 1
                    yield seq, data
        except sqlite3.DatabaseError as error:
            log.debug("lane %s: %s", lane.name, error)
        at = _beyond(db, lane, at)


def _beyond(db: sqlite3.Connection, lane: Found, at: int) -> int:
    """The lowest number above `at` from which on rows of the lane can be read again; its end, if none can."""

    def readable(number: int) -> bool:
        try:
            row = db.execute(
                "SELECT seq FROM row WHERE lane=? AND seq>=? AND seq<? ORDER BY seq LIMIT 1",
                (lane.id, number, lane.next_seq),
            ).fetchone()
        except sqlite3.DatabaseError:
            return False
        return row is not None

    width = 1
    while at + width < lane.next_seq and not readable(at + width):
        width *= 2
    if at + width >= lane.next_seq:
        return lane.next_seq
    low, high = at + width // 2, at + width
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if readable(middle) else (middle, high)
    return high


def gaps_of(db: sqlite3.Connection, lane: Found) -> Iterator[Tally]:
    """Gap records that are sound in themselves."""
    query = (
        "SELECT first, last, first_event_time, last_event_time, reasons FROM gap WHERE lane=? ORDER BY first"
    )
    for row in _readable(db, query, (lane.id,)):
        first, last, begin, end, packed = row
        try:
            reasons = _reasons(cast(bytes, packed))
        except (msgspec.DecodeError, TypeError, UnicodeDecodeError):
            continue
        if not all(isinstance(value, int) for value in row[:4]) or min(reasons.values(), default=0) < 1:
            continue
        tally = Tally(cast(int, first), cast(int, last), cast(int, begin), cast(int, end), reasons)
        if (
            0 <= tally.first <= tally.last < lane.next_seq
            and sum(reasons.values()) == tally.last - tally.first + 1
        ):
            yield tally
