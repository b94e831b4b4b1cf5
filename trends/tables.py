"""From the journal to Delta tables: large commits, each recognised when it is tried again.

A commit carries an application transaction `(journal identity and lane, last journal id)` (Delta
protocol, "transaction identifiers"). After a crash the table itself says up to which journal id it has
the rows. deltalake never calls fsync, so the new files, the log entry and their folders are flushed
here before the journal lets go of the rows.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import TableNotFoundError

from edgeward.storage import fsync_folder
from edgeward.wire.rows import ROW_TYPES, AlarmRow, ResultRow, SampleRow, TrendRow
from edgeward.wire.topics import LANES, Lane
from trends.journal import GapRow, Journal, Stored

log = logging.getLogger(__name__)

_TIME = pa.timestamp("us", tz="UTC")
_NUMBERS = pa.map_(pa.string(), pa.float64())

_ORIGIN = [
    ("date", pa.string()),
    ("site", pa.string()),
    ("device", pa.string()),
    ("epoch", pa.string()),
    ("seq", pa.int64()),
    ("received", _TIME),
]
_LINEAGE = [
    ("stream", pa.string()),
    ("revision", pa.int64()),
]
_MODEL = [("digest", pa.string()), ("variant", pa.string()), ("provider", pa.string())]
_SOURCE = [("key", pa.string()), ("source_epoch", pa.string()), ("source_seq", pa.int64())]

SCHEMAS: dict[str, pa.Schema] = {
    "results": pa.schema(
        [*_ORIGIN, ("event_time", _TIME), *_LINEAGE, *_SOURCE, *_MODEL, ("outputs", _NUMBERS), ("alarm", pa.bool_())]
    ),
    "alarms": pa.schema(
        [*_ORIGIN, ("event_time", _TIME), *_LINEAGE, *_SOURCE, *_MODEL, ("value", pa.float64()), ("threshold", pa.float64())]
    ),
    "samples": pa.schema([*_ORIGIN, ("event_time", _TIME), *_LINEAGE, *_SOURCE, ("values", _NUMBERS)]),
    "trends": pa.schema(
        [
            *_ORIGIN, ("bucket", _TIME), ("width", pa.int64()), *_LINEAGE, *_MODEL, ("series", pa.string()),
            ("count", pa.int64()), ("missing", pa.int64()), ("mean", pa.float64()), ("m2", pa.float64()),
            ("minimum", pa.float64()), ("maximum", pa.float64()),
            ("edges", pa.list_(pa.float64())), ("histogram", pa.list_(pa.int64())),
            ("sketch", pa.binary()),
        ]
    ),
    "gaps": pa.schema(
        [
            ("site", pa.string()), ("device", pa.string()), ("epoch", pa.string()), ("lane", pa.string()),
            ("first_seq", pa.int64()), ("last_seq", pa.int64()), ("reason", pa.string()),
            ("first_event_time", _TIME), ("last_event_time", _TIME), ("received", _TIME),
            ("count", pa.int64()),
        ]
    ),
}  # fmt: skip

TABLE_OF: dict[Lane, str] = {"result": "results", "alarm": "alarms", "trend": "trends", "sample": "samples"}
_PARTITIONS = {"results": ["date"], "alarms": ["date"], "trends": ["date"], "samples": ["date"], "gaps": []}
_DAY_US = 86_400_000_000


def _date(event_time: int) -> str:
    """The UTC day of a time in microseconds since 1970, as YYYY-MM-DD."""
    day = datetime.date(1970, 1, 1) + datetime.timedelta(days=event_time // _DAY_US)
    return day.isoformat()


def to_arrow(lane: Lane, stored: list[Stored]) -> pa.Table:
    """Journal rows as the Arrow table of their lane."""
    schema = SCHEMAS[TABLE_OF[lane]]
    decode = msgspec.msgpack.Decoder(ROW_TYPES[lane]).decode
    rows: list[Any] = [decode(item.row) for item in stored]
    times = [row.bucket if isinstance(row, TrendRow) else row.event_time for row in rows]
    days: dict[int, str] = {}
    columns: dict[str, list[Any]] = {
        "date": [days.get(at // _DAY_US) or days.setdefault(at // _DAY_US, _date(at)) for at in times],
        "site": [item.site for item in stored],
        "device": [item.device for item in stored],
        "epoch": [item.epoch for item in stored],
        "seq": [item.seq for item in stored],
        "received": [item.received for item in stored],
    }
    kind: type[ResultRow | AlarmRow | SampleRow | TrendRow] = ROW_TYPES[lane]
    for field in kind.__struct_fields__:
        values = [getattr(row, field) for row in rows]
        if values and isinstance(values[0], dict):
            values = [list(value.items()) for value in values]
        columns[field] = values
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def gaps_to_arrow(gaps: list[GapRow]) -> pa.Table:
    schema = SCHEMAS["gaps"]
    return pa.table(
        [pa.array([getattr(gap, field.name) for gap in gaps], field.type) for field in schema], schema=schema
    )


class Tables:
    """The Delta tables in one folder. `between` is called between two durable steps (fault tests)."""

    def __init__(
        self, folder: Path, journal: Journal, *, between: Callable[[str], None] = lambda step: None
    ) -> None:
        self._folder = folder
        self._journal = journal
        self._between = between
        folder.mkdir(parents=True, exist_ok=True)

    def uri(self, table: str) -> Path:
        return self._folder / table

    def flush(self, limit: int = 50_000) -> int:
        """Move all waiting rows, `limit` per commit; returns how many moved."""
        moved = 0
        for lane in LANES:
            table = TABLE_OF[lane]
            self._forget_moved(table, lambda last, lane=lane: self._journal.forget_rows(lane, last))  # type: ignore[misc]  # mypy cannot infer a default
            while stored := self._journal.waiting(lane, limit):
                self._move(table, to_arrow(lane, stored), stored[-1].id)
                self._journal.forget_rows(lane, stored[-1].id)
                self._between("forgotten")
                moved += len(stored)
        self._forget_moved("gaps", self._journal.forget_gaps)
        while gaps := self._journal.waiting_gaps(limit):
            self._move("gaps", gaps_to_arrow(gaps), gaps[-1].id)
            self._journal.forget_gaps(gaps[-1].id)
            moved += len(gaps)
        return moved

    def _forget_moved(self, table: str, forget: Callable[[int], None]) -> None:
        """Finish what a crash interrupted: rows that the table holds already leave the journal."""
        _, done = self.snapshot(table)
        if done:
            self._sync(table)
            forget(done)

    def snapshot(self, table: str) -> tuple[DeltaTable | None, int]:
        """The table as it is now and the last journal id that it holds; (None, 0) before its first commit."""
        try:
            opened = DeltaTable(str(self.uri(table)))
        except TableNotFoundError:
            return None, 0
        return opened, int(opened.transaction_version(self._app(table)) or 0)

    def _app(self, table: str) -> str:
        return f"edgeward-journal-{self._journal.identity}-{table}"

    def _move(self, table: str, rows: pa.Table, last_id: int) -> None:
        write_deltalake(
            str(self.uri(table)),
            rows,
            mode="append",
            schema_mode="merge",  # a table from an older store gets the columns that came since
            partition_by=_PARTITIONS[table] or None,
            commit_properties=CommitProperties(app_transactions=[Transaction(self._app(table), last_id)]),
        )
        self._between("committed")
        self._sync(table)
        self._between("synced")

    def _sync(self, table: str) -> None:
        """fsync the files of the newest log entry, the entry itself, and every folder above them."""
        opened, _ = self.snapshot(table)
        if opened is None:
            return
        root = self.uri(table)
        entry = root / "_delta_log" / f"{opened.version():020d}.json"
        files = [entry]
        for line in entry.read_text().splitlines():
            added = json.loads(line).get("add")
            if added:
                files.append(root / added["path"])
        folders = {root, self._folder}
        for file in files:
            fd = os.open(file, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            folders.add(file.parent)
        for folder in folders:
            fsync_folder(folder)
