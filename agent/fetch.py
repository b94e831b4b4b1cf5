"""Download artifacts by digest: resumable, capped, watched, hashed, and only then visible."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgeward.client.transport import Transport
from edgeward.clock import Clock
from edgeward.errors import DigestMismatch, EdgewardError, Unavailable
from edgeward.identifiers import check_digest
from edgeward.storage import fsync_folder

log = logging.getLogger(__name__)

#: Left free on the disk for the outbox and the state, which must go on when a download cannot.
RESERVE = 64 << 20


@dataclass(frozen=True)
class Limits:
    """A transfer that brings less than `rate` bytes per second over `window` seconds, or that takes longer
    than `deadline` seconds altogether, is given up; what has arrived is kept for the next try."""

    rate: float = 512.0
    window: float = 30.0
    deadline: float = 3600.0


class NoRoom(Unavailable):
    """The disk has `measured` bytes free, the download and the reserve need `limit`."""

    def __init__(self, digest: str, measured: int, limit: int) -> None:
        super().__init__(
            f"artifact {digest[:16]}: {limit >> 10} KiB are needed on the disk, {measured >> 10} KiB are free",
            hint="what runs goes on; the download begins when there is room",
        )
        self.measured = measured
        self.limit = limit


class BlobStore:
    """Content-addressed files in one folder; a file under its digest is whole and verified."""

    def __init__(self, folder: Path, *, limits: Limits | None = None, reserve: int = RESERVE) -> None:
        self.folder = folder
        self._limits = limits or Limits()
        self._reserve = reserve
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

    def collect(self, keep: Iterable[str]) -> int:
        """Remove every blob, and what has arrived of one, that is not in `keep`; bytes that are free again."""
        wanted, freed = set(keep), 0
        for path in list(self.folder.iterdir()):
            if path.name.partition(".")[0] not in wanted:
                size = path.stat().st_size
                path.unlink(missing_ok=True)
                freed += size
        return freed

    def fetch(self, transport: Transport, digest: str, size: int, clock: Clock) -> Path:
        """Download `/artifacts/{digest}` of exactly `size` bytes, going on where an earlier try stopped.

        Raises DigestMismatch when the result is not what was asked for, NoRoom before the first byte,
        Unavailable when the transfer breaks or is too slow (what has arrived is kept for the next try),
        OSError when the disk does not take it.
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
            self.check_room(digest, size - have)
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

    def check_room(self, digest: str, size: int) -> None:
        """Raises NoRoom unless `size` more bytes leave the reserve free."""
        free = shutil.disk_usage(self.folder).free
        if free < size + self._reserve:
            raise NoRoom(digest, free, size + self._reserve)

    def _transfer(
        self, transport: Transport, digest: str, size: int, partial: Path, have: int, clock: Clock
    ) -> None:
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with (
            watched(f"artifact {digest[:16]}", self._limits, clock) as watch,
            transport.stream(
                f"/artifacts/{digest}", headers=headers, connected=watch.connected, elsewhere=True
            ) as response,
        ):
            if have and not _goes_on(response.status_code, response.headers.get("Content-Range"), have):
                have = 0
            with partial.open("r+b" if have else "wb") as file:
                file.seek(have)
                for chunk in response.iter_raw():
                    watch.received += len(chunk)
                    have += len(chunk)
                    if have > size:
                        partial.unlink()
                        raise DigestMismatch(f"artifact {digest[:16]}: longer than the signed {size} bytes")
                    file.write(chunk)
        if have < size:
            raise Unavailable(f"artifact {digest[:16]}: the connection ended at {have} of {size} bytes")


def _goes_on(status: int, content_range: str | None, have: int) -> bool:
    """Whether the answer is the rest that was asked for (RFC 9110, 14.4), and not the whole or another part."""
    return status == 206 and (content_range or "").startswith(f"bytes {have}-")


class Watch:
    """One transfer's progress, and its connection, for the thread that ends it when there is too little."""

    def __init__(self) -> None:
        self.received = 0
        self.problem = ""
        self._connection: socket.socket | None = None

    def connected(self, connection: socket.socket) -> None:
        # A descriptor of our own: the client may close, and the system hand out again, the other at any time.
        before = self._connection
        self._connection = socket.fromfd(connection.fileno(), connection.family, connection.type)
        if before is not None:  # the controller's, which pointed elsewhere
            before.close()
        if self.problem:
            self.cut(self.problem)

    def cut(self, problem: str) -> None:
        """End the transfer, also one that waits in a read: the read returns then."""
        self.problem = problem
        if self._connection is not None:
            try:
                self._connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # the peer was faster

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


@contextmanager
def watched(what: str, limits: Limits, clock: Clock) -> Iterator[Watch]:
    """Raises Unavailable when the transfer in the block was too slow."""
    watch, done = Watch(), threading.Event()

    def look() -> None:
        end, before = clock.monotonic() + limits.deadline, 0
        while not done.wait(min(limits.window, max(0.0, end - clock.monotonic()))):
            if clock.monotonic() >= end:
                watch.cut(f"{what}: not finished within {limits.deadline:g} s")
                return
            if watch.received - before < limits.rate * limits.window:
                watch.cut(f"{what}: slower than {limits.rate:g} B/s over {limits.window:g} s")
                return
            before = watch.received

    thread = threading.Thread(target=look, name="transfer", daemon=True)
    thread.start()
    try:
        yield watch
    except Unavailable:
        if watch.problem:
            raise Unavailable(watch.problem) from None
        raise
    finally:
        done.set()
        thread.join()
        watch.close()
    if watch.problem:
        raise Unavailable(watch.problem)
