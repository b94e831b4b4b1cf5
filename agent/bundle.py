"""Take a bundle that somebody carried here: everything is verified before anything of the device changes.

The device's own trust decides, as online: its keys for the desired state, its TUF root and the metadata that it
has trusted so far for the release, digests for the bytes. The daemon does the rest, see `agent/imports.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from agent.desired import check
from agent.fetch import RESERVE, BlobStore
from agent.identity import Identity
from agent.imports import Imports
from agent.release_metadata import MetadataExpired, MetadataRefused
from agent.state import State
from agent.trusted_clock import TrustedClock
from agent.verify import read_manifest, signed_length
from edgeward.bundle import Bundle, blob_name, desired_name, manifest_name, metadata_name, open_bundle
from edgeward.clock import Clock
from edgeward.errors import DigestMismatch, EdgewardError, NotFound, PackageError, TrustError, Unavailable
from edgeward.trust import dsse
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState, ModelRef
from edgeward.wire.package import MAX_MANIFEST_BYTES

#: The largest file of release metadata that a TUF client takes (tuf.ngclient's UpdaterConfig).
MAX_METADATA_BYTES = 5_000_000

_FRESH = "export a fresh bundle and bring it before its metadata expires: `edgeward bundle export` says when"


@dataclass
class Imported:
    """What was taken. `news` is False when the device had accepted this generation before."""

    device: str
    generation: int
    news: bool
    models: list[ModelRef] = field(default_factory=list)
    taken: int = 0
    bytes: int = 0
    present: int = 0
    left: int = 0


def import_bundle(path: Path, folder: Path, clock: Clock) -> Imported:
    """Verify the bundle in `path` for the agent in `folder`, and hand it to the daemon.

    After a return it is durable and a running daemon takes it, or else its next start. Whatever is raised,
    the device is as it was: NotFound (not enrolled, or nothing for this device), PackageError (not a whole
    bundle), TrustError (a signature, sequence, expiry or digest), Conflict (another import is under way),
    Unavailable (no room).
    """
    trusted = TrustedClock(clock, _Floor(folder / "state.db"))
    identity = Identity(folder, trusted)
    imports = Imports(folder)
    with open_bundle(path) as bundle:
        try:
            with imports.receiving() as part:
                raw = _read_desired(bundle, path, identity)
                desired, news = _check_desired(raw, folder, identity, imports, trusted)
                done = Imported(str(identity.name), desired.generation, news)
                _Receiver(bundle, path, folder, part, identity, trusted, done).receive(desired, raw)
        except OSError as error:
            raise Unavailable(
                f"{folder}: the import failed and left nothing: {error.strerror}",
                hint="see to the disk, then import again",
            ) from None
    return done


class _Floor:
    """The device's time floor, which only its agent may move."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def time_floor(self) -> float:
        if not self._path.exists():
            return 0.0
        state = _opened(self._path)
        try:
            return state.time_floor()
        finally:
            state.close()

    def keep_time_floor(self, at: float) -> None:
        """Nothing: what is learned here is for this import alone."""


def _read_desired(bundle: Bundle, path: Path, identity: Identity) -> bytes:
    name = desired_name(identity.name.device)
    if bundle.size(name) is None:
        prefix, suffix = desired_name("|").split("|")
        found = [
            item.removeprefix(prefix).removesuffix(suffix) for item in bundle.names if item.startswith(prefix)
        ]
        raise NotFound(
            f"{path} holds nothing for device {identity.name.device}; it is for {', '.join(found) or 'none'}",
            hint=f"edgeward bundle export --device {identity.name.device} --out FILE",
        )
    return bundle.read(name, dsse.MAX_DSSE_BYTES)


def _check_desired(
    raw: bytes, folder: Path, identity: Identity, imports: Imports, clock: TrustedClock
) -> tuple[DesiredState, bool]:
    """The desired state, held against the sequence of those accepted before and of an import that still waits."""
    keys, before = identity.enrollment.trust.desired_keys, 0
    waiting = imports.newest()  # before the daemon's state: it may be taken at any moment
    if waiting is not None:
        # What the daemon will refuse, or has taken meanwhile, does not count.
        with contextlib.suppress(TrustError, OSError):
            before = dsse.verify(waiting.desired(), PAYLOAD_TYPE, keys, DesiredState).generation
    if (folder / "state.db").exists():
        before = max(before, _accepted(folder / "state.db"))
    desired = check(raw, keys, identity.name, before, clock)
    if desired is not None:
        return desired, True
    return dsse.verify(raw, PAYLOAD_TYPE, keys, DesiredState), False


def _accepted(path: Path) -> int:
    """The highest generation that the device has accepted."""
    state = _opened(path)
    try:
        return state.generation()
    finally:
        state.close()


def _opened(path: Path) -> State:
    try:
        return State(path, read_only=True)
    except (sqlite3.Error, TypeError) as error:  # also while the agent is just making it
        raise EdgewardError(
            f"{path}: what was accepted before cannot be read: {error}",
            hint="start the agent, then import again",
        ) from None


class _Receiver:
    """One import into `part`, a folder that is thrown away unless all of it succeeds."""

    def __init__(
        self, bundle: Bundle, path: Path, folder: Path, part: Path, identity: Identity, clock: TrustedClock,
        done: Imported,
    ) -> None:  # fmt: skip
        self._bundle = bundle
        self._clock = clock
        self._path = path
        self._part = part
        self._root = identity.enrollment.trust.tuf_root.encode()
        self._trusted = folder / "tuf"
        self._blobs = BlobStore(folder / "blobs")
        self._done = done
        self._metadata: dict[str, bytes] = {}
        self._used = {"format", desired_name(identity.name.device)}

    def receive(self, desired: DesiredState, raw: bytes) -> None:
        self._done.models = sorted(
            {ref for slot in desired.slots.values() for ref in (slot.active, slot.shadow) if ref is not None},
            key=lambda ref: (ref.model, ref.version),
        )
        for name in ("blobs", "tuf"):
            (self._part / name).mkdir()
        wanted: dict[str, tuple[str, int]] = {}
        with self._trial() as trusted:
            for ref in self._done.models:
                wanted |= self._check_release(ref, trusted)
        self._check_room(wanted)
        for name, data in self._metadata.items():
            (self._part / "tuf" / name).write_bytes(data)
        for name, (digest, size) in wanted.items():
            self._copy(name, digest, size)
        (self._part / "desired.json").write_bytes(raw)
        names = {name for name in self._bundle.names if not name.startswith("tuf/")}
        self._done.left = len(names - self._used)

    @contextlib.contextmanager
    def _trial(self) -> Iterator[Path]:
        """A copy of what this device trusts, to try the bundle's metadata on.

        The daemon's own moves only when it takes the import: what is refused here has not been here.
        """
        trial = self._part / "trial"
        (trial / "root_history").mkdir(parents=True)
        for source in (*self._trusted.glob("*.json"), *self._trusted.glob("root_history/*.json")):
            if not source.is_symlink():
                shutil.copyfile(source, trial / source.relative_to(self._trusted))
        yield trial
        shutil.rmtree(trial)

    def _read_metadata(self, name: str) -> bytes | None:
        """What the TUF client asks for, in its order: the next piece only after the last one was verified."""
        member = metadata_name(name)
        if self._bundle.size(member) is None:
            return None
        self._metadata[name] = self._bundle.read(member, MAX_METADATA_BYTES)
        return self._metadata[name]

    def _check_release(self, ref: ModelRef, trusted: Path) -> dict[str, tuple[str, int]]:
        """Members to take for a version, with digest and signed size: those that this device has not."""
        try:
            length = signed_length(trusted, self._root, self._read_metadata, ref, self._clock)
        except MetadataExpired as error:
            raise TrustError(f"{self._path}: {error.message}{self._expiry()}", hint=_FRESH) from None
        except (MetadataRefused, TrustError) as error:
            raise TrustError(f"{self._path}: {error.message}", hint=_FRESH) from None
        except Unavailable as error:
            raise PackageError(f"{self._path}: {error.message}", hint=_FRESH) from None
        manifest = read_manifest(ref, self._manifest(ref, length))
        wanted = {manifest_name(ref.digest): (ref.digest, length)}
        wanted |= {blob_name(blob.digest): (blob.digest, blob.size) for blob in manifest.blobs()}
        self._used.update(wanted)
        missing = {}
        for name, (digest, size) in wanted.items():
            if self._has(digest, size):
                self._done.present += 1
            elif self._bundle.size(name) != size:
                raise DigestMismatch(
                    f"{self._path}: {name} has {self._bundle.size(name) or 'no'} bytes, signed are {size}",
                    hint="export the bundle anew",
                )
            else:
                missing[name] = (digest, size)
        return missing

    def _manifest(self, ref: ModelRef, length: int) -> bytes:
        if length > MAX_MANIFEST_BYTES:
            raise PackageError(
                f"manifest of {ref.model}:{ref.version}: larger than {MAX_MANIFEST_BYTES} bytes"
            )
        content = self._bundle.read(manifest_name(ref.digest), length)
        if hashlib.sha256(content).hexdigest() != ref.digest:
            raise DigestMismatch(
                f"{self._path}: the manifest of {ref.model}:{ref.version} is not the signed one"
            )
        return content

    def _has(self, digest: str, size: int) -> bool:
        path = self._blobs.path(digest)
        if not path.is_file() or path.stat().st_size != size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest

    def _expiry(self) -> str:
        """When the bundle's timestamp says that it ends, for the message only: its signature is not asked here."""
        try:
            signed = msgspec.json.decode(self._metadata["timestamp.json"])["signed"]
            return f", its timestamp at {str(signed['expires'])[:40]}"
        except (msgspec.DecodeError, KeyError, TypeError):
            return ""

    def _check_room(self, wanted: dict[str, tuple[str, int]]) -> None:
        need = sum(size for _, size in wanted.values()) + RESERVE
        free = shutil.disk_usage(self._part).free
        if free < need:
            raise Unavailable(
                f"{need >> 10} KiB are needed on the disk of {self._part.parent}, {free >> 10} KiB are free",
                hint="make room, then import again",
            )

    def _copy(self, name: str, digest: str, size: int) -> None:
        """A blob out of the bundle; the folder that it comes to is not in use yet."""
        got = hashlib.sha256()
        with (self._part / "blobs" / digest).open("xb") as file:
            for chunk in self._bundle.chunks(name):
                got.update(chunk)
                file.write(chunk)
        if got.hexdigest() != digest:
            raise DigestMismatch(
                f"{self._path}: {name} hashes to {got.hexdigest()[:16]}", hint="copy the bundle again"
            )
        self._done.taken += 1
        self._done.bytes += size
