"""Which files of a folder are still to be read: pure decisions over names, sizes and positions.

A file is an epoch of its own and its rows are numbered from 0, so the stream's position says how far the
folder is read. The epoch begins with the file's name, because files are read in the order of their names:
what sorts up to the position's file is done, even when that file is gone.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.streams.decode.sequence import Position

_NAME: Final = 40


@dataclass(frozen=True, slots=True, order=True)
class Found:
    """A file as it was when listed; ordered by `name`. `modified` is in nanoseconds since 1970."""

    name: str
    path: Path
    size: int
    modified: int

    @property
    def epoch(self) -> str:
        """At most 57 characters. Another size or time of change makes another epoch."""
        seen = f"{self.name}\0{self.size}\0{self.modified}".encode()
        return f"{self.name[:_NAME]}#{hashlib.sha256(seen).hexdigest()[:16]}"


def list_files(path: Path, pattern: str) -> list[Found]:
    """The files of a folder whose names fit `pattern`, hidden ones left out, or the one file that `path` is.

    Raises OSError when it cannot be read.
    """
    if not path.is_dir():
        return [_found(path)]
    found = []
    for entry in path.iterdir():
        if entry.name.startswith(".") or not fnmatch.fnmatchcase(entry.name, pattern):
            continue
        try:
            if entry.is_file():
                found.append(_found(entry))
        except FileNotFoundError:
            continue  # Gone since it was listed.
    return sorted(found)


def _found(path: Path) -> Found:
    about = path.stat()
    # A name that is no UTF-8 still has to fit into a text.
    return Found(os.fsencode(path.name).decode("utf-8", "replace"), path, about.st_size, about.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Remaining:
    """`files` to read in order, the first from row `skip` on; `changed` were read before they were altered."""

    files: tuple[Found, ...]
    skip: int = 0
    changed: tuple[Found, ...] = ()


def remaining(files: Sequence[Found], position: Position | None) -> Remaining:
    """What lies after `position`. A position that is not of a file leaves everything."""
    if position is None or "#" not in position[0]:
        return Remaining(tuple(files))
    epoch, seq = position
    for index, file in enumerate(files):
        if file.epoch == epoch:
            return Remaining(tuple(files[index:]), seq + 1)
    name = epoch.rpartition("#")[0]
    whole = len(name) < _NAME
    # Of names that were cut, those that begin alike cannot be told apart: better twice than never.
    later = [file for file in files if file.name[:_NAME] > name or (file.name[:_NAME] == name and not whole)]
    changed = [file for file in files if file.name == name and whole]
    return Remaining(tuple(later), 0, tuple(changed))
