"""From the journal to Delta tables: large commits, each recognised when it is tried again.

A commit carries an application transaction `(journal identity and lane, last journal id)` (Delta
protocol, "transaction identifiers"). After a crash the table itself says up to which journal id it has
the rows. The journal lets go of rows once the place where the tables lie has settled the commit.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction, write_deltalake
from deltalake.exceptions import TableNotFoundError

from edgeward.wire.topics import LANES, Lane
from trends.columns import gaps_to_arrow, to_arrow
from trends.journal import Journal
from trends.local_files import LocalFolder
from trends.schemas import PARTITIONS, TABLE_OF

#: Checkpoints are made by the store's upkeep, which settles them before it removes what they sum up.
NO_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)


class Place(Protocol):
    """Where tables lie. `options` are deltalake's storage options."""

    @property
    def options(self) -> dict[str, str] | None: ...

    def uri(self, table: str) -> str: ...

    def settle(self, table: str, done: int) -> int:
        """Make what was committed after version `done` outlast a power cut; the newest version."""

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

    def repair(self) -> None:
        """To be called once before the first flush. Raises EdgewardError, with what a person must do."""
        for table in PARTITIONS:
            self._place.repair(table, self._journal.flushed(table))

    def uri(self, table: str) -> str:
        return self._place.uri(table)

    @property
    def options(self) -> dict[str, str] | None:
        return self._place.options

    def flush(self, limit: int = 100_000) -> int:
        """Move all waiting rows, about `limit` per commit; returns how many moved.

        While one part is being written, the next is read and turned into columns.
        """
        moved = 0
        with ThreadPoolExecutor(1, thread_name_prefix="tables") as pool:
            for lane in LANES:
                table = TABLE_OF[lane]
                self._forget_moved(table, lambda last, lane=lane: self._journal.forget_rows(lane, last))  # type: ignore[misc]  # mypy cannot infer a default
                writing: Future[None] | None = None
                last = 0
                while stored := self._journal.waiting(lane, limit, last):
                    rows, last = to_arrow(lane, stored), stored[-1].id
                    if writing is not None:
                        writing.result()
                    writing = pool.submit(self._move_lane, lane, rows, last)
                    moved += rows.num_rows
                if writing is not None:
                    writing.result()
        self._forget_moved("gaps", self._journal.forget_gaps)
        while gaps := self._journal.waiting_gaps(limit):
            self._move("gaps", gaps_to_arrow(gaps), gaps[-1].id)
            self._journal.forget_gaps(gaps[-1].id)
            moved += len(gaps)
        return moved

    def _move_lane(self, lane: Lane, rows: pa.Table, last: int) -> None:
        self._move(TABLE_OF[lane], rows, last)
        self._journal.forget_rows(lane, last)
        self._between("forgotten")

    def _forget_moved(self, table: str, forget: Callable[[int], None]) -> None:
        """Finish what a crash interrupted: rows that the table holds already leave the journal."""
        _, done = self.snapshot(table)
        if done:
            self.settle(table)
            forget(done)

    def snapshot(self, table: str) -> tuple[DeltaTable | None, int]:
        """The table as it is now and the last journal id that it holds; (None, 0) before its first commit."""
        try:
            opened = DeltaTable(self.uri(table), storage_options=self.options)
        except TableNotFoundError:
            return None, 0
        return opened, int(opened.transaction_version(self._app(table)) or 0)

    def _app(self, table: str) -> str:
        return f"edgeward-journal-{self._journal.identity}-{table}"

    def _move(self, table: str, rows: pa.Table, last_id: int) -> None:
        write_deltalake(
            self.uri(table),
            rows,
            mode="append",
            schema_mode="merge",  # a table from an older store gets the columns that came since
            partition_by=PARTITIONS[table] or None,
            storage_options=self.options,
            commit_properties=CommitProperties(app_transactions=[Transaction(self._app(table), last_id)]),
            post_commithook_properties=NO_HOOKS,
        )
        self._between("committed")
        self.settle(table)
        self._between("synced")

    def settle_checkpoint(self, table: str) -> None:
        self._place.settle_checkpoint(table)

    def settle(self, table: str) -> None:
        """What is committed outlasts a power cut when this returns."""
        done = self._journal.flushed(table)
        version = self._place.settle(table, done)
        if version != done:
            self._between("settled")
            self._journal.set_flushed(table, version)
