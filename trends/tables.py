"""From the journal to Delta tables: large commits, each recognised when it is tried again.

A commit carries an application transaction `(journal identity and lane, last journal id)` (Delta
protocol, "transaction identifiers"). After a crash the table itself says up to which journal id it has
the rows. The journal lets go of rows once the place where the tables lie has settled the commit.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction, write_deltalake
from deltalake.exceptions import TableNotFoundError

from edgeward.errors import Conflict
from edgeward.wire.topics import LANES, Lane
from trends.columns import gaps_to_arrow, to_arrow
from trends.journal import Journal
from trends.layout import WRITER, sorted_trends
from trends.local_files import LocalFolder
from trends.schemas import PARTITIONS, TABLE_OF

#: Checkpoints are made by the store's upkeep, which settles them before it removes what they sum up.
NO_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)


class Place(Protocol):
    """Where tables lie. `options` are deltalake's storage options."""

    @property
    def options(self) -> dict[str, str] | None: ...

    def uri(self, table: str) -> str: ...

    def check(self) -> None:
        """Whether it is fit for tables. Raises Unavailable when it is away, EdgewardError when it is not."""

    def guarded(self) -> AbstractContextManager[None]:
        """Where another machine answers: raises Unavailable, without secrets, for what it refuses or does not, and
        Conflict when another writer was first."""

    def settle(self, table: str, done: int, seen: int) -> int:
        """Make what was committed after version `done` outlast a power cut; the version up to which all does.

        `seen` is a version that is known to be there.
        """

    def settle_checkpoint(self, table: str) -> None:
        """Make the newest checkpoint outlast a power cut."""

    def repair(self, table: str, done: int) -> None:
        """Take back what was committed after version `done` and has not outlasted one."""


class Tables:
    """The Delta tables in one place. `between` is called between two durable steps (fault tests)."""

    def __init__(
        self, place: Path | Place, journal: Journal, *, between: Callable[[str], None] = lambda step: None
    ) -> None:
        self._place = LocalFolder(place) if isinstance(place, Path) else place
        self._journal = journal
        self._between = between

    def check(self) -> None:
        """Raises Unavailable when their place is away, EdgewardError when it is not fit for them."""
        self._place.check()

    def guarded(self) -> AbstractContextManager[None]:
        return self._place.guarded()

    def repair(self) -> None:
        """To be called once before the first flush. Raises EdgewardError, with what a person must do."""
        for table in (*PARTITIONS, "models"):
            self._place.repair(table, self._journal.flushed(table))

    def uri(self, table: str) -> str:
        return self._place.uri(table)

    @property
    def options(self) -> dict[str, str] | None:
        return self._place.options

    def flush(self, limit: int = 100_000) -> int:
        """Move all rows that wait now, about `limit` per commit; returns how many moved.

        What comes meanwhile waits for the next time: a lane that never rests must not hold up the others.
        While one part is being written, the next is read and turned into columns. A table is opened once, before
        its rows are read, and each commit is one on top of what was seen then: another ingester that has
        come to lead meanwhile makes it fail. Raises Unavailable, OSError, DeltaError.
        """
        moved = 0
        newest, newest_gap = self._journal.newest()
        with ThreadPoolExecutor(1, thread_name_prefix="tables") as pool:
            for lane in LANES:
                if not self._journal.waiting(lane, 1):
                    continue  # in S3, to look at a table costs requests
                table = TABLE_OF[lane]
                opened = self._forget_moved(
                    table,
                    lambda last, lane=lane: self._journal.forget_rows(lane, last),  # type: ignore[misc]  # mypy cannot infer a default
                )
                writing: Future[DeltaTable] | None = None
                last = 0
                while last < newest and (stored := self._journal.waiting(lane, limit, last)):
                    rows, last = to_arrow(lane, stored), stored[-1].id
                    if lane == "trend":
                        rows = sorted_trends(rows)
                    if writing is not None:
                        opened = writing.result()
                    writing = pool.submit(self._move_lane, lane, rows, last, opened)
                    moved += rows.num_rows
                if writing is not None:
                    writing.result()
        opened = (
            self._forget_moved("gaps", self._journal.forget_gaps) if self._journal.waiting_gaps(1) else None
        )
        last = 0
        while last < newest_gap and (gaps := self._journal.waiting_gaps(limit)):
            last = gaps[-1].id
            opened = self._move("gaps", gaps_to_arrow(gaps), last, opened)
            self._journal.forget_gaps(last)
            moved += len(gaps)
        return moved

    def _move_lane(self, lane: Lane, rows: pa.Table, last: int, opened: DeltaTable | None) -> DeltaTable:
        opened = self._move(TABLE_OF[lane], rows, last, opened)
        self._journal.forget_rows(lane, last)
        self._between("forgotten")
        return opened

    def _forget_moved(self, table: str, forget: Callable[[int], None]) -> DeltaTable | None:
        """Finish what a crash interrupted: rows that the table holds already leave the journal."""
        opened, done = self.snapshot(table)
        if done:
            self.settle(table, opened)
            forget(done)
        return opened

    def snapshot(self, table: str) -> tuple[DeltaTable | None, int]:
        """The table as it is now and the last journal id that it holds; (None, 0) before its first commit.

        Raises Unavailable, OSError.
        """
        with self.guarded():
            try:
                opened = DeltaTable(self.uri(table), storage_options=self.options)
            except TableNotFoundError:
                return None, 0
            return opened, int(opened.transaction_version(self._app(table)) or 0)

    def _app(self, table: str) -> str:
        return f"edgeward-journal-{self._journal.identity}-{table}"

    def _move(self, table: str, rows: pa.Table, last_id: int, opened: DeltaTable | None) -> DeltaTable:
        """Commit on top of `opened`, which holds none of these rows; None: there was no table.

        Raises DeltaError, or Conflict, when another ingester has stored them since: nothing is stored then.
        """
        if opened is None:
            opened = self._made(table, rows.schema)
        with self.guarded():
            write_deltalake(
                opened,
                rows,
                mode="append",
                schema_mode="merge",  # a table from an older store gets the columns that came since
                partition_by=PARTITIONS[table] or None,
                writer_properties=WRITER,
                commit_properties=CommitProperties(app_transactions=[Transaction(self._app(table), last_id)]),
                post_commithook_properties=NO_HOOKS,
            )
        self._between("committed")
        self.settle(table, opened)
        self._between("synced")
        return opened

    def _made(self, table: str, schema: pa.Schema) -> DeltaTable:
        """The table, made when it is missing. Of two that make it with rows in it, both would be taken: so it is
        made without, and looked at again."""
        with self.guarded():
            DeltaTable.create(
                self.uri(table),
                schema,
                mode="ignore",
                partition_by=PARTITIONS[table] or None,
                storage_options=self.options,
            )
        opened, done = self.snapshot(table)
        if opened is None or done:
            raise Conflict(
                f"another ingester moves rows to table {table}",
                hint="nothing is lost; it goes on by itself",
            )
        return opened

    def settle_checkpoint(self, table: str) -> None:
        self._place.settle_checkpoint(table)

    def settle(self, table: str, opened: DeltaTable | None = None) -> None:
        """What is committed outlasts a power cut when this returns: to `opened`, or to the table as it is now."""
        done = self._journal.flushed(table)
        if opened is None:
            opened, _ = self.snapshot(table)
        version = self._place.settle(table, done, opened.version() if opened is not None else done)
        if version != done:
            self._between("settled")
            self._journal.set_flushed(table, version)
