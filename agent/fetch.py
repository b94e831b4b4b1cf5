"""Download artifacts by digest: resumable, capped, hashed, and only then visible."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from edgeward.client.transport import Transport
from edgeward.clock import Clock
from edgeward.errors import DigestMismatch, EdgewardError, Unavailable
from edgeward.identifiers import check_digest
from edgeward.storage import fsync_folder

log = logging.getLogger(__name__)

_CHUNK = 1 << 16
#: A transfer slower than this over SLOW_SECONDS is given up, to be resumed later.
MINIMUM_RATE = 512
SLOW_SECONDS = 30.0
DEADLINE = 3600.0


class BlobStore:
    """Content-addressed files in one folder; a file under its digest is whole and verified."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self.folder / check_digest(digest)

    def read(self, digest: str, size: int) -> bytes:
        """The bytes, hashed again: what lies on a disk can change. Raises DigestMismatch, and drops it then."""
        path = self.path(digest)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise EdgewardError(f"blob {digest[:16]} cannot be read: {error.strerror}") from None
        if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
            path.unlink(missing_ok=True)
            raise DigestMismatch(f"blob {digest[:16]} on disk is damaged; it was removed")
        return content

    def drop(self, digest: str) -> None:
        """Remove it, and what has arrived of it."""
        path = self.path(digest)
        path.unlink(missing_ok=True)
        path.with_suffix(".part").unlink(missing_ok=True)

    def fetch(self, transport: Transport, digest: str, size: int, clock: Clock) -> Path:
        """Download `/artifacts/{digest}` of exactly `size` bytes, going on where an earlier try stopped.

        Raises DigestMismatch when the result is not what was asked for, Unavailable when the transfer
        breaks or is too slow (what has arrived is kept for the next try).
        """
        path = self.path(digest)
        if path.exists() and path.stat().st_size == size:
            return path
        partial = path.with_suffix(".part")
        have = partial.stat().st_size if partial.exists() else 0
        if have > size:
            partial.unlink()
            have = 0
        if have < size:
            self._transfer(transport, digest, size, partial, have, clock)
        with partial.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        if got != digest:
            partial.unlink()
            raise DigestMismatch(f"artifact {digest[:16]}: what was downloaded hashes to {got[:16]}")
        partial.rename(path)
        fsync_folder(self.folder)
        return path

    def _transfer(
        self, transport: Transport, digest: str, size: int, partial: Path, have: int, clock: Clock
    ) -> None:
        headers = {"Range": f"bytes={have}-"} if have else None
        started = mark = clock.monotonic()
        marked = have
        with transport.stream(f"/artifacts/{digest}", headers=headers) as response:
            if have and response.status_code != 206:
                have = marked = 0
            with partial.open("r+b" if have else "wb") as file:
                file.seek(have)
                for chunk in response.iter_bytes(_CHUNK):
                    have += len(chunk)
                    if have > size:
                        file.close()
                        partial.unlink()
                        raise DigestMismatch(f"artifact {digest[:16]}: longer than the signed {size} bytes")
                    file.write(chunk)
                    now = clock.monotonic()
                    if now - started > DEADLINE:
                        raise Unavailable(f"artifact {digest[:16]}: not finished within {DEADLINE:.0f} s")
                    if now - mark > SLOW_SECONDS:
                        if have - marked < MINIMUM_RATE * SLOW_SECONDS:
                            raise Unavailable(f"artifact {digest[:16]}: slower than {MINIMUM_RATE} B/s")
                        mark, marked = now, have
        if have < size:
            raise Unavailable(f"artifact {digest[:16]}: the connection ended at {have} of {size} bytes")
