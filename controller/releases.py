"""Releases: The Update Framework's repository as the controller keeps it (TUF specification 1.0).

Root and targets are signed elsewhere; this module checks them, and signs snapshot and timestamp with
its own online key. Consistent snapshots: `timestamp.json` is the commit point and is written last.
"""

from __future__ import annotations

import datetime
import re
import threading
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization import DeserializationError

from controller.artifacts import Artifacts, need, read
from edgeward.clock import Clock
from edgeward.errors import Conflict, InvalidDocument, NotFound, PackageError, TrustError
from edgeward.formats import check_model_file
from edgeward.storage import sha256_hex, write_atomic
from edgeward.trust.keys import load_or_create
from edgeward.wire.package import GoldenVectors, Manifest, decode_manifest, parse_target_path, target_path
from edgeward.wire.signed_time import TUF_FIELD

TIMESTAMP_LIFETIME = 86400.0
SNAPSHOT_LIFETIME = 7 * 86400.0
MAX_GOLDEN_BYTES = 64 << 20

_FILE = re.compile(r"timestamp\.json|[1-9][0-9]{0,8}\.(root|snapshot|targets)\.json")
T = TypeVar("T", Root, Snapshot, Targets, Timestamp)


class Releases:
    """The trusted metadata on disk. Raises of the methods: see each; all leave the old state on failure."""

    def __init__(self, folder: Path, keys: Path, artifacts: Artifacts, clock: Clock) -> None:
        self._folder = folder
        self._artifacts = artifacts
        self._clock = clock
        self._lock = threading.RLock()
        self._signer = CryptoSigner(load_or_create(keys / "online.pem"))
        folder.mkdir(parents=True, exist_ok=True)

    def online_keys(self) -> dict[str, Any]:
        """Key id -> TUF key that signs snapshot and timestamp."""
        key = self._signer.public_key
        return {key.keyid: key.to_dict()}

    def root_text(self) -> str:
        """The newest root metadata as JSON text; empty before the first release root."""
        if not (self._folder / "timestamp.json").exists():
            return ""
        newest = max(self._folder.glob("*.root.json"), key=lambda path: int(path.name.partition(".")[0]))
        return newest.read_text()

    def file(self, name: str) -> bytes:
        """A metadata file as clients fetch it. Raises NotFound."""
        path = self._folder / name
        if not _FILE.fullmatch(name) or not path.is_file():
            raise NotFound(f"there is no TUF metadata {name[:80]!r}")
        return path.read_bytes()

    def targets(self) -> Targets:
        """The current targets. Raises Conflict before the first root."""
        timestamp = self._timestamp()
        snapshot = self._load(f"{timestamp.snapshot_meta.version}.snapshot.json", Snapshot)
        return self._load(f"{snapshot.meta['targets.json'].version}.targets.json", Targets)

    def manifest(self, target: TargetFile) -> tuple[str, bytes]:
        """The digest and bytes of a target. Raises NotFound."""
        digest = target.hashes["sha256"]
        return digest, read(self._artifacts, digest)

    def _timestamp(self) -> Timestamp:
        if not (self._folder / "timestamp.json").exists():
            raise Conflict("this controller has no TUF root yet", hint="edgeward release init")
        return self._load("timestamp.json", Timestamp)

    def _load(self, name: str, type_: type[T]) -> T:
        return _parse((self._folder / name).read_bytes(), type_, name).signed

    # root

    def install_root(self, root_bytes: bytes, targets_bytes: bytes) -> None:
        """Begin the repository. Raises Conflict when there is one, InvalidDocument or TrustError."""
        with self._lock:
            if self.root_text():
                raise Conflict(
                    "this controller has a TUF root already", hint="root rotation is not built yet"
                )
            root = _parse(root_bytes, Root, "root")
            _check_signatures(root.signed, "root", root)
            self._check_root(root.signed)
            targets = _parse(targets_bytes, Targets, "targets")
            _check_signatures(root.signed, "targets", targets)
            if targets.signed.version != 1 or targets.signed.targets or targets.signed.delegations:
                raise InvalidDocument("expected version 1, with no targets yet", source="targets")
            self._check_expiry(targets.signed, "targets")
            write_atomic(self._folder / "1.root.json", root_bytes)
            write_atomic(self._folder / "1.targets.json", targets_bytes)
            self._commit(targets_version=1, snapshot_version=1, timestamp_version=1)

    def _check_root(self, root: Root) -> None:
        if root.version != 1 or not root.consistent_snapshot:
            raise InvalidDocument("expected version 1 with consistent_snapshot", source="root")
        self._check_expiry(root, "root")
        online = self._signer.public_key.keyid
        for role in ("snapshot", "timestamp"):
            if root.roles[role].keyids != [online] or root.roles[role].threshold != 1:
                raise InvalidDocument(
                    f"the {role} role must hold this controller's online key alone",
                    source="root",
                    field=f"roles.{role}",
                    hint="it is in GET /api/v1/trust",
                )
        for role in ("root", "targets"):
            if online in root.roles[role].keyids:
                raise InvalidDocument(
                    "the controller's online key must not sign releases", source="root", field=f"roles.{role}"
                )

    def _check_expiry(self, signed: Root | Targets, source: str) -> None:
        if signed.is_expired(self._time(0)):
            raise InvalidDocument(
                f"expired at {signed.expires:%Y-%m-%dT%H:%MZ}", source=source, field="expires"
            )

    def _time(self, ahead: float) -> datetime.datetime:
        at = datetime.datetime.fromtimestamp(self._clock.now() + ahead, datetime.UTC)
        return at.replace(microsecond=0)

    # releases

    def publish(self, targets_bytes: bytes, manifest_bytes: bytes) -> tuple[int, Manifest, str]:
        """Accept a newly signed targets metadata that adds one manifest.

        Answers the targets version, the manifest and its digest. Raises TrustError for signatures that
        do not reach the root's threshold, Conflict for a stale version or a missing blob,
        InvalidDocument or PackageError for contents that do not fit.
        """
        with self._lock:
            current = self.targets()
            root = Metadata[Root].from_bytes(self.root_text().encode()).signed
            new = _parse(targets_bytes, Targets, "targets")
            _check_signatures(root, "targets", new)
            self._check_expiry(new.signed, "targets")
            if new.signed.version != current.version + 1:
                raise Conflict(
                    f"targets version {new.signed.version} is not the next one, {current.version + 1}",
                    hint="another release came first: publish again",
                )
            path, target = _addition(current, new.signed)
            manifest = decode_manifest(manifest_bytes)
            if (manifest.model, manifest.version) != parse_target_path(path):
                raise InvalidDocument(
                    f"is {target_path(manifest.model, manifest.version)}, the signed target is {path}",
                    source="manifest",
                )
            digest = sha256_hex(manifest_bytes)
            if target.length != len(manifest_bytes) or target.hashes.get("sha256") != digest:
                raise InvalidDocument(
                    "the manifest is not the one that was signed", source="manifest", field=path
                )
            self._check_blobs(manifest)
            self._artifacts.add(manifest_bytes)
            timestamp = self._timestamp()
            write_atomic(self._folder / f"{new.signed.version}.targets.json", targets_bytes)
            self._commit(new.signed.version, timestamp.snapshot_meta.version + 1, timestamp.version + 1)
            return new.signed.version, manifest, digest

    def _check_blobs(self, manifest: Manifest) -> None:
        for variant in manifest.variants:
            need(self._artifacts, variant.blob.digest, variant.blob.size, f"variant {variant.name}:")
            with self._artifacts.local(variant.blob.digest) as path:
                try:
                    check_model_file(path, variant.runtime)
                except PackageError as error:
                    message = error.message.replace(str(path), f"variant {variant.name}")
                    raise PackageError(message, hint="only ONNX and TFLite models are accepted") from None
        golden = manifest.golden.blob
        need(self._artifacts, golden.digest, golden.size, "golden vectors")
        if golden.size > MAX_GOLDEN_BYTES:
            raise PackageError(f"golden vectors of {golden.size} bytes, at most {MAX_GOLDEN_BYTES}")
        try:
            msgspec.msgpack.decode(read(self._artifacts, golden.digest), type=GoldenVectors)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PackageError(f"the golden vectors cannot be read: {error}") from None

    def refresh(self) -> bool:
        """Sign timestamp (and snapshot) again when half their life is over; whether it did."""
        with self._lock:
            if not self.root_text():
                return False
            timestamp = self._timestamp()
            if timestamp.expires > self._time(TIMESTAMP_LIFETIME / 2):
                return False
            version = timestamp.snapshot_meta.version
            snapshot = self._load(f"{version}.snapshot.json", Snapshot)
            if snapshot.expires <= self._time(SNAPSHOT_LIFETIME / 2):
                self._commit(snapshot.meta["targets.json"].version, version + 1, timestamp.version + 1)
            else:
                self._write_timestamp(version, timestamp.version + 1)
            return True

    def _commit(self, targets_version: int, snapshot_version: int, timestamp_version: int) -> None:
        snapshot = Snapshot(
            version=snapshot_version,
            expires=self._time(SNAPSHOT_LIFETIME),
            meta={"targets.json": MetaFile(targets_version)},
        )
        self._sign(snapshot, f"{snapshot_version}.snapshot.json")
        self._write_timestamp(snapshot_version, timestamp_version)

    def _write_timestamp(self, snapshot_version: int, version: int) -> None:
        timestamp = Timestamp(
            version=version,
            expires=self._time(TIMESTAMP_LIFETIME),
            snapshot_meta=MetaFile(snapshot_version),
            unrecognized_fields={TUF_FIELD: int(self._clock.now())},
        )
        self._sign(timestamp, "timestamp.json")

    def _sign(self, signed: T, name: str) -> None:
        metadata = Metadata(signed)
        metadata.sign(self._signer)
        write_atomic(self._folder / name, metadata.to_bytes())


def _parse(data: bytes, type_: type[T], source: str) -> Metadata[T]:
    try:
        metadata: Metadata[T] = Metadata.from_bytes(data)
    except (DeserializationError, RecursionError):
        raise InvalidDocument("not TUF metadata", source=source) from None
    if not isinstance(metadata.signed, type_):
        raise InvalidDocument(f"expected {type_.type} metadata, got {metadata.signed.type}", source=source)
    return metadata


def _check_signatures(root: Root, role: str, metadata: Metadata[Root] | Metadata[Targets]) -> None:
    try:
        root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (UnsignedMetadataError, RepositoryError, ValueError):
        threshold = root.roles[role].threshold
        raise TrustError(
            f"the {role} metadata does not carry {threshold} valid signature(s) of its role's keys",
            hint="sign with the keys that `edgeward release init` made",
        ) from None


def _addition(current: Targets, new: Targets) -> tuple[str, TargetFile]:
    """The one target that is new. Raises InvalidDocument when anything else changed."""
    if new.delegations is not None:
        raise InvalidDocument("delegations are not supported", source="targets", field="delegations")
    for path, target in current.targets.items():
        if new.targets.get(path) != target:
            raise InvalidDocument("a released version cannot change or vanish", source="targets", field=path)
    added = sorted(new.targets.keys() - current.targets.keys())
    if len(added) != 1:
        raise InvalidDocument(f"expected one new target, got {len(added)}", source="targets")
    return added[0], new.targets[added[0]]
