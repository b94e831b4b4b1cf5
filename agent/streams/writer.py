"""What a stream made becomes durable in order, on a thread of its own: no action waits for the disk."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from typing import NamedTuple

from agent.state import State, TrendChange
from agent.streams.decode.sequence import Position
from edgeward.errors import Unavailable
from edgeward.wire.rows import Row
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
    """

    def __init__(
        self,
        state: State,
        source: str,
        stop: threading.Event,
        *,
        stored: Callable[[Position | None], None],
        refused: Callable[[Exception], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """`source` names the position. `stored` is called after each commit with the position that it
        moved to, `refused` when the disk refuses, `failed` once for an unexpected error."""
        self._state = state
        self._source = source
        self._stop = stop
        self._stored = stored
        self._refused = refused
        self._failed = failed
        self._parts: list[_Part] = []
        self._rows = 0
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
            self._changed.wait_for(lambda: self._ended or self._rows < MAX_ROWS)
            if self._ended:
                raise Unavailable("nothing is stored any more")
            self._parts.append(_Part(rows, position, trends))
            self._rows += len(rows)
            self._changed.notify_all()

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
            if self._stop.wait(RETRY_S):
                raise Unavailable("the disk refused until the stream was stopped")
        with self._changed:
            self._rows -= len(rows)
            self._changed.notify_all()
        self._stored(position)

    def _commit(
        self, rows: list[tuple[Lane, Row]], position: Position | None, trends: list[TrendChange]
    ) -> bool:
        with self._committing:
            if self._ended:
                raise Unavailable("the stream has ended")
            try:
                self._state.commit_rows(rows, {self._source: position} if position else None, trends)
            except (OSError, sqlite3.Error) as error:
                self._refused(error)
                return False
            return True
