"""The outbox: what goes up waits here, durably, until the trend store has it.

One SQLite file (`outbox.db`, WAL), apart from the agent's other state. Rows, the source position that they
came from and the open trends are written in one transaction, so that a kill at any instant leaves all or
none. Whatever happens to the file, what was lost is counted, and the streams go on.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import msgspec

from agent.outbox import files
from agent.outbox.eviction import relief, tallies
from agent.outbox.pressure import expire, relieve
from agent.outbox.rows import Discarded, Found, LaneSize, LaneState, Part, Sequence, TrendChange
from agent.outbox.salvage import Salvage, copy_small
from agent.outbox.tables import SCHEMA, Damaged, LaneRow, OutboxTables
from agent.outbox.takeover import drop_taken, take_over
from agent.outbox.watermark import LaneMark, Mark, Watermark
from agent.outbox.watermark import read as read_mark
from edgeward.clock import Clock
from edgeward.intervals import Interval
from edgeward.storage import transaction
from edgeward.wire.lanes import DEFAULT_POLICIES, LanePolicy
from edgeward.wire.rows import Row
from edgeward.wire.topics import LANES, Lane

log = logging.getLogger(__name__)

_encode = msgspec.msgpack.Encoder().encode
#: Seconds of running time that a kill may make rows younger by.
_AGE_STEP = 60

P = ParamSpec("P")
R = TypeVar("R")


def _whatever_the_file_is(
    method: Callable[Concatenate[Outbox, P], R],
) -> Callable[Concatenate[Outbox, P], R]:
    """Under the lock; when the file turns out to be damaged, once more in a new one."""

    @wraps(method)
    def wrapped(self: Outbox, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            self._reopen()
            try:
                return method(self, *args, **kwargs)
            except sqlite3.DatabaseError as error:
                if not files.damaged(error):
                    raise
                self._renew(str(error))
                return method(self, *args, **kwargs)

    return wrapped


class Outbox:
    """Thread-safe. What a method has written is durable when it returns, unless the lane's policy says less."""

    def __init__(
        self,
        path: Path,
        clock: Clock,
        *,
        older: Path | None = None,
        policies: Mapping[Lane, LanePolicy] = DEFAULT_POLICIES,
    ) -> None:
        """`older` is the state file of an agent that kept its outbox there: its rows are taken over, once.

        Raises OSError, sqlite3.Error when not even a new file can be made.
        """
        self._path = path
        self._clock = clock
        self._older = older
        self._policies = dict(policies)
        self._lock = threading.RLock()
        self._mark = Watermark(files.mark(path))
        self._began = clock.monotonic()
        self._age = 0
        self._dirty = False
        self._marked: dict[tuple[str, Lane], LaneMark] = {}
        self._salvage: Salvage | None = None
        self._open(read_mark(files.mark(path)))

    # the file

    def _open(self, mark: Mark | None) -> None:
        try:
            made = self._connect()
            self._verify(mark, made)
        except sqlite3.DatabaseError as error:
            if not files.damaged(error):
                raise
            self._renew(str(error))
            return
        self._settle_in()

    def _connect(self) -> bool:
        """Open the file, made with its schema and an epoch in one transaction when it is new: True then."""
        self._db = db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=30)
        self._closed = False
        db.execute("PRAGMA journal_mode=WAL")
        self._synchronous = ""
        self._flush(True)
        self._tables = tables = OutboxTables(db)
        with self._transaction():
            for statement in SCHEMA.split(";"):
                db.execute(statement)
            if self._older is not None:
                take_over(tables, self._older)
            made = db.execute(
                "INSERT OR IGNORE INTO meta VALUES ('epoch', ?)", (secrets.token_hex(8),)
            ).rowcount
            self.epoch = self._meta("epoch", str)
            for lane in LANES:
                tables.open_lane(self.epoch, lane)
        if self._older is not None:
            drop_taken(self._older)
            self._older = None
        return bool(made)

    def _verify(self, mark: Mark | None, made: bool) -> None:
        """Raises Damaged when the file is not what was written."""
        files.check(self._db, self._path)
        if mark is None:
            return
        if made:
            raise Damaged("what was in it is gone")
        if mark.epoch != self.epoch:
            return
        for marked in mark.lanes:
            lane = self._tables.lane(marked.epoch, marked.name)
            if lane is None or lane.next_seq < marked.next_seq:
                raise Damaged(f"lane {marked.name} has not come to {marked.next_seq}, as it had before")
            if lane.next_seq > marked.next_seq and not self._tables.holds(lane.id, lane.next_seq - 1):
                raise Damaged(f"lane {marked.name} ends at {lane.next_seq}, its rows do not")

    def _settle_in(self) -> None:
        self._marked = {}
        self._age = self._meta("age", int, 0)
        self._began = self._clock.monotonic()
        self._mark.open()
        self._write_mark(self._tables.lanes())
        pending = [name for name in files.aside(self._path) if not self._salvaged(name)]
        if self._salvage is not None and self._salvage.alive:
            self._salvage.add(pending)
        elif pending:
            self._salvage = Salvage(self._path.parent, pending, self._keep_salvaged, self._end_salvage)
            self._salvage.start()

    def _renew(self, why: str) -> None:
        """Put the damaged file aside and go on in a new one, with a new epoch; rows are salvaged meanwhile."""
        log.error("%s is damaged (%s): a new outbox begins, what can be read is salvaged", self._path, why)
        self._closed = True
        self._db.close()
        self._mark.close()
        name = files.put_aside(self._path)
        self._connect()
        with self._transaction():
            copy_small(self._path.parent / name, self._db)
        self._dirty = False
        self._settle_in()

    def _reopen(self) -> None:
        """A full disk may have cut the renewal short: finish it."""
        if self._closed:
            self._open(read_mark(files.mark(self._path)))

    def _salvaged(self, name: str) -> bool:
        return self._db.execute("SELECT 1 FROM salvaged WHERE name=?", (name,)).fetchone() is not None

    def close(self) -> None:
        """End the salvage, which goes on at the next start, and close the file."""
        if self._salvage is not None:
            self._salvage.stop()
        with self._lock:
            self._db.close()
            self._mark.close()

    def wait_salvaged(self) -> None:
        """Until nothing is left of damaged files that could be read."""
        if self._salvage is not None:
            self._salvage.join()

    @_whatever_the_file_is
    def _keep_salvaged(self, found: Found, rows: list[tuple[int, bytes]]) -> None:
        with self._transaction():
            lane = self._tables.open_lane(found.epoch, found.name, found.next_seq, loading=True)
            self._tables.insert_missing(lane.id, rows, self._now())

    @_whatever_the_file_is
    def _end_salvage(self, name: str, lanes: list[Found]) -> None:
        """All rows of a damaged file are here: note which are not, and let the rest be sent."""
        with self._transaction():
            lost = sum(self._tables.end_loading(found) for found in lanes)
            self._db.execute("INSERT OR IGNORE INTO salvaged VALUES (?)", (name,))
        self._write_mark(self._tables.lanes())
        files.forget_oldest(self._path)
        log.warning("salvaged what can be read of %s: %d rows are lost or were stored before", name, lost)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, transaction(self._db):
            yield

    def _meta(self, key: str, kind: type[R], default: R | None = None) -> R:
        row = self._db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        value = default if row is None else row[0]
        if not isinstance(value, kind):
            raise Damaged(f"{key} is {value!r}")
        return value

    def _lane(self, name: Lane) -> LaneRow:
        lane = self._tables.lane(self.epoch, name)
        if lane is None:
            raise Damaged(f"lane {name} is missing")
        return lane

    def _now(self) -> int:
        """Seconds that the agent ran with this outbox: no clock that jumps makes a row old."""
        return self._age + int(self._clock.monotonic() - self._began)

    def _write_mark(self, changed: list[LaneRow], *, appended: bool = False) -> None:
        """Note how far lanes are; where rows were only `appended` their floors are known."""
        for lane in changed:
            key = (lane.epoch, lane.name)
            old = self._marked.get(key)
            floor = old.floor if appended and old is not None else self._tables.floor(lane)
            self._marked[key] = LaneMark(lane.id, lane.epoch, lane.name, lane.next_seq, floor)
            if floor >= lane.next_seq and lane.epoch != self.epoch:
                del self._marked[key]
        self._mark.write(self.epoch, list(self._marked.values()))

    def _flush(self, every_commit: bool) -> None:
        """Whether the next commits wait for the disk."""
        wanted = "FULL" if every_commit else "NORMAL"
        if self._synchronous != wanted:
            self._db.execute(f"PRAGMA synchronous={wanted}")
            self._synchronous = wanted

    # what streams write

    @_whatever_the_file_is
    def commit_rows(
        self,
        rows: Iterable[tuple[Lane, Row]],
        positions: dict[str, tuple[str, int]] | None = None,
        trends: Iterable[TrendChange] = (),
        lost: Mapping[Lane, Discarded] | None = None,
    ) -> None:
        """Append rows to their lanes, advance source positions and note open trends, all or nothing.

        `lost` are rows that were given up before they could be written: they get numbers and a gap record.
        Raises OSError, sqlite3.Error when the disk refuses; nothing is written then.
        """
        by_lane: dict[Lane, list[bytes]] = {}
        for name, row in rows:
            by_lane.setdefault(name, []).append(_encode(row))
        self._make_room()
        names = [*by_lane, *(lost or ())]
        safe = bool(positions) or any(self._policies[name].fsync == "every-commit" for name in names)
        self._flush(safe)
        changed: list[LaneRow] = []
        with self._transaction():
            for name, discarded in (lost or {}).items():
                changed.append(self._tables.discard(self._lane(name), discarded))
            for name, encoded in by_lane.items():
                changed.append(self._tables.append(self._lane(name), encoded, self._now()))
            for topic, (epoch, seq) in (positions or {}).items():
                self._db.execute("INSERT OR REPLACE INTO source VALUES (?,?,?)", (topic, epoch, seq))
            for change in trends:
                self._tables.noted(change)
        self._dirty = not safe
        self._write_mark(changed, appended=True)

    @_whatever_the_file_is
    def source(self, topic: str) -> tuple[str, int] | None:
        """The sensor epoch and the last sequence number whose rows are durable."""
        row = self._db.execute("SELECT epoch, seq FROM source WHERE topic=?", (topic,)).fetchone()
        return None if row is None else (row[0], row[1])

    @_whatever_the_file_is
    def open_trends(self, stream: str) -> list[bytes]:
        """What was noted of a stream's open trends, in order: the first one is whole."""
        return self._tables.open_trends(stream)

    # what is sent

    @_whatever_the_file_is
    def sequences(self) -> list[Sequence]:
        """The lanes of this epoch, and those of earlier ones that still hold something."""
        return [
            Sequence(lane.epoch, lane.name, self._tables.floor(lane), lane.next_seq)
            for lane in self._tables.lanes()
            if not lane.loading and (lane.bytes or lane.epoch == self.epoch)
        ]

    @_whatever_the_file_is
    def lane(self, name: Lane) -> LaneState:
        lane = self._lane(name)
        return LaneState(lane.next_seq, self._tables.floor(lane) - 1)

    @_whatever_the_file_is
    def read(
        self, epoch: str, name: Lane, first: int, *, rows: int, size: int, below: int, sending: bool = True
    ) -> Part | None:
        """What a batch from number `first` on holds: see `OutboxTables.part`; None when there is nothing.

        When it is for `sending` it is durable before this returns, and so is the note that it was sent.
        """
        lane = self._tables.lane(epoch, name)
        if lane is None or lane.loading:
            return None
        part, bad = self._tables.part(lane, first, rows, size, below)
        while bad:
            log.error("lane %s: the check of %d rows fails, they are lost", name, len(bad))
            self._flush(True)
            with self._transaction():
                self._tables.lose(lane.id, bad, tallies({row.seq: 0 for row in bad}, "corruption"))
            part, bad = self._tables.part(lane, first, rows, size, below)
        if part is not None and sending and (name == "trend" or self._dirty):
            # Of trend rows that may be at the store nothing may be merged into others any more.
            self._flush(True)
            with self._transaction():
                self._tables.mark_sent(lane.id, part.first, part.first + part.count - 1)
                self._db.execute("INSERT OR REPLACE INTO meta VALUES ('age', ?)", (self._now(),))
            self._dirty = False
        return part

    @_whatever_the_file_is
    def acknowledge(self, epoch: str, name: Lane, seq: int, ranges: Iterable[Interval] = ()) -> None:
        """The trend store has everything up to `seq`, and `ranges`: those rows and gap records die."""
        lane = self._tables.lane(epoch, name)
        if lane is None:
            return
        self._flush(True)
        with self._transaction():
            for first, last in ((0, seq), *ranges):
                if last >= first:
                    self._tables.settle(lane.id, first, last)
        self._dirty = False
        self._write_mark([lane])

    # budgets

    @_whatever_the_file_is
    def keep(self, policies: Mapping[Lane, LanePolicy]) -> None:
        """Budgets and times to live from now on; lanes that are not named get the defaults."""
        self._policies = {**DEFAULT_POLICIES, **policies}

    @_whatever_the_file_is
    def tend(self) -> None:
        """Give up what is older than it is worth, and what is too much. Raises sqlite3.Error, OSError."""
        now = self._now()
        self._flush(True)
        for lane in self._tables.lanes():
            more = not lane.loading and lane.rows > 0
            while more:
                with self._transaction():
                    more = expire(self._tables, lane, self._policies[lane.name], now)
        self._relieve()
        if now - self._age >= _AGE_STEP:
            with self._transaction():
                self._db.execute("INSERT OR REPLACE INTO meta VALUES ('age', ?)", (now,))
        self._dirty = False

    def _make_room(self) -> None:
        try:
            self._relieve()
        except sqlite3.OperationalError as error:
            if files.damaged(error):
                raise
            log.warning("nothing can be evicted from the outbox now: %s", error)

    def _relieve(self) -> None:
        begun = False
        while True:
            lanes = [lane for lane in self._tables.lanes() if lane.rows]
            used = {name: sum(lane.bytes for lane in lanes if lane.name == name) for name in LANES}
            name = relief(used, self._policies, begun=begun)
            if name is None:
                return
            begun = True
            self._flush(True)
            with self._transaction():
                relieve(self._tables, next(lane for lane in lanes if lane.name == name))

    @_whatever_the_file_is
    def sizes(self) -> dict[Lane, LaneSize]:
        """What each lane holds and lost, of all epochs."""
        sizes: dict[Lane, LaneSize] = {name: LaneSize(0, 0, 0) for name in LANES}
        for lane in self._tables.lanes():
            old = sizes[lane.name]
            sizes[lane.name] = LaneSize(old.rows + lane.rows, old.bytes + lane.bytes, old.lost + lane.lost)
        return sizes
