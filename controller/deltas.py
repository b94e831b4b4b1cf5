"""Deltas between artifacts: made on first demand, one at a time, and kept in a bounded folder."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from controller.artifacts import Artifacts, read
from edgeward.delta import Delta, make
from edgeward.delta.frame import HEAD_BYTES, decode
from edgeward.errors import EdgewardError, NotFound
from edgeward.storage import sha256_hex, write_atomic

log = logging.getLogger(__name__)

#: Making takes the base, the artifact and up to 500 MB beside them in memory: larger ones have no deltas.
ARTIFACT_BYTES = 128 << 20
CACHE_BYTES = 1 << 30
CACHE_FILES = 10_000
#: Pairs that wait to be made; whoever asks for more is told to come again.
QUEUE = 64

Pair = tuple[str, str]
Make = Callable[..., Delta | None]


class _Stopped(Exception):
    pass


@dataclass(frozen=True)
class Kept:
    """A delta on disk: a file named `{digest}.{base}.{SHA-256 of the delta}`."""

    path: Path
    digest: str
    base: str
    sha256: str
    size: int

    def codec(self) -> str:
        """Raises OSError, DeltaError."""
        with self.path.open("rb") as file:
            return decode(file.read(HEAD_BYTES)).codec.name


class Deltas:
    """Thread-safe. What is not worthwhile is remembered, too, as an empty file `{digest}.{base}.none`."""

    def __init__(
        self,
        folder: Path,
        artifacts: Artifacts,
        *,
        artifact_bytes: int = ARTIFACT_BYTES,
        cache_bytes: int = CACHE_BYTES,
        cache_files: int = CACHE_FILES,
        make: Make = make,
    ) -> None:
        self._folder = folder
        self._artifacts = artifacts
        self._artifact_bytes = artifact_bytes
        self._cache_bytes = cache_bytes
        self._cache_files = cache_files
        self._make = make
        self._lock = threading.Condition()
        self._stop = False
        #: Goes up whenever something has been made: until then, asking again is of no use.
        self.revision = 0
        self._thread: threading.Thread | None = None
        self._wanted: deque[Pair] = deque()
        self._making: Pair | None = None
        folder.mkdir(parents=True, exist_ok=True)
        #: By last use, the oldest first.
        self._kept: OrderedDict[Pair, Kept] = OrderedDict()
        self._load()

    def find(self, digest: str, bases: Sequence[str]) -> Kept | None:
        """The smallest delta from one of `bases`; None while it is being made or waits for that.

        Raises NotFound when there is no such artifact, or no worthwhile delta from any of these bases.
        """
        self._artifacts.size(digest)
        pairs = [(digest, base) for base in dict.fromkeys(bases) if self._usable(digest, base)]
        with self._lock:
            missing = [pair for pair in pairs if pair not in self._kept]
            for pair in missing:
                self._demand(pair)
            if missing:
                return None
            found = [self._kept[pair] for pair in pairs]
            for pair in pairs:
                self._kept.move_to_end(pair)
        worthwhile = [kept for kept in found if kept.size]
        if not worthwhile:
            raise NotFound(f"there is no delta for {digest[:16]}", hint="fetch the whole artifact")
        best = min(worthwhile, key=lambda kept: kept.size)
        try:
            os.utime(best.path)  # the order of use survives a restart
        except FileNotFoundError:
            with self._lock:
                self._kept.pop((digest, best.base), None)
            return self.find(digest, bases)
        return best

    def stop(self) -> None:
        """End within about a second; what is half made is made again on the next demand."""
        with self._lock:
            self._stop = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()

    # what is asked for

    def _usable(self, digest: str, base: str) -> bool:
        if base == digest:
            return False
        try:
            return max(self._artifacts.size(each) for each in (digest, base)) <= self._artifact_bytes
        except NotFound:
            return False

    def _demand(self, pair: Pair) -> None:
        """With the lock held."""
        if pair == self._making or pair in self._wanted or len(self._wanted) >= QUEUE or self._stop:
            return
        self._wanted.append(pair)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="deltas", daemon=True)
            self._thread.start()
        self._lock.notify_all()

    # the making

    def _work(self) -> None:
        # Requests go first: on Linux this is the priority of one thread.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while True:
            with self._lock:
                while not self._wanted and not self._stop:
                    self._lock.wait()
                if self._stop:
                    return
                pair = self._making = self._wanted.popleft()
            try:
                kept = self._made(*pair)
            except _Stopped:
                return
            except (EdgewardError, OSError, MemoryError) as error:
                log.warning("no delta from %s to %s: %s", pair[1][:16], pair[0][:16], error)
                # In memory only: after a restart it is tried again.
                kept = Kept(self._folder / f"{pair[0]}.{pair[1]}.none", *pair, "", 0)
            with self._lock:
                self._making = None
                self._kept[pair] = kept
                self._evict()
                self.revision += 1

    def _made(self, digest: str, base: str) -> Kept:
        old = read(self._artifacts, base)
        new = read(self._artifacts, digest)
        delta = self._make(old, new, going_on=self._going_on)
        content = b"" if delta is None or len(delta.content) > self._cache_bytes else delta.content
        sha256 = sha256_hex(content) if content else "none"
        path = self._folder / f"{digest}.{base}.{sha256}"
        write_atomic(path, content)
        if delta is not None:
            share = len(content) / len(new)
            log.info(
                "delta to %s: %s, %d bytes, %.1f %%", digest[:16], delta.codec.name, len(content), 100 * share
            )
        return Kept(path, digest, base, sha256, len(content))

    def _going_on(self) -> None:
        if self._stop:
            raise _Stopped

    # the folder

    def _load(self) -> None:
        found = []
        for path in self._folder.iterdir():
            parts = path.name.split(".")
            if len(parts) != 3 or not all(parts):
                path.unlink()  # what a crash left in the middle of a write
                continue
            digest, base, sha256 = parts
            status = path.stat()
            found.append((status.st_mtime, Kept(path, digest, base, sha256, status.st_size)))
        for _, kept in sorted(found, key=lambda pair: pair[0]):
            self._kept[kept.digest, kept.base] = kept
        self._evict()

    def _evict(self) -> None:
        """The longest unused go until both bounds hold; with the lock held."""
        total = sum(kept.size for kept in self._kept.values())
        while self._kept and (total > self._cache_bytes or len(self._kept) > self._cache_files):
            _, oldest = self._kept.popitem(last=False)
            oldest.path.unlink(missing_ok=True)
            total -= oldest.size
