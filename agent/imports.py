"""What came in by hand, between `edgeward bundle import` and the daemon: a folder that appears whole or not at all.

    imports/000000000007/desired.json      the signed desired state
                        /tuf/*.json        release metadata, as the controller serves it
                        /blobs/{digest}    manifests and blobs that the device had not
    imports/part-*                         an import under way, or what is left of one that was killed
    imports/lock                           held by the import under way

Everything in a numbered folder has been verified, and is verified again on its way into use.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.fetch import BlobStore
from edgeward.errors import Conflict
from edgeward.identifiers import check_digest
from edgeward.storage import fsync_folder, make_folder

_DIGITS = 12
_PART = "part-"


@dataclass(frozen=True)
class Import:
    """One import, complete and durable."""

    number: int
    folder: Path

    def desired(self) -> bytes:
        return (self.folder / "desired.json").read_bytes()

    def metadata(self, name: str) -> bytes | None:
        """A file of the release metadata (`timestamp.json`); None when it was not in the bundle."""
        try:
            return (self.folder / "tuf" / name).read_bytes()
        except FileNotFoundError:
            return None

    def take(self, digest: str, size: int, blobs: BlobStore) -> None:
        """Move a blob into the store if it is here; hashed again, for a disk forgets."""
        source, target = self.folder / "blobs" / check_digest(digest), blobs.path(digest)
        if not source.is_file() or (target.exists() and target.stat().st_size == size):
            return
        with source.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == digest
        if not same:
            source.unlink()
            return
        source.rename(target)
        fsync_folder(blobs.folder)


class Imports:
    """The imports in an agent's folder. Only the newest counts."""

    def __init__(self, agent: Path) -> None:
        self.folder = agent / "imports"

    def newest(self) -> Import | None:
        numbers = self._numbers()
        return self._import(max(numbers)) if numbers else None

    def drop(self, up_to: int) -> None:
        """Remove the imports up to that number: nothing needs them any more."""
        for number in sorted(self._numbers()):
            if number <= up_to:
                # A half-removed import must not look whole after a power cut.
                leaving = self.folder / f"{_PART}{secrets.token_hex(4)}"
                self._import(number).folder.rename(leaving)
                fsync_folder(self.folder)
                shutil.rmtree(leaving, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed imports left, unless one is under way."""
        if not self.folder.is_dir():
            return
        try:
            with self._locked():
                self._remove_parts()
        except Conflict:
            return

    @contextmanager
    def receiving(self) -> Iterator[Path]:
        """An empty folder for an import; left normally, it becomes the newest import, durable at once.

        Raises Conflict when another import is under way. Left by an error, or killed, there is no import.
        """
        make_folder(self.folder, mode=0o700)
        with self._locked():
            self._remove_parts()
            part = self.folder / f"{_PART}{secrets.token_hex(4)}"
            try:
                part.mkdir(mode=0o700)
                yield part
                _flush(part)
                last = max(self._numbers(), default=0)
                part.rename(self._import(last + 1).folder)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
            fsync_folder(self.folder)
            self.drop(last)

    def _import(self, number: int) -> Import:
        return Import(number, self.folder / f"{number:0{_DIGITS}d}")

    def _numbers(self) -> list[int]:
        try:
            names = [entry.name for entry in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        return [int(name) for name in names if len(name) == _DIGITS and name.isdecimal()]

    def _remove_parts(self) -> None:
        for left in self.folder.glob(f"{_PART}*"):
            shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock goes with this process, also by SIGKILL."""
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise Conflict(
                f"another import into {self.folder.parent} is under way", hint="wait for its end"
            ) from None
        try:
            yield
        finally:
            os.close(fd)


def _flush(folder: Path) -> None:
    """Every file and folder below, and the folder itself, to the disk."""
    for entry in folder.iterdir():
        if entry.is_dir():
            _flush(entry)
        else:
            fd = os.open(entry, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    fsync_folder(folder)
