"""What a stream made becomes durable in order, on a thread of its own: no action waits for the disk."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from typing import NamedTuple

from agent.outbox.outbox import Outbox
from agent.outbox.rows import Discarded, TrendChange
from agent.streams.decode.sequence import Position
from edgeward.errors import Unavailable
from edgeward.wire.rows import Row, TrendRow
from edgeward.wire.topics import Lane

#: Rows that may wait for the disk, with those being written; the stream waits when there are more.
MAX_ROWS = 8000
RETRY_S = 0.5


class _Part(NamedTuple):
    rows: list[tuple[Lane, Row]]
    position: Position | None
    trends: TrendChange | None


class Writer:
    """Commits what is `put` in that order; what waits together shares one transaction.

    While the disk refuses it tries again, until `stop` is set. What it gives up then, or after an error
    that nobody expected, is followed by nothing else: a hole must not be covered by a later position.

    When too much waits, a stream that `holds` waits too, and its sensor keeps the samples. A stream whose
    sensor keeps nothing goes on, since its actions must: what cannot wait is counted by lane, alarms last, and
    becomes gap records with the next commit that succeeds.
    """

    def __init__(
        self,
        outbox: Outbox,
        source: str,
        stop: threading.Event,
        *,
        holds: bool = True,
        stored: Callable[[Position | None], None],
        refused: Callable[[Exception], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """`source` names the position. `stored` is called after each commit with the position that it
        moved to, `refused` when the disk refuses, `failed` once for an unexpected error."""
        self._outbox = outbox
        self._holds = holds
        self._source = source
        self._stop = stop
        self._stored = stored
        self._refused = refused
        self._failed = failed
        self._parts: list[_Part] = []
        self._rows = 0
        self._refusing = False
        self._missed = False
        self._lost: dict[Lane, Discarded] = {}
        self._closed = False
        self._ended = False
        self._changed = threading.Condition()
        self._committing = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"store-{source}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows that are not durable yet."""
        return self._rows

    def put(
        self, rows: list[tuple[Lane, Row]], position: Position | None, trends: TrendChange | None
    ) -> None:
        """Hand over what belongs together; waits for room. Raises Unavailable when nothing is stored any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended or self._rows < MAX_ROWS or (self._refusing and not self._holds)
            )
            if self._ended:
                raise Unavailable("nothing is stored any more")
            if self._rows >= MAX_ROWS:
                rows, trends = self._discard(rows), None
                self._missed = True
                if not rows:
                    return
            self._parts.append(_Part(rows, position, trends))
            self._rows += len(rows)
            self._changed.notify_all()

    def take_missed(self) -> bool:
        """Whether changes of open trends were discarded since the last call: the next one must be whole."""
        missed, self._missed = self._missed, False
        return missed

    def _discard(self, rows: list[tuple[Lane, Row]]) -> list[tuple[Lane, Row]]:
        """Count what cannot wait for the disk; what remains are alarms, twice as many at most."""
        alarms = [item for item in rows if item[0] == "alarm"][: max(0, 2 * MAX_ROWS - self._rows)]
        kept = len(alarms)
        for lane, row in rows:
            if lane == "alarm" and kept:
                kept -= 1
                continue
            at = row.bucket if isinstance(row, TrendRow) else row.event_time
            self._lost[lane] = Discarded(1, at, at) + self._lost.get(lane)
        return alarms

    def close(self) -> None:
        """Nothing more will be put."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def end(self, seconds: float) -> None:
        """Wait so long for what was put; after that, nothing more is stored.

        A successor goes on from the durable position, which a thread that hangs must not move under it.
        """
        if self._thread.ident is not None:
            self._thread.join(seconds)
        self._end()
        if self._committing.acquire(timeout=seconds):
            self._committing.release()

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while parts := self._next():
                self._store(parts)
        except Unavailable:
            self._end()
        except Exception as error:  # noqa: BLE001  # whatever it is, it must not go unseen
            self._end()
            self._failed(error)

    def _next(self) -> list[_Part]:
        """Everything that waits; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._parts or self._closed or self._ended)
            parts, self._parts = self._parts, []
            return parts

    def _store(self, parts: list[_Part]) -> None:
        rows = parts[0].rows if len(parts) == 1 else [row for part in parts for row in part.rows]
        position = next((part.position for part in reversed(parts) if part.position), None)
        trends = [part.trends for part in parts if part.trends is not None]
        while not self._commit(rows, position, trends):
            with self._changed:
                self._refusing = True
                self._changed.notify_all()
            if self._stop.wait(RETRY_S):
                raise Unavailable("the disk refused until the stream was stopped")
        with self._changed:
            self._refusing = False
            self._rows -= len(rows)
            self._changed.notify_all()
        self._stored(position)

    def _commit(
        self, rows: list[tuple[Lane, Row]], position: Position | None, trends: list[TrendChange]
    ) -> bool:
        with self._committing:
            if self._ended:
                raise Unavailable("the stream has ended")
            with self._changed:
                lost, self._lost = self._lost, {}
            try:
                positions = {self._source: position} if position else None
                self._outbox.commit_rows(rows, positions, trends, lost)
            except (OSError, sqlite3.Error) as error:
                with self._changed:
                    for lane, item in lost.items():
                        self._lost[lane] = item + self._lost.get(lane)
                self._refused(error)
                return False
            return True
