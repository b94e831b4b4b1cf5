"""The port of the artifact store, and how a file comes into any of its adapters."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from edgeward.errors import Conflict, DigestMismatch, InvalidDocument
from edgeward.identifiers import check_digest

MAX_ARTIFACT_BYTES = 4 << 30


class Upload:
    """A file on its way in: written to the disk, checked, flushed, and only then given to the store.

    `keep` gets the flushed file and takes it away; it raises what the store raises.
    """

    def __init__(self, folder: Path, digest: str, limit: int, keep: Callable[[Path], None]) -> None:
        self._digest = check_digest(digest)
        self._limit = limit
        self._keep = keep
        self._hash = hashlib.sha256()
        self._size = 0
        self._path = folder / f"{secrets.token_hex(8)}.part"
        folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = self._path.open("xb")

    def write(self, chunk: bytes) -> None:
        """Raises InvalidDocument when the file grows above the limit."""
        self._size += len(chunk)
        if self._size > self._limit:
            raise InvalidDocument(f"larger than {self._limit} bytes", source=f"artifact {self._digest[:16]}")
        self._hash.update(chunk)
        self._file.write(chunk)

    def finish(self) -> int:
        """Give the file to the store; its size. Raises DigestMismatch when it is not what it was announced as."""
        if self._hash.hexdigest() != self._digest:
            raise DigestMismatch(
                f"the uploaded bytes have SHA-256 {self._hash.hexdigest()}, announced was {self._digest}",
                hint="the file changed on the way or on disk: upload it again",
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._keep(self._path)
        return self._size

    def abandon(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Remote:
    """An artifact of `size` bytes that is fetched elsewhere.

    `url` signs an address that is good for a short time and for this artifact only; it may ask for
    credentials over the network. Raises Unavailable.
    """

    size: int
    url: Callable[[], str]


class Artifacts(Protocol):
    """Thread-safe. All methods raise InvalidDocument for an impossible digest, Unavailable when the store is away."""

    def receive(self, digest: str) -> Upload:
        """A new artifact's way in. What is there already stays as it is."""

    def add(self, data: bytes) -> str:
        """Store bytes that are in memory already; their digest."""

    def has(self, digest: str) -> bool:
        """Whether it is there now."""

    def size(self, digest: str) -> int:
        """In bytes. Raises NotFound."""

    def local(self, digest: str) -> AbstractContextManager[Path]:
        """The artifact as a file on this machine's disk, which stays for as long as the block lasts.

        Raises NotFound, and DigestMismatch when the store has other bytes under this name.
        """

    def source(self, digest: str) -> Path | Remote:
        """From where a device gets it: a file to send, or another server. Raises NotFound."""


def read(artifacts: Artifacts, digest: str) -> bytes:
    """All of it in memory. Raises what `Artifacts.local` raises."""
    with artifacts.local(digest) as path:
        return path.read_bytes()


def need(artifacts: Artifacts, digest: str, size: int, what: str) -> None:
    """Raises Conflict unless it is there with `size` bytes."""
    if not artifacts.has(digest):
        raise Conflict(f"{what} {digest} has not been uploaded", hint="upload all blobs before publishing")
    if (found := artifacts.size(digest)) != size:
        raise Conflict(f"{what} {digest} has {found} bytes, the manifest says {size}")
