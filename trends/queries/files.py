"""Which data files can hold what is asked for, by the partition and the statistics in Delta's log."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

from edgeward.errors import InvalidDocument

_EPOCH = datetime.date(1970, 1, 1)
_DAY_US = 86_400_000_000
#: Columns of which a question's values are compared with a file's smallest and largest.
COLUMNS = ("site", "device", "stream", "series", "digest", "variant", "provider")


@dataclass(frozen=True)
class Wanted:
    """Event times in microseconds since 1970 (None where open), and the values of columns that may occur.

    With `prefix`, the digests are beginnings of digests.
    """

    since: int | None = None
    until: int | None = None
    values: Mapping[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class File:
    path: str
    day: str
    rows: int
    lowest: Mapping[str, str]
    highest: Mapping[str, str]


def _day(at: int) -> str:
    return (_EPOCH + datetime.timedelta(days=at // _DAY_US)).isoformat()


def prune(files: Iterable[File], wanted: Wanted) -> list[File]:
    """The files that can hold a wanted row, by day and path. Statistics that are not there rule nothing out."""
    first = _day(wanted.since) if wanted.since is not None else ""
    last = _day(wanted.until - 1) if wanted.until is not None else "9999-99-99"
    kept = [file for file in files if (not file.day or first <= file.day <= last) and _can_hold(file, wanted)]
    return sorted(kept, key=lambda file: (file.day, file.path))


def _can_hold(file: File, wanted: Wanted) -> bool:
    for column, values in wanted.values.items():
        low, high = file.lowest.get(column), file.highest.get(column)
        if low is None or high is None:
            continue
        # Statistics may be cut off, and a digest may be given by its beginning: compare what both have.
        if not any(value >= low[: len(value)] and value[: len(high)] <= high for value in values):
            return False
    return True


def data_files(opened: DeltaTable) -> list[File]:
    """The files of this version of a table, as deltalake has them from its log; none is opened.

    Raises InvalidDocument for a path that leads out of the table.
    """
    actions = opened.get_add_actions(flatten=True)
    columns: dict[str, Any] = {
        name: actions.column(index).to_pylist()
        for index, name in enumerate(actions.schema.names)
        if name in ("path", "num_records", "partition.date") or name.partition(".")[2] in COLUMNS
    }
    found = []
    for at, path in enumerate(columns["path"]):
        found.append(
            File(
                path,
                str(columns["partition.date"][at]) if "partition.date" in columns else "",
                int(columns["num_records"][at] or 0) if "num_records" in columns else 0,
                _bounds(columns, "min", at),
                _bounds(columns, "max", at),
            )
        )
    return found


def _bounds(columns: dict[str, Any], which: str, at: int) -> dict[str, str]:
    return {
        name: str(columns[key][at])
        for name in COLUMNS
        if (key := f"{which}.{name}") in columns and columns[key][at] is not None
    }


def alike(paths: Iterable[str]) -> list[list[str]]:
    """Parquet files by the columns that they have: a column that came later is not in older files."""
    found: dict[frozenset[str], list[str]] = {}
    for path in paths:
        try:
            columns = _columns(path)
        except (OSError, pa.ArrowException):
            columns = frozenset()  # whoever reads it says what is wrong with it
        found.setdefault(columns, []).append(path)
    return list(found.values())


@lru_cache(maxsize=1 << 16)
def _columns(path: str) -> frozenset[str]:
    # Data files never change, and each has a name of its own.
    return frozenset(pq.read_schema(path, memory_map=True).names)


def local_path(root: Path, path: str) -> str:
    """A file of a table in a local folder. Raises InvalidDocument when it lies elsewhere."""
    top = os.path.normpath(root)
    found = os.path.normpath(os.path.join(top, unquote(path)))  # noqa: PTH118  # of thousands of files; Path takes 20 times as long
    if not found.startswith(top + os.sep):
        raise InvalidDocument("names a file outside of the table", source=str(root), field=path)
    return found
