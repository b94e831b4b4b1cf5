"""Artifacts as objects of a bucket, with a bounded folder of copies for what the controller reads itself.

An object `{prefix}{first two digits}/{SHA-256}` is written once: small ones by a PUT with `If-None-Match: *`,
large ones in parts under `incoming/` and from there by a copy whose end has the same condition. Devices
fetch them by pre-signed URLs (AWS Signature Version 4 in the query).
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from controller.artifacts.store import MAX_ARTIFACT_BYTES, Remote, Upload
from edgeward.clock import Clock
from edgeward.errors import Conflict, DigestMismatch, NotFound, Unavailable
from edgeward.identifiers import check_digest
from edgeward.object_store import S3Settings, translated
from edgeward.storage import fsync_folder, sha256_hex

log = logging.getLogger(__name__)

#: A device that is slower than this asks for another URL when its connection breaks.
URL_LIFETIME = timedelta(minutes=15)
#: Up to here an object is one PUT; above it goes in parts of this size, four at a time.
PART_BYTES = 8 << 20
PARTS_AT_ONCE = 4
CACHE_BYTES = 4 << 30
#: Parts of an upload that is older have been left by a controller that ended in the middle.
LEFT_AFTER = 86400.0
#: Whose sizes are remembered: an object does not change.
_KNOWN = 100_000
_CHUNK = 1 << 20


class S3Artifacts:
    """`folder` holds uploads on their way and copies. Opens no connection before the first call."""

    def __init__(
        self,
        settings: S3Settings,
        folder: Path,
        clock: Clock,
        *,
        limit: int = MAX_ARTIFACT_BYTES,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.settings = settings
        self.bucket = settings.open()
        self._clock = clock
        self._incoming = folder / "incoming"
        self._copies = folder / "copies"
        self._limit = limit
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._in_use: Counter[str] = Counter()
        for made in (self._incoming, self._copies):
            made.mkdir(parents=True, exist_ok=True)
        for left in (*self._incoming.glob("*.part"), *self._copies.glob("*.tmp")):
            left.unlink()
        #: Copies by last use, the oldest first.
        self._held: OrderedDict[str, int] = OrderedDict(
            (path.name, path.stat().st_size)
            for path in sorted(self._copies.iterdir(), key=lambda path: path.stat().st_mtime)
        )

    # into the bucket

    def receive(self, digest: str) -> Upload:
        def keep(path: Path) -> None:
            self._put(digest, path)
            size = path.stat().st_size
            path.replace(self._copies / digest)
            self._remember(digest, size)
            self._take_in(digest, size)

        return Upload(self._incoming, digest, self._limit, keep)

    def add(self, data: bytes) -> str:
        digest = sha256_hex(data)
        if not self.has(digest):
            upload = self.receive(digest)
            try:
                upload.write(data)
                upload.finish()
            finally:
                upload.abandon()
        return digest

    def _put(self, digest: str, path: Path) -> None:
        """Raises Conflict when other bytes lie under this name already."""
        with translated(self.settings, f"store {digest[:16]} in"):
            try:
                put_once(self, _key(digest), path)
            except AlreadyExistsError:
                self._check_existing(digest)

    def _check_existing(self, digest: str) -> None:
        got = hashlib.sha256()
        try:
            for piece in obstore.get(self.bucket, _key(digest)).stream(_CHUNK):
                got.update(piece)
        except FileNotFoundError:
            raise Unavailable(f"{digest[:16]} has just been deleted", hint="upload it again") from None
        if got.hexdigest() != digest:
            raise Conflict(
                f"{self.settings.shown}: object {_key(digest)} has other bytes than its name says",
                hint="find out who wrote it, delete it there, then upload again",
            )

    def remove_left(self) -> int:
        """Delete what uploads left half done more than a day ago; how many. Raises Unavailable."""
        with translated(self.settings, "list uploads in"):
            old = [
                found["path"]
                for page in obstore.list(self.bucket, "incoming/")
                for found in page
                if found["last_modified"].timestamp() < self._clock.now() - LEFT_AFTER
            ]
            if old:
                obstore.delete(self.bucket, old)
        return len(old)

    # out of it

    def has(self, digest: str) -> bool:
        try:
            self._head(digest)
        except NotFound:
            return False
        return True

    def size(self, digest: str) -> int:
        with self._lock:
            known = self._sizes.get(digest)
        return self._head(digest) if known is None else known

    def _head(self, digest: str) -> int:
        with translated(self.settings, f"look for {check_digest(digest)[:16]} in"):
            try:
                size: int = obstore.head(self.bucket, _key(digest))["size"]
            except FileNotFoundError:
                with self._lock:
                    self._sizes.pop(digest, None)
                raise NotFound(f"there is no artifact {digest}") from None
        self._remember(digest, size)
        return size

    def _remember(self, digest: str, size: int) -> None:
        with self._lock:
            self._sizes[digest] = size
            if len(self._sizes) > _KNOWN:
                self._sizes.popitem(last=False)

    def source(self, digest: str) -> Remote:
        """A size that is known is not asked for again: this is once for each download."""
        return Remote(self.size(check_digest(digest)), lambda: self._sign(digest))

    def _sign(self, digest: str) -> str:
        with translated(self.settings, f"sign a URL for {digest[:16]} in"):
            return obstore.sign(self.bucket, "GET", _key(digest), URL_LIFETIME)

    @contextmanager
    def local(self, digest: str) -> Iterator[Path]:
        path = self._copies / check_digest(digest)
        with self._lock:
            self._in_use[digest] += 1
        try:
            if not path.exists():
                self._take_in(digest, self._fetch(digest, path))
            else:
                self._take_in(digest, path.stat().st_size)
            yield path
        finally:
            with self._lock:
                self._in_use[digest] -= 1

    def _fetch(self, digest: str, path: Path) -> int:
        """Bring a copy here; its size. Visible only once it is whole and hashed."""
        temporary = path.with_name(f"{digest}.{secrets.token_hex(4)}.tmp")
        got, size = hashlib.sha256(), 0
        try:
            with translated(self.settings, f"read {digest[:16]} from"), temporary.open("xb") as file:
                try:
                    for piece in obstore.get(self.bucket, _key(digest)).stream(_CHUNK):
                        got.update(piece)
                        size += file.write(piece)
                        if size > self._limit:
                            break
                except FileNotFoundError:
                    raise NotFound(f"there is no artifact {digest}") from None
                file.flush()
                os.fsync(file.fileno())
            if got.hexdigest() != digest:
                raise DigestMismatch(
                    f"{self.settings.shown}: object {_key(digest)} has other bytes than its name says",
                    hint="find out who wrote it, delete it there, then upload the right one",
                )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(self._copies)
        return size

    def _take_in(self, digest: str, size: int) -> None:
        """Count a copy as used now; the longest unused go until the rest fits."""
        with suppress(FileNotFoundError):
            os.utime(self._copies / digest)  # the order survives a restart
        with self._lock:
            self._held[digest] = size
            self._held.move_to_end(digest)
            total = sum(self._held.values())
            for other in list(self._held):
                if total <= self._cache_bytes:
                    return
                if self._in_use[other] == 0:
                    total -= self._held.pop(other)
                    (self._copies / other).unlink(missing_ok=True)


def put_once(artifacts: S3Artifacts, key: str, path: Path) -> None:
    """Store a file under a name that is free. Raises AlreadyExistsError, BaseError."""
    bucket = artifacts.bucket
    if path.stat().st_size <= PART_BYTES:
        obstore.put(bucket, key, path.read_bytes(), mode="create")
        return
    parts = f"incoming/{secrets.token_hex(16)}"
    try:
        obstore.put(
            bucket, parts, path, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE
        )
        obstore.copy(bucket, parts, key, overwrite=False)
    finally:
        with suppress(BaseError, FileNotFoundError):
            obstore.delete(bucket, parts)


def _key(digest: str) -> str:
    return f"{digest[:2]}/{digest}"
