"""The artifact store: a folder in which every file is named by its SHA-256."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import BinaryIO

from edgeward.errors import Conflict, DigestMismatch, InvalidDocument, NotFound
from edgeward.identifiers import check_digest
from edgeward.storage import fsync_folder, sha256_hex

MAX_ARTIFACT_BYTES = 4 << 30


class Upload:
    """A file on its way in: written beside its place, checked, flushed, then named."""

    def __init__(self, folder: Path, digest: str, limit: int) -> None:
        self._folder = folder
        self._digest = check_digest(digest)
        self._limit = limit
        self._hash = hashlib.sha256()
        self._size = 0
        self._path = folder / "incoming" / f"{secrets.token_hex(8)}.part"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = self._path.open("xb")

    def write(self, chunk: bytes) -> None:
        """Raises InvalidDocument when the file grows above the limit."""
        self._size += len(chunk)
        if self._size > self._limit:
            raise InvalidDocument(f"larger than {self._limit} bytes", source=f"artifact {self._digest[:16]}")
        self._hash.update(chunk)
        self._file.write(chunk)

    def finish(self) -> int:
        """Put the file in its place; its size. Raises DigestMismatch when it is not what it was announced as."""
        if self._hash.hexdigest() != self._digest:
            raise DigestMismatch(
                f"the uploaded bytes have SHA-256 {self._hash.hexdigest()}, announced was {self._digest}",
                hint="the file changed on the way or on disk: upload it again",
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        place = self._folder / self._digest[:2] / self._digest
        place.parent.mkdir(exist_ok=True)
        self._path.replace(place)
        fsync_folder(place.parent)
        fsync_folder(self._folder)
        return self._size

    def abandon(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


class Artifacts:
    def __init__(self, folder: Path, limit: int = MAX_ARTIFACT_BYTES) -> None:
        self._folder = folder
        self._limit = limit
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("incoming/*.part"):
            left.unlink()

    def receive(self, digest: str) -> Upload:
        """Raises InvalidDocument for an impossible digest."""
        return Upload(self._folder, digest, self._limit)

    def add(self, data: bytes) -> str:
        """Store bytes that are in memory already; their digest."""
        digest = sha256_hex(data)
        if not self.has(digest):
            upload = self.receive(digest)
            try:
                upload.write(data)
                upload.finish()
            finally:
                upload.abandon()
        return digest

    def has(self, digest: str) -> bool:
        return (self._folder / digest[:2] / check_digest(digest)).is_file()

    def path(self, digest: str) -> Path:
        """Raises NotFound."""
        if not self.has(digest):
            raise NotFound(f"there is no artifact {digest}")
        return self._folder / digest[:2] / digest

    def need(self, digest: str, size: int, what: str) -> Path:
        """The file of `digest`. Raises Conflict unless it is here with `size` bytes."""
        if not self.has(digest):
            raise Conflict(
                f"{what} {digest} has not been uploaded", hint="upload all blobs before publishing"
            )
        path = self.path(digest)
        if path.stat().st_size != size:
            raise Conflict(f"{what} {digest} has {path.stat().st_size} bytes, the manifest says {size}")
        return path
