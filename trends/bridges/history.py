"""What the log of a Delta table says about where rows came in and where they lie now. Pure.

Delta protocol, "Delta Log Entries": https://github.com/delta-io/delta/blob/master/PROTOCOL.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from edgeward.errors import InvalidDocument
from trends.local_files import MARK


@dataclass(frozen=True)
class DataFile:
    """A data file, `path` relative to the table; `rows` is -1 where the log does not say how many."""

    path: str
    partition: Mapping[str, str | None]
    rows: int


@dataclass(frozen=True)
class Commit:
    """One version: `added` are files of new rows, `rewritten` files of rows that lay elsewhere before
    (compaction), `replaced` the paths of those they lay in."""

    version: int
    added: tuple[DataFile, ...] = ()
    rewritten: tuple[DataFile, ...] = ()
    replaced: frozenset[str] = frozenset()


def parse_commit(version: int, text: str) -> Commit:
    """A log entry. Raises InvalidDocument for one that is damaged."""
    added: list[DataFile] = []
    rewritten: list[DataFile] = []
    replaced: set[str] = set()
    try:
        actions = [json.loads(line) for line in text.splitlines()]
        # The store's upkeep never brings rows, whatever its actions say: sorting a day is an overwrite.
        upkeep = any((action.get("commitInfo") or {}).get(MARK) == "1" for action in actions)
        for action in actions:
            if add := action.get("add"):
                (added if add["dataChange"] and not upkeep else rewritten).append(_file(add))
            if (remove := action.get("remove")) and (upkeep or not remove["dataChange"]):
                replaced.add(unquote(str(remove["path"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidDocument(
            f"version {version} of the table's log cannot be read: {error}",
            hint="`edgeward trends serve` repairs what a power cut has damaged; else restore it from a backup",
        ) from None
    return Commit(version, tuple(added), tuple(rewritten), frozenset(replaced))


def _file(add: dict[str, Any]) -> DataFile:
    statistics = json.loads(add.get("stats") or "{}")
    return DataFile(
        unquote(str(add["path"])),
        dict(add.get("partitionValues") or {}),
        int(statistics.get("numRecords", -1)),
    )


@dataclass(frozen=True)
class Successors:
    """The files that hold the rows of one that is gone, each with the version that wrote it; `complete` when
    all of its rows are there, not where retention has removed some."""

    files: tuple[tuple[DataFile, int], ...]
    complete: bool


class Moves:
    """Where rows went, from the commits of upkeep that were handed in."""

    def __init__(self) -> None:
        self._replaced: dict[str, int] = {}
        self._rewritten: dict[int, tuple[DataFile, ...]] = {}

    def add(self, commit: Commit) -> None:
        if commit.rewritten:
            self._replaced.update(dict.fromkeys(commit.replaced, commit.version))
            self._rewritten[commit.version] = commit.rewritten

    def of(self, gone: DataFile, kept: Callable[[str], bool]) -> Successors:
        """Where the rows of `gone` lie now; `kept` says of a path whether it can still be read.

        A rewritten file may hold rows of other files, too.
        """
        version = self._replaced.get(gone.path)
        if version is None:
            return Successors((), complete=False)
        found: list[tuple[DataFile, int]] = []
        # A rewrite stays within the partition.
        within = [file for file in self._rewritten[version] if file.partition == gone.partition]
        complete = bool(within)
        for file in within:
            if kept(file.path):
                found.append((file, version))
                continue
            further = self.of(file, kept)
            found += further.files
            complete &= further.complete
        return Successors(tuple(found), complete)
