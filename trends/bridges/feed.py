"""The rows of a table in the order of its commits, from a position that is kept, for ever.

Rows enter a table by commits of the store's flushes; commits of its upkeep move rows only. A bridge that
was away for longer than the upkeep keeps what it no longer needs finds the rows where compaction has put
them: some come again then, with the same keys. What retention has removed meanwhile is told as skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler
from msgspec import Struct, field
from msgspec.structs import replace

from edgeward.errors import Conflict
from trends.bridges.history import Commit, DataFile, Moves, parse_commit
from trends.journal import Journal
from trends.schemas import SCHEMAS
from trends.tables import Tables

log = logging.getLogger(__name__)


class Position(Struct, frozen=True):
    """Up to where the rows of a table were handed on.

    All of the versions up to `version` are; of the next one the first `files` files, and `rows` rows of the
    one after. With `snapshot` set the files are those of that whole version, since the log before it is
    gone. `again` are compacted files, with their versions, that stood in for several that are gone.
    `table` is the table's id: positions mean nothing in another one.
    """

    table: str = ""
    version: int = -1
    files: int = 0
    rows: int = 0
    snapshot: int = -1
    again: dict[str, int] = field(default_factory=dict)


class Skipped(Struct, frozen=True):
    """Rows that a bridge could not hand on since the table no longer holds them; `rows` -1: not known how many."""

    first_version: int
    last_version: int
    rows: int
    reason: str


class Batch(Struct, frozen=True):
    """`rows` as in `trends.schemas`, perhaps with further columns; afterwards the bridge is at `after`."""

    rows: pa.Table
    after: Position
    skipped: tuple[Skipped, ...] = ()


class Feed:
    """One table of a store; only what would outlast a power cut is handed on."""

    def __init__(self, tables: Tables, journal: Journal, table: str) -> None:
        self.table = table
        self._tables = tables
        self._journal = journal
        self._moves, self._learned = Moves(), -1
        self._opened: pa_fs.FileSystem | None = None

    @property
    def _files(self) -> pa_fs.FileSystem:
        """The table's folder, wherever it lies; it must be there."""
        if self._opened is None:
            self._opened = pa_fs.PyFileSystem(
                DeltaStorageHandler(self._tables.uri(self.table), self._tables.options)
            )
        return self._opened

    def newest(self) -> int:
        """The last version that may be handed on, -1 for none: a later one may be taken back."""
        return self._journal.flushed(self.table)

    def now(self) -> Position:
        """After all that is there. Raises Conflict as `batches`."""
        newest = self.newest()
        return Position() if newest < 0 else replace(self._check(Position(), newest), version=newest)

    def batches(self, position: Position, limit: int) -> Iterator[Batch]:
        """Up to `limit` rows each, until all that is settled now was handed on.

        Raises Conflict for a position of another table or of a later state of this one, InvalidDocument for
        a damaged log, OSError when the table cannot be read.
        """
        newest = self.newest()
        if newest < 0:
            return
        position = self._check(position, newest)
        pieces: list[pa.Table] = []
        skipped: list[Skipped] = []
        held, after = 0, position
        for piece in self._pieces(position, newest, limit):
            if held and held + piece.rows.num_rows > limit:
                yield Batch(self._joined(pieces), after, tuple(skipped))
                pieces, skipped, held = [], [], 0
            if piece.rows.num_rows:
                pieces.append(piece.rows)
            skipped += piece.skipped
            held += piece.rows.num_rows
            after = piece.after
        if after != position:
            yield Batch(self._joined(pieces), after, tuple(skipped))

    def _joined(self, pieces: list[pa.Table]) -> pa.Table:
        return pa.concat_tables(pieces, promote_options="default") if pieces else _none(self.table)

    def _check(self, position: Position, newest: int) -> Position:
        try:
            table = str(
                DeltaTable(self._tables.uri(self.table), storage_options=self._tables.options).metadata().id
            )
        except TableNotFoundError:
            raise Conflict(
                f"the table {self.table} is gone, though its journal knows of {newest + 1} versions of it",
                hint="restore both from one backup",
            ) from None
        if position.table not in ("", table):
            raise Conflict(
                f"the table {self.table} is not the one this bridge has read from: it was made anew",
                hint="start a bridge with another --name; keys keep a target from storing a row twice",
            )
        if max(position.version, position.snapshot) > newest:
            raise Conflict(
                f"the table {self.table} is at version {newest}, this bridge was at {position.version} already:"
                " the store was restored from a backup",
                hint="start a bridge with another --name; keys keep a target from storing a row twice",
            )
        return replace(position, table=table)

    def _pieces(self, position: Position, newest: int, limit: int) -> Iterator[Batch]:
        while position.version < newest:
            commit = self._commit(position.version + 1) if position.snapshot < 0 else None
            of_one = self._of_commit(commit, position, newest, limit) if commit else self._of_snapshot(
                position, newest, limit
            )  # fmt: skip
            for piece in of_one:
                yield piece
                position = piece.after

    def _commit(self, version: int) -> Commit | None:
        """None for a version whose log entry is gone: it lies in a checkpoint only."""
        try:
            with self._files.open_input_file(f"_delta_log/{version:020d}.json") as file:
                return parse_commit(version, file.read().decode(errors="replace"))
        except FileNotFoundError:
            return None

    def _of_commit(self, commit: Commit, position: Position, newest: int, limit: int) -> Iterator[Batch]:
        for at in range(position.files, len(commit.added)):
            for piece in self._of_added(commit.added[at], commit.version, position, newest, limit):
                yield piece
                position = piece.after
            position = replace(position, files=at + 1, rows=0)
            yield Batch(_none(self.table), position)
        again = {path: version for path, version in position.again.items() if version > commit.version}
        yield Batch(_none(self.table), Position(position.table, commit.version, again=again))

    def _of_added(
        self, data: DataFile, version: int, position: Position, newest: int, limit: int
    ) -> Iterator[Batch]:
        try:
            yield from self._of_file(data, position, limit)
            return
        except FileNotFoundError:
            self._learn_moves(version, newest)
        found = self._moves.of(data, self._is_there)
        for file, moved in found.files:
            if file.path in position.again:
                continue
            log.warning(
                "%s: %s of version %d is in the compacted %s now: its rows are handed on, some perhaps again",
                self.table, data.path, version, file.path,
            )  # fmt: skip
            for piece in self._of_file(file, replace(position, rows=0), limit):
                yield Batch(piece.rows, position)  # an interrupted stand-in starts again
            position = replace(position, again={**position.again, file.path: moved})
            yield Batch(_none(self.table), position)
        if not found.complete:
            day = data.partition.get("date")
            reason = f"rows of {day} were removed by retention" if day else "rows were removed"
            yield Batch(_none(self.table), position, (Skipped(version, version, data.rows, reason),))

    def _learn_moves(self, version: int, newest: int) -> None:
        for later in range(max(version, self._learned) + 1, newest + 1):
            if (commit := self._commit(later)) is not None:
                self._moves.add(commit)
        self._learned = max(newest, self._learned)

    def _is_there(self, path: str) -> bool:
        return bool(self._files.get_file_info(path).type != pa_fs.FileType.NotFound)

    def _of_snapshot(self, position: Position, newest: int, limit: int) -> Iterator[Batch]:
        """The whole table, as its log no longer says what came since the position."""
        if position.snapshot >= 0 and (files := self._live(position.snapshot)) is not None:
            pass
        else:
            skipped: tuple[Skipped, ...] = ()
            if position.version >= 0 and position.snapshot < 0:
                reason = "the log of these versions is gone: what the table still holds is handed on again"
                skipped = (Skipped(position.version + 1, newest, -1, reason),)
            position = Position(position.table, position.version, snapshot=newest)
            files = self._live(newest)
            if files is None:
                raise FileNotFoundError(f"files of {self.table} went away while they were listed")
            yield Batch(_none(self.table), position, skipped)
        for at in range(position.files, len(files)):
            for piece in self._of_file(files[at], position, limit):
                yield piece
                position = piece.after
            position = replace(position, files=at + 1, rows=0)
            yield Batch(_none(self.table), position)
        yield Batch(_none(self.table), Position(position.table, position.snapshot))

    def _live(self, version: int) -> list[DataFile] | None:
        """The files of one version; None when it cannot be had any more, or some of its files are gone."""
        try:
            opened = DeltaTable(
                self._tables.uri(self.table), version=version, storage_options=self._tables.options
            )
            actions = pa.table(opened.get_add_actions(flatten=True)).to_pylist()
        except DeltaError:
            return None
        files = [
            DataFile(
                str(action["path"]),
                {"date": action["partition.date"]} if "partition.date" in action else {},
                int(action.get("num_records") or -1),
            )
            for action in actions
        ]
        files.sort(key=lambda file: file.path)
        return files if all(self._is_there(file.path) for file in files) else None

    def _of_file(self, data: DataFile, position: Position, limit: int) -> Iterator[Batch]:
        """The rows of one file after the first `position.rows`. Raises FileNotFoundError."""
        with self._files.open_input_file(data.path) as opened, pq.ParquetFile(opened) as file:
            done = 0
            for batch in file.iter_batches(batch_size=limit):
                start, done = max(position.rows - done, 0), done + batch.num_rows
                if start < batch.num_rows:
                    rows = _whole(self.table, pa.table(batch).slice(start), data.partition)
                    yield Batch(rows, replace(position, rows=done))


def _whole(table: str, rows: pa.Table, partition: Mapping[str, str | None]) -> pa.Table:
    """With the columns that stand in the path, those of the schema first and in its order."""
    columns: dict[str, Any] = {name: rows.column(name) for name in rows.column_names}
    for name, value in partition.items():
        columns[name] = pa.array([value] * rows.num_rows, pa.string())
    ordered: dict[str, Any] = {}
    for declared in SCHEMAS[table]:
        found = columns.pop(declared.name, None)
        ordered[declared.name] = (
            pa.nulls(rows.num_rows, declared.type) if found is None else found.cast(declared.type)
        )
    return pa.table({**ordered, **columns})


def _none(table: str) -> pa.Table:
    return SCHEMAS[table].empty_table()
