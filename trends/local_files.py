"""Delta tables in a local folder through a power cut: flushed to the disk, and repaired when it came before that.

deltalake never calls fsync. What it has committed is flushed here, and the version up to which that was
done is kept in the journal, which lets go of rows only afterwards. What lies behind that version after
a power cut may be empty, torn or missing; it is read through before it is believed, and set aside if it
does not hold: its rows are still in the journal.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from edgeward.errors import EdgewardError
from edgeward.storage import fsync_folder, make_folder

log = logging.getLogger(__name__)

_LOG = "_delta_log"
_LAST_CHECKPOINT = "_last_checkpoint"
#: Where a damaged log entry goes, beside the log: evidence, that no reader looks at.
ASIDE = "_damaged"


class LocalFolder:
    """Where tables lie: one folder for each, in `folder`."""

    options: dict[str, str] | None = None

    def check(self) -> None:
        """A folder takes tables."""

    def guarded(self) -> AbstractContextManager[None]:
        """What a disk refuses is an OSError, and stays one."""
        return nullcontext()

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        make_folder(folder)  # with its name: all that is flushed in it would go with it

    def uri(self, table: str) -> str:
        return str(self._folder / table)

    def settle(self, table: str, done: int, seen: int) -> int:  # the folder is looked at
        """Make what was committed after version `done` outlast a power cut; the newest version.

        Raises OSError when the disk does not take it.
        """
        return sync(self._folder / table, done)

    def settle_checkpoint(self, table: str) -> None:
        """Make the newest checkpoint outlast a power cut. Raises OSError."""
        folder = self._folder / table / _LOG
        for path in [*folder.glob("*.checkpoint*.parquet"), folder / _LAST_CHECKPOINT]:
            _fsync(path)
        fsync_folder(folder)

    def repair(self, table: str, done: int) -> None:
        """Raises EdgewardError where a power cut has left what only a person can decide."""
        repair(self._folder / table, done)


def _entry(root: Path, version: int) -> Path:
    return root / _LOG / f"{version:020d}.json"


def newest(root: Path) -> int:
    """The highest version that has a log entry; -1 without a table."""
    versions = [int(path.stem) for path in (root / _LOG).glob("*.json") if path.stem.isdigit()]
    return max(versions, default=-1)


def _newest_checkpoint(folder: Path) -> int:
    """The highest version that a checkpoint sums up; -1 without one."""
    versions = [path.name.partition(".")[0] for path in folder.glob("*.checkpoint*.parquet")]
    return max((int(version) for version in versions if version.isdigit()), default=-1)


def _actions(entry: Path) -> Iterator[dict[str, Any]]:
    for line in entry.read_text().splitlines():
        action = json.loads(line)
        if not isinstance(action, dict):
            raise ValueError("an action is no object")
        yield action


def _added(root: Path, entry: Path) -> list[tuple[Path, int]]:
    """The files that a version adds, with their sizes. Raises ValueError for an entry that is damaged."""
    found: list[tuple[Path, int]] = []
    actions = list(_actions(entry))
    if not actions:
        raise ValueError("it is empty")
    for action in actions:
        added = action.get("add")
        if added is not None:
            path = (root / unquote(str(added["path"]))).resolve()
            if not path.is_relative_to(root.resolve()):
                raise ValueError(f"it names a file outside of the table: {added['path']}")
            found.append((path, int(added["size"])))
    return found


def sync(root: Path, done: int) -> int:
    """fsync everything that the versions after `done` have added, and all folders above; the newest version.

    Raises OSError when the disk does not take it.
    """
    last = newest(root)
    if last == done:
        return last
    folders = {root.parent, root, root / _LOG}
    for version in range(done + 1, last + 1):
        entry = _entry(root, version)
        if not entry.exists():
            continue  # cleaned up: it lies in a checkpoint
        for path, _ in _added(root, entry):
            if path.exists():  # else a later version has removed it
                _fsync(path)
                folders.update(parent for parent in path.parents if parent.is_relative_to(root.resolve()))
        _fsync(entry)
    for folder in sorted(folders):  # in one order: what a cut leaves can be looked at again
        fsync_folder(folder)
    return last


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def repair(root: Path, done: int) -> list[int]:
    """Set aside what a power cut has damaged after version `done`; the versions that are gone.

    To be called when nothing writes. Raises EdgewardError when a damaged version is followed by one that
    this store did not make (its rows would be lost with it), or when the damage is older than `done`.
    """
    folder = root / _LOG
    if not folder.is_dir():
        return []
    _drop_damaged_checkpoints(folder)
    last = newest(root)
    # Up to the newest checkpoint entries are cleaned up; after it, a name that is missing went with the power.
    for version in range(max(done, _newest_checkpoint(folder)) + 1, last + 1):
        entry = _entry(root, version)
        if problem := _problem(root, entry):
            log.error("%s: version %d is damaged: %s", root.name, version, problem)
            return _set_aside(root, version, last)
    return []


def _problem(root: Path, entry: Path) -> str:
    """Why a version cannot be believed; empty when it can. Reads every byte that it adds."""
    try:
        added = _added(root, entry)
    except FileNotFoundError:
        return f"{entry.name} is missing"
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        return f"{entry.name}: {error}"
    for path, size in added:
        try:
            if path.stat().st_size != size:
                return f"{path.name}: {path.stat().st_size} bytes of {size}"
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    batch.validate()
        except FileNotFoundError:
            return f"{path.name} is missing"
        except (OSError, pa.ArrowException) as error:
            return f"{path.name}: {error}"
    return ""


def _set_aside(root: Path, first: int, last: int) -> list[int]:
    gone = []
    for version in range(first, last + 1):
        entry = _entry(root, version)
        if not entry.exists():
            continue
        if version > first and not _made_here(entry):
            raise EdgewardError(
                f"table {root.name}: version {first} was damaged by a power cut, and another program has"
                f" written version {version} after it",
                hint=f"restore {entry.parent} from a backup, or move {entry.name} away and start again",
            )
        gone.append(version)
    aside = root / _LOG / ASIDE
    aside.mkdir(exist_ok=True)
    # From the newest down: whatever interrupts this, no gap is left in the log.
    for version in reversed(gone):
        _entry(root, version).rename(aside / f"{version:020d}.json")
    fsync_folder(aside)
    fsync_folder(root / _LOG)
    return gone


def _made_here(entry: Path) -> bool:
    """Whether a version is of a store's own flush, compaction or retention, or is damaged, too."""
    try:
        return any("txn" in action or _ours(action) for action in _actions(entry))
    except (ValueError, UnicodeDecodeError):
        return True


def _ours(action: dict[str, Any]) -> bool:
    info = action.get("commitInfo")
    return isinstance(info, dict) and info.get(MARK) == "1"


#: What the commits of a store's own upkeep carry.
MARK = "edgewardUpkeep"


def _entries_from_first(folder: Path) -> bool:
    return (folder / f"{0:020d}.json").exists()


def _drop_damaged_checkpoints(folder: Path) -> None:
    """A checkpoint only sums up what the entries say: one that is damaged is removed, while they are there."""
    for checkpoint in folder.glob("*.checkpoint*.parquet"):
        if not _entries_from_first(folder):
            continue  # what it sums up is nowhere else
        try:
            pq.ParquetFile(checkpoint).close()
        except (OSError, pa.ArrowException) as error:
            log.error("%s: removed: %s", checkpoint.name, error)
            checkpoint.unlink()
    pointer = folder / _LAST_CHECKPOINT
    if not pointer.exists():
        return
    try:
        named = int(json.loads(pointer.read_text())["version"])
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        named = -1
    if named < 0 or not any(folder.glob(f"{named:020d}.checkpoint*.parquet")):
        log.error("%s: removed: it names no checkpoint", pointer)
        pointer.unlink()
