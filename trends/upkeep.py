"""What tables need besides being written: few large files, old days removed, and a log that stays short.

Every step is a Delta commit of its own, made between two flushes by the store that writes the table; one
that is interrupted is done again. Readers of an older version keep their files for `vacuum_hours`.
"""

from __future__ import annotations

import datetime
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deltalake import CommitProperties, DeltaTable

from edgeward.errors import UsageError
from trends.layout import WRITER
from trends.local_files import MARK
from trends.schemas import PARTITIONS
from trends.sorting import sort_apart
from trends.tables import NO_HOOKS, Tables

log = logging.getLogger(__name__)

DAY = 86_400.0
#: What the commits of upkeep carry: whoever repairs a table knows them as the store's own.
_OURS = CommitProperties(custom_metadata={MARK: "1"})


@dataclass(frozen=True)
class Retention:
    """For how many days each table is kept, by event time; a table that is not named is kept for ever."""

    days: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for table, days in self.days.items():
            if not PARTITIONS.get(table):
                known = ", ".join(name for name, by in PARTITIONS.items() if by)
                raise UsageError(f"{table} has no days to be kept", hint=f"expected one of {known}")
            if days < 1:
                raise UsageError(f"{table}: cannot be kept for {days} days", hint="expected 1 or more")

    def first_day(self, table: str, now: float) -> str | None:
        """The oldest UTC day that is kept, as YYYY-MM-DD; None when all are. `now` is seconds since 1970."""
        days = self.days.get(table)
        if days is None:
            return None
        return datetime.datetime.fromtimestamp(now - days * DAY, datetime.UTC).date().isoformat()


def parse_retention(texts: Iterable[str]) -> Retention:
    """From `TABLE=DAYS`. Raises UsageError."""
    days: dict[str, int] = {}
    for text in texts:
        table, _, number = text.partition("=")
        if not number.isdigit():
            raise UsageError(f"{text!r} does not say how long", hint="expected TABLE=DAYS, e.g. results=90")
        days[table] = int(number)
    return Retention(days)


@dataclass(frozen=True)
class Limits:
    """`files` small ones (below half of `target_bytes`) in a partition make it worth writing anew; a
    checkpoint sums up every `checkpoint` versions; removed files stay `vacuum_hours` for readers."""

    files: int = 8
    target_bytes: int = 128 << 20
    checkpoint: int = 50
    vacuum_hours: int = 24


@dataclass(frozen=True)
class DataFile:
    """A data file of a table; `day` is its partition, empty in a table without."""

    day: str
    size: int


def worth_compacting(files: Iterable[DataFile], limits: Limits) -> list[str]:
    """The partitions with so many small files that one file for all is better, oldest first."""
    small: dict[str, int] = defaultdict(int)
    for file in files:
        if file.size < limits.target_bytes // 2:
            small[file.day] += 1
    return sorted(day for day, number in small.items() if number >= limits.files)


def worth_sorting(files: Iterable[DataFile], today: str, limits: Limits) -> list[str]:
    """The days that are over and of which more than one file is small, oldest first."""
    small: dict[str, int] = defaultdict(int)
    for file in files:
        if file.day < today and file.size < limits.target_bytes // 2:
            small[file.day] += 1
    return sorted(day for day, number in small.items() if number > 1)


class Upkeep:
    """From the thread that flushes: a table has one writer."""

    def __init__(
        self,
        tables: Tables,
        retention: Retention,
        limits: Limits | None = None,
        scratch: Path | None = None,
    ) -> None:
        """`scratch` takes what sorting cannot hold in memory; the system's temporary folder otherwise."""
        self._tables = tables
        self._retention = retention
        self._limits = limits or Limits()
        #: Versions of the last checkpoint made here.
        self._summed_up: dict[str, int] = {}
        self._sorted_at: dict[str, float] = {}
        self._scratch = scratch

    def run(self, now: float) -> None:
        """All that is due. `now` is seconds since 1970. Raises Unavailable, OSError, DeltaError."""
        for table in PARTITIONS:
            opened, _ = self._tables.snapshot(table)
            if opened is None:
                continue
            with self._tables.guarded():
                self._expire(table, opened, now)
                if table == "trends" and self._tables.options is None:
                    self._sort(table, opened, now)
                self._compact(table, opened)
                self._sum_up(table)

    def _expire(self, table: str, opened: DeltaTable, now: float) -> None:
        first = self._retention.first_day(table, now)
        if first is None or not any(file.day < first for file in data_files(opened)):
            return
        # A predicate on the partition only: files are dropped from the table, none is read.
        opened.delete(f"date < '{first}'", commit_properties=_OURS, post_commithook_properties=NO_HOOKS)
        self._tables.settle(table, opened)
        log.info("%s: days before %s are over their retention and removed", table, first)

    def _sort(self, table: str, opened: DeltaTable, now: float) -> None:
        """Days that are over, each once in a day at most: late rows come in small numbers."""
        today = datetime.datetime.fromtimestamp(now, datetime.UTC).date().isoformat()
        for day in worth_sorting(data_files(opened), today, self._limits):
            if now - self._sorted_at.get(day, -DAY) < DAY:
                continue
            sort_apart(self._tables.uri(table), day, self._scratch, {MARK: "1"})
            self._tables.settle(table)
            self._sorted_at[day] = now
            opened.update_incremental()
            log.info("%s %s: is sorted", table, day)

    def _compact(self, table: str, opened: DeltaTable) -> None:
        days = worth_compacting(data_files(opened), self._limits)
        for day in days:
            figures = opened.optimize.compact(
                partition_filters=[("date", "=", day)] if day else None,
                target_size=self._limits.target_bytes,
                max_concurrent_tasks=1,
                writer_properties=WRITER,
                commit_properties=_OURS,
                post_commithook_properties=NO_HOOKS,
            )
            self._tables.settle(table, opened)
            log.info(
                "%s %s: %s files became %s",
                table, day, figures.get("numFilesRemoved"), figures.get("numFilesAdded"),
            )  # fmt: skip

    def _sum_up(self, table: str) -> None:
        """A checkpoint, settled before what it sums up may go; then what no reader can still need."""
        opened, _ = self._tables.snapshot(table)
        if opened is None:
            return
        if opened.version() - self._summed_up.get(table, 0) < self._limits.checkpoint:
            return
        opened.create_checkpoint()
        self._tables.settle_checkpoint(table)
        opened.cleanup_metadata()
        opened.vacuum(
            retention_hours=self._limits.vacuum_hours,
            dry_run=False,
            enforce_retention_duration=False,
            commit_properties=_OURS,
            post_commithook_properties=NO_HOOKS,
        )
        self._tables.settle(table, opened)
        self._summed_up[table] = opened.version()


def data_files(opened: DeltaTable) -> list[DataFile]:
    actions = opened.get_add_actions(flatten=True)
    names = actions.schema.names
    sizes = actions.column(names.index("size_bytes")).to_pylist()
    days = actions.column(names.index("partition.date")).to_pylist() if "partition.date" in names else None
    return [DataFile(str(days[at]) if days else "", int(size)) for at, size in enumerate(sizes)]
