"""Download artifacts by digest: resumable, capped, watched, hashed, and only then visible."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.pace import Pace
from edgeward.client.transport import Transport
from edgeward.clock import Clock
from edgeward.errors import DigestMismatch, EdgewardError, TrustError, Unavailable
from edgeward.identifiers import check_digest
from edgeward.storage import fsync_folder, make_folder

log = logging.getLogger(__name__)

#: Left free on the disk for the outbox and the state, which must go on when a download cannot.
RESERVE = 64 << 20
#: Two clocks measure a window, which may differ by that share of it.
_EARLY = 0.02


@dataclass(frozen=True)
class Limits:
    """A transfer that brings less than `rate` bytes per second over `window` seconds, or that takes longer
    than `deadline` seconds altogether, is given up; what has arrived is kept for the next try. Time in which
    the device itself holds it up, to keep to its rate, does not count."""

    rate: float = 512.0
    window: float = 30.0
    deadline: float = 3600.0


class NotAsAsked(TrustError):
    """The answer is another one than was asked for; nothing of it was written."""


@dataclass(frozen=True)
class Origin:
    """Where a blob comes from: `path` before its digest, and the name's end of what has arrived from there.

    An `exact` one must answer with just the bytes that are missing, and say so; its `limits` are its own. What
    comes over the site's own network (`local`) has no cap and no window: those are for the site's link.
    """

    path: str
    partial: str
    exact: bool = False
    local: bool = False
    limits: Limits | None = None


#: May answer a Range with the whole, as HTTP permits.
CONTROLLER = Origin("/artifacts", ".part")
#: What peers have sent never mixes with the controller's: a lie must not cost bytes of the site's link.
PEER = Origin(
    "/blobs", ".peer", exact=True, local=True, limits=Limits(rate=16384.0, window=5.0, deadline=900.0)
)


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

    def __init__(
        self, folder: Path, *, limits: Limits | None = None, reserve: int = RESERVE, pace: Pace | None = None
    ) -> None:
        """`pace` is the one of all the agent's transfers; None: as fast as they come."""
        self.folder = folder
        self.pace = pace
        self._limits = limits or Limits()
        self._reserve = reserve
        make_folder(folder)

    def path(self, digest: str) -> Path:
        return self.folder / check_digest(digest)

    def read(self, digest: str, size: int) -> bytes:
        """The bytes, hashed again: what lies on a disk can change. Raises DigestMismatch, and drops it then;
        EdgewardError when it is not there, OSError when the disk does not give it."""
        path = self.path(digest)
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
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

    def has(self, digest: str, size: int) -> bool:
        path = self.path(digest)
        return path.exists() and path.stat().st_size == size

    def arrived(self, digest: str, origin: Origin) -> int:
        """Bytes of it that have come from there and are not whole yet."""
        try:
            return self.path(digest).with_suffix(origin.partial).stat().st_size
        except FileNotFoundError:
            return 0

    def fetch(
        self, transport: Transport, digest: str, size: int, clock: Clock, origin: Origin = CONTROLLER
    ) -> Path:
        """Download the blob of exactly `size` bytes from `origin`, going on where an earlier try stopped.

        Raises DigestMismatch when the result is not what was asked for, NotAsAsked when an exact origin's
        answer is not, NoRoom before the first byte, Paused when nothing may be transferred now,
        Unavailable when the transfer breaks or is too slow (what has arrived is kept for the next try),
        OSError when the disk does not take it.
        """
        path = self.path(digest)
        if self.has(digest, size):
            self._clear(path)
            return path
        partial = path.with_suffix(origin.partial)
        have = self.arrived(digest, origin)
        if have > size:
            partial.unlink()
            have = 0
        if have < size:
            if self.pace is not None and not origin.local:
                self.pace.begin()
            self.check_room(digest, size - have)
            self._transfer(transport, digest, size, partial, have, clock, origin)
        with partial.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        if got != digest:
            partial.unlink()
            raise DigestMismatch(f"artifact {digest[:16]}: what was downloaded hashes to {got[:16]}")
        partial.rename(path)
        fsync_folder(self.folder)
        self._clear(path)
        return path

    @staticmethod
    def _clear(path: Path) -> None:
        """What has arrived in part of what is whole by now, from elsewhere or as a delta."""
        for origin in (CONTROLLER, PEER):
            path.with_suffix(origin.partial).unlink(missing_ok=True)

    def check_room(self, digest: str, size: int) -> None:
        """Raises NoRoom unless `size` more bytes leave the reserve free."""
        free = shutil.disk_usage(self.folder).free
        if free < size + self._reserve:
            raise NoRoom(digest, free, size + self._reserve)

    def _transfer(
        self,
        transport: Transport,
        digest: str,
        size: int,
        partial: Path,
        have: int,
        clock: Clock,
        origin: Origin,
    ) -> None:
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with (
            watched(
                f"artifact {digest[:16]}", origin.limits or self._limits, clock, self.pace, local=origin.local
            ) as watch,
            transport.stream(
                f"{origin.path}/{digest}",
                headers=headers,
                connected=watch.connected,
                elsewhere=not origin.exact,
            ) as response,
        ):
            if origin.exact:
                _check_exact(response.status_code, response.headers, have, size)
            if have and not _goes_on(response.status_code, response.headers.get("Content-Range"), have):
                have = 0
            with partial.open("r+b" if have else "wb") as file:
                file.seek(have)
                for chunk in response.iter_raw():
                    have += len(chunk)
                    if have > size:
                        partial.unlink()
                        raise DigestMismatch(f"artifact {digest[:16]}: longer than the signed {size} bytes")
                    file.write(chunk)
                    watch.arrived(len(chunk))
        if have < size:
            raise Unavailable(f"artifact {digest[:16]}: the connection ended at {have} of {size} bytes")


def _goes_on(status: int, content_range: str | None, have: int) -> bool:
    """Whether the answer is the rest that was asked for (RFC 9110, 14.4), and not the whole or another part."""
    return status == 206 and (content_range or "").startswith(f"bytes {have}-")


def _check_exact(status: int, headers: Mapping[str, str], have: int, size: int) -> None:
    """Raises NotAsAsked."""
    wanted = {"content-length": str(size - have)}
    if have:
        wanted["content-range"] = f"bytes {have}-{size - 1}/{size}"
    for name, value in wanted.items():
        if headers.get(name) != value:
            raise NotAsAsked(f"{name} is {headers.get(name)!r} where {value!r} was asked for")
    if status != (206 if have else 200):
        raise NotAsAsked(f"the status is {status} for the bytes from {have} on")


class Watch:
    """One transfer's progress, and its connection, for the thread that ends it when there is too little."""

    def __init__(self, clock: Clock, pace: Pace | None = None, local: bool = False) -> None:
        self.received = 0
        self.problem = ""
        self._clock = clock
        self._pace = pace
        self._local = local
        self._held = 0.0
        self._held_since: float | None = None
        self._connection: socket.socket | None = None

    def connected(self, connection: socket.socket) -> None:
        # A descriptor of our own: the client may close, and the system hand out again, the other at any time.
        before = self._connection
        self._connection = socket.fromfd(connection.fileno(), connection.family, connection.type)
        if self._pace is not None and not self._local:
            self._pace.narrow(self._connection)
        if before is not None:  # the controller's, which pointed elsewhere
            before.close()
        if self.problem:
            self.cut(self.problem)

    def arrived(self, count: int) -> None:
        """Count `count` bytes that are written already, and wait as long as the device's rate wants.

        Raises Paused, Unavailable.
        """
        self.received += count
        if self._pace is None:
            return
        self._held_since = self._clock.monotonic()
        try:
            self._pace.take(count, capped=not self._local)
        finally:
            self._held, self._held_since = self.held(), None

    def held(self) -> float:
        """Seconds in which the device itself held the transfer up."""
        since = self._held_since
        return self._held + (0.0 if since is None else self._clock.monotonic() - since)

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
def watched(
    what: str, limits: Limits, clock: Clock, pace: Pace | None = None, *, local: bool = False
) -> Iterator[Watch]:
    """Raises Unavailable when the transfer in the block was too slow, apart from what `pace` held it up."""
    watch, done = Watch(clock, pace, local), threading.Event()

    def look() -> None:
        begun = mark = clock.monotonic()
        before, spared = 0, 0.0
        pause = min(limits.window, limits.deadline)
        while not done.wait(pause):
            now, held = clock.monotonic(), watch.held()
            left = limits.deadline - (now - begun - held)
            if left <= 0:
                watch.cut(f"{what}: not finished within {limits.deadline:g} s")
                return
            # A window of the peer's own time: it brings nothing while nobody reads.
            rest = limits.window - (now - mark - (held - spared))
            if rest <= limits.window * _EARLY:
                if watch.received - before < limits.rate * limits.window:
                    watch.cut(f"{what}: slower than {limits.rate:g} B/s over {limits.window:g} s")
                    return
                before, mark, spared, rest = watch.received, now, held, limits.window
            pause = min(rest, left)

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
