"""A new model from what the device has: a delta from the controller, checked like the whole file.

Never more than an attempt: whatever goes wrong, the whole artifact is fetched instead. What comes out
counts only by its SHA-256, so neither the delta nor who sent it has to be trusted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from agent.fetch import BlobStore, Limits, NoRoom, Watch, watched
from agent.pace import Paused
from agent.state import SlotRecord
from edgeward.client.transport import Transport
from edgeward.clock import Clock
from edgeward.delta import DeltaError, stream
from edgeward.errors import DigestMismatch, EdgewardError, Unavailable
from edgeward.storage import fsync_folder
from edgeward.wire.desired import ModelRef
from edgeward.wire.package import Blob, Manifest, Variant

log = logging.getLogger(__name__)

#: Below this a delta saves less than asking for it costs.
SMALLEST = 16 << 10
#: As many bases as the controller accepts in one question.
MAX_BASES = 8
#: How long the controller may hold the answer while it makes the delta; below the transport's time-out.
WAIT = 12
#: Tries without a new byte, the controller's "being made" among them, until the whole file is fetched.
TRIES = 3
#: A controller that wants more seconds than this to pass is not asked again at once.
AT_ONCE = 1.0


def earlier(records: Mapping[str, SlotRecord], slot: str, model: str) -> list[ModelRef]:
    """The models whose files may be bases, best first: this slot's, then other slots' of the same name."""
    others = (record for name, record in records.items() if name != slot)
    found = [records[slot].running, records[slot].previous] if slot in records else []
    found += [
        ref for record in others for ref in (record.running, record.previous) if ref and ref.model == model
    ]
    return list(dict.fromkeys(ref for ref in found if ref is not None))


def bases(variant: Variant, manifests: Iterable[Manifest]) -> list[Blob]:
    """The blobs of earlier versions to make `variant` of: of the same name first, then of the same runtime."""
    held = [
        found for manifest in manifests for found in manifest.variants if found.runtime == variant.runtime
    ]
    held.sort(key=lambda found: found.name != variant.name)
    blobs = {found.blob.digest: found.blob for found in held if found.blob.digest != variant.blob.digest}
    return list(blobs.values())


def fetch(
    blobs: BlobStore,
    transport: Transport,
    blob: Blob,
    bases: Sequence[Blob],
    clock: Clock,
    limits: Limits | None = None,
) -> int | None:
    """Try to make `blob` of one of `bases`; the bytes that came over the network, None without success.

    After a success `blobs` has it, whole and verified. Raises Paused when nothing may be transferred now, and
    nothing else of its own: the caller fetches the whole file unless it is there.
    """
    folder = blobs.folder.with_name("deltas")
    if blobs.path(blob.digest).exists():
        _clear(folder, blob.digest)  # what an earlier attempt has left, if the whole has come meanwhile
        return None
    if blob.size < SMALLEST:
        return None
    held = [base for base in bases if blobs.path(base.digest).is_file()][:MAX_BASES]
    if not held:
        return None
    try:
        folder.mkdir(exist_ok=True)
        delta, base = _Download(blobs, folder, transport, blob, held, clock, limits or Limits()).run()
        _make(blobs, folder, blob, base, delta)
    except NoRoom as error:
        log.info("no delta for %s: %s", blob.digest[:16], error)
        _clear(folder)
        return None
    except Paused:
        raise
    except Unavailable as error:
        log.info("no delta for %s now, its whole is fetched: %s", blob.digest[:16], error)
        return None
    except (EdgewardError, OSError, MemoryError) as error:
        log.info("no delta for %s, its whole is fetched: %s", blob.digest[:16], error or type(error).__name__)
        _clear(folder)
        return None
    _clear(folder)
    log.info("%s: a delta of %d instead of %d bytes", blob.digest[:16], len(delta), blob.size)
    return len(delta)


def _clear(folder: Path, digest: str = "", keep: Path | None = None) -> None:
    """Remove what lies here of `digest`, or all: one artifact is fetched at a time."""
    for path in folder.glob(f"{digest}*"):
        if path != keep:
            path.unlink(missing_ok=True)


def _make(blobs: BlobStore, folder: Path, blob: Blob, base: Blob, delta: bytes) -> None:
    """Write, hash, and only then rename. Raises DigestMismatch, DeltaError, OSError."""
    made = folder / f"{blob.digest}.tmp"
    got = hashlib.sha256()
    held = blobs.read(base.digest, base.size)
    with made.open("wb") as file:
        for piece in stream(delta, held, size=blob.size):
            got.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if got.hexdigest() != blob.digest:
        raise DigestMismatch(f"what the delta makes hashes to {got.hexdigest()[:16]}")
    made.rename(blobs.path(blob.digest))
    fsync_folder(blobs.folder)


class _Download:
    """One delta's way over the network; what has arrived is kept in a file named by digest and ETag."""

    def __init__(
        self,
        blobs: BlobStore,
        folder: Path,
        transport: Transport,
        blob: Blob,
        held: Sequence[Blob],
        clock: Clock,
        limits: Limits,
    ) -> None:
        self._blobs = blobs
        self._folder = folder
        self._transport = transport
        self._blob = blob
        self._held = {base.digest: base for base in held}
        self._clock = clock
        self._limits = limits
        self._slow = ""
        self._started = self._mark = clock.monotonic()
        self._since = 0
        # Digests are checked hexadecimal: nothing in the query needs escaping.
        query = "".join(f"&base={digest}" for digest in self._held)
        self._path = f"/artifacts/{blob.digest}/delta?wait={WAIT}{query}"
        found = [path for path in folder.glob(f"{blob.digest}.*") if _is_etag(path.name.rpartition(".")[2])]
        self._partial: Path | None = found[0] if len(found) == 1 else None

    def run(self) -> tuple[bytes, Blob]:
        """The delta and its base.

        Raises Unavailable when what has arrived is worth going on with later, Paused, NoRoom.
        """
        if self._blobs.pace is not None:
            self._blobs.pace.begin()
        idle = 0
        while True:
            before = self._have()
            try:
                base = self._attempt()
                assert self._partial is not None
                return self._partial.read_bytes(), base
            except (NoRoom, Paused):
                raise
            except Unavailable as error:
                if self._slow or (error.retry_after or 0.0) > AT_ONCE:
                    raise
                grown = self._have() > before
                idle = 0 if grown else idle + 1
                if idle >= TRIES:
                    raise
                if not grown:
                    self._mark, self._since = self._clock.monotonic(), 0

    def _have(self) -> int:
        return self._partial.stat().st_size if self._partial is not None and self._partial.exists() else 0

    def _attempt(self) -> Blob:
        # No content coding: a decoder would make what it likes of a small body.
        headers = {"Accept-Encoding": "identity"}
        # One byte again: there is a range to answer even when all has arrived.
        begin = max(0, self._have() - 1)
        if self._partial is not None and begin:
            etag = self._partial.name.rpartition(".")[2]
            headers |= {"Range": f"bytes={begin}-", "If-Range": f'"{etag}"'}
        with (
            self._watched() as watch,
            self._transport.stream(self._path, headers=headers, connected=watch.connected) as response,
        ):
            base = self._held.get(response.headers.get("Edgeward-Delta-Base", ""))
            etag = response.headers.get("ETag", "").strip('"')
            if base is None or not _is_etag(etag):
                raise DeltaError("the answer does not say from which of the device's files the delta is")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise DeltaError("the answer is coded although that was not asked for")
            partial = self._folder / f"{self._blob.digest}.{etag}"
            going_on = response.status_code == 206
            have = begin if going_on else 0
            announced = response.headers.get("Content-Length", "")
            wanted = int(announced) if re.fullmatch("[0-9]{1,18}", announced) else self._blob.size - have - 1
            self._check_length(have + wanted)
            self._blobs.check_room(self._blob.digest, wanted + self._blob.size)
            self._partial = partial
            _clear(self._folder, keep=partial)
            with partial.open("r+b" if going_on else "wb") as file:
                file.seek(have)
                # As it arrives: a fixed size of chunk would wait for more, and lose it all when the link breaks.
                for chunk in response.iter_raw():
                    have += len(chunk)
                    self._check_length(have)
                    file.write(chunk)
                    self._check_pace(len(chunk))
                    self._spare(watch, len(chunk))
            return base

    @contextmanager
    def _watched(self) -> Iterator[Watch]:
        """One connection, ended when it brings too little, also of the answer's head."""
        what = f"delta for {self._blob.digest[:16]}"
        with watched(what, self._limits, self._clock, self._blobs.pace) as watch:
            try:
                yield watch
            finally:
                self._slow = watch.problem

    def _check_length(self, length: int) -> None:
        if length >= self._blob.size:
            raise DeltaError(f"the delta is not smaller than the artifact's signed {self._blob.size} bytes")

    def _spare(self, watch: Watch, arrived: int) -> None:
        """Wait as the device's rate wants; that is not the peer's time."""
        before = watch.held()
        watch.arrived(arrived)
        held = watch.held() - before
        self._started += held
        self._mark += held

    def _check_pace(self, arrived: int) -> None:
        """Over all connections: each may bring a byte and break. Raises DeltaError."""
        limits, now = self._limits, self._clock.monotonic()
        self._since += arrived
        if now - self._started > limits.deadline:
            raise DeltaError(f"the delta has not come within {limits.deadline:g} s")
        if now - self._mark > limits.window:
            if self._since < limits.rate * limits.window:
                raise DeltaError(f"the delta comes slower than {limits.rate:g} B/s")
            self._mark, self._since = now, 0


def _is_etag(text: str) -> bool:
    """A SHA-256, so that it may be a part of a file's name."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None
