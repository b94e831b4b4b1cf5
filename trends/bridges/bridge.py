"""The loop of every bridge: read, hand on, remember; what fails is tried again, later and later.

The cursor moves only when the target has said that it holds a batch. A bridge that dies in between hands
the batch on again: the same rows with the same keys.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import pyarrow as pa

from edgeward.clock import Clock
from edgeward.errors import Unavailable
from trends.bridges.cursor import MAX_SKIPPED, Cursor, Lane
from trends.bridges.feed import Batch, Feed, Position

log = logging.getLogger(__name__)

#: Columns that name a row for ever. Within a table a row's lane is always the same.
KEYS = {
    **dict.fromkeys(("results", "alarms", "trends", "samples"), ("site", "device", "epoch", "seq")),
    "gaps": ("site", "device", "epoch", "lane", "first_seq", "last_seq", "reason"),
}
#: The lane of each table's rows; gaps name theirs.
LANES = {"results": "result", "alarms": "alarm", "trends": "trend", "samples": "sample"}

POLL_SECONDS = 1.0
FIRST_RETRY, LAST_RETRY = 1.0, 30.0
PROGRESS_SECONDS = 30.0


class Stopped(Exception):
    """The bridge is to end while a target still waits: the cursor stays."""


class Target(Protocol):
    """Where rows go. `where` names it without secrets."""

    where: str

    def resume(self, table: str, position: Position) -> Position:
        """Where to go on: the target's own word, if it keeps one, else `position`. Raises Unavailable."""

    def deliver(self, table: str, rows: pa.Table, before: Position, after: Position) -> None:
        """Returns when the target holds the rows. Raises Unavailable to be called again later, Conflict when
        somebody else moved its position, Stopped, other EdgewardErrors for what a person must do."""

    def close(self) -> None: ...


def retry_delay(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubled each time, and spread."""
    longest = min(FIRST_RETRY * 2.0 ** min(failures - 1, 16), LAST_RETRY)
    return longest * random.uniform(0.5, 1.0)  # noqa: S311  # spreads load, keeps no secret


class Bridge:
    """Runs in one thread; `stop` ends it between two batches."""

    def __init__(
        self,
        feeds: Sequence[Feed],
        target: Target,
        cursor: Cursor,
        clock: Clock,
        stop: threading.Event,
        *,
        rows: int = 5_000,
        from_now: bool = False,
        between: Callable[[str], None] = lambda step: None,
    ) -> None:
        """`rows` bounds a batch; with `from_now` a table that is new to the bridge is handed on from its next
        commit on. `between` is called between two durable steps (fault tests)."""
        self._feeds = feeds
        self._target = target
        self._cursor = cursor
        self._clock = clock
        self._stop = stop
        self._rows = rows
        self._between = between
        self._from_now = from_now

    def run(self, *, once: bool = False) -> int:
        """Until `stop`, or with `once` until all that is there was handed on; how many rows were.

        Raises EdgewardError for what a person must do.
        """
        failures, told = 0, self._clock.monotonic()
        before = start = self._handed_on()
        while not self._stop.is_set():
            try:
                self.catch_up()
            except Stopped:
                break
            except (Unavailable, OSError) as error:
                failures += 1
                delay = retry_delay(failures)
                log.error("%s, next try in %.0f s", error, delay)
                self._note(str(error))
                self._stop.wait(delay)
                continue
            if failures:
                log.info("the target takes rows again")
                failures = 0
            self._note("")
            if once:
                break
            if self._clock.monotonic() - told >= PROGRESS_SECONDS:
                told, now = self._clock.monotonic(), self._handed_on()
                if now != before:
                    log.info("handed on %d rows, %d in all", now - before, now)
                    before = now
            self._stop.wait(POLL_SECONDS)
        return self._handed_on() - start

    def _handed_on(self) -> int:
        return sum(lane.rows for lane in self._cursor.state.tables.values())

    def _note(self, problem: str) -> None:
        if self._cursor.state.problem != problem:
            self._cursor.state.problem = problem
            self._cursor.save()

    def catch_up(self) -> None:
        """Hand on all that is there. Raises as `Target.deliver` and `Feed.batches`."""
        for feed in self._feeds:
            lane = self._cursor.state.tables.get(feed.table)
            if lane is None:
                lane = Lane(feed.now() if self._from_now else Position())
                self._cursor.state.tables[feed.table] = lane
                self._cursor.save()
            lane.position = self._target.resume(feed.table, lane.position)
            for batch in feed.batches(lane.position, self._rows):
                if self._stop.is_set():
                    return
                if batch.rows.num_rows or batch.skipped:
                    self._target.deliver(feed.table, batch.rows, lane.position, batch.after)
                    self._between("delivered")
                self._remember(feed.table, lane, batch)

    def _remember(self, table: str, lane: Lane, batch: Batch) -> None:
        for skipped in batch.skipped:
            log.warning(
                "%s, versions %d to %d: %s rows cannot be handed on: %s",
                table, skipped.first_version, skipped.last_version,
                skipped.rows if skipped.rows >= 0 else "an unknown number of", skipped.reason,
            )  # fmt: skip
            lane.skipped_rows += max(skipped.rows, 0)
        lane.skipped = [*lane.skipped, *batch.skipped][-MAX_SKIPPED:]
        lane.position = batch.after
        lane.rows += batch.rows.num_rows
        lane.changed = self._clock.now()
        self._cursor.save()
        self._between("remembered")
