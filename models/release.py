"""Sign releases: The Update Framework (TUF 1.0.33), root and targets roles.

The keys stay with the releaser; the controller signs only snapshot and timestamp. A package's manifest
is a target; the blobs follow by the digests in it.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner, Key
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from edgeward.client import ControllerClient
from edgeward.clock import Clock
from edgeward.errors import Conflict, NotFound, TrustError
from edgeward.storage import write_atomic
from edgeward.trust.keys import load_or_create
from edgeward.wire.package import target_path
from models.package import Package

ROOT_DAYS = 365
TARGETS_DAYS = 365


def _expiry(clock: Clock, days: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(clock.now() + days * 86400), datetime.UTC)


def _signer(path: Path) -> CryptoSigner:
    if not path.exists():
        raise NotFound(f"{path}: no such key", hint="run `edgeward release init --keys DIR` first")
    return CryptoSigner(load_or_create(path))


def init(keys: Path, client: ControllerClient, clock: Clock) -> None:
    """Make the release keys (or use those in `keys`) and install root and empty targets metadata.

    Raises Conflict when the controller has a root already.
    """
    trust = client.trust()
    if trust.get("tufRoot"):
        raise Conflict(f"{client.url} has a release root already", hint="publish with the keys that made it")
    for role in ("root", "targets"):
        load_or_create(keys / f"{role}.key")
    root_signer, targets_signer = _signer(keys / "root.key"), _signer(keys / "targets.key")
    root = Root(expires=_expiry(clock, ROOT_DAYS), consistent_snapshot=True)
    root.add_key(root_signer.public_key, Root.type)
    root.add_key(targets_signer.public_key, Targets.type)
    for keyid, document in trust["onlineKeys"].items():
        for role in (Snapshot.type, Timestamp.type):
            root.add_key(Key.from_dict(keyid, dict(document)), role)
    signed_root: Metadata[Root] = Metadata(root)
    signed_root.sign(root_signer)
    targets = Metadata(Targets(expires=_expiry(clock, TARGETS_DAYS)))
    targets.sign(targets_signer)
    client.init_release_root(signed_root.to_bytes(), targets.to_bytes())
    write_atomic(keys / "root.json", signed_root.to_bytes())


def current_targets(root: Root, client: ControllerClient) -> Metadata[Targets]:
    """The newest targets metadata, verified through timestamp and snapshot. Raises TrustError."""
    try:
        timestamp: Metadata[Timestamp] = Metadata.from_bytes(_fetch(client, "timestamp.json"))
        root.verify_delegate(Timestamp.type, timestamp.signed_bytes, timestamp.signatures)
        number = timestamp.signed.snapshot_meta.version
        snapshot: Metadata[Snapshot] = Metadata.from_bytes(_fetch(client, f"{number}.snapshot.json"))
        root.verify_delegate(Snapshot.type, snapshot.signed_bytes, snapshot.signatures)
        number = snapshot.signed.meta["targets.json"].version
        targets: Metadata[Targets] = Metadata.from_bytes(_fetch(client, f"{number}.targets.json"))
        root.verify_delegate(Targets.type, targets.signed_bytes, targets.signatures)
    except (RepositoryError, DeserializationError, KeyError) as error:
        raise TrustError(f"{client.url}: the release metadata does not verify: {error}") from None
    return targets


def _fetch(client: ControllerClient, name: str) -> bytes:
    data = client.tuf_metadata(name)
    if data is None:
        raise NotFound(f"{client.url} has no {name}", hint="run `edgeward release init` first")
    return data


def publish(package: Package, keys: Path, client: ControllerClient, clock: Clock) -> dict[str, Any]:
    """Upload a package's files and announce it in newly signed targets metadata.

    Raises Conflict when this version is published with other content; the same content again is fine.
    """
    signer = _signer(keys / "targets.key")
    path = keys / "root.json"
    if not path.exists():
        raise NotFound(f"{path}: no release root", hint="run `edgeward release init --keys DIR` first")
    root: Metadata[Root] = Metadata.from_bytes(path.read_bytes())
    targets = current_targets(root.signed, client)
    name = target_path(package.manifest.model, package.manifest.version)
    known = targets.signed.targets.get(name)
    if known is not None:
        if known.hashes.get("sha256") == package.digest:
            return {
                "model": package.manifest.model,
                "version": package.manifest.version,
                "digest": package.digest,
            }
        raise Conflict(
            f"{package.manifest.model} version {package.manifest.version} is published with other content",
            hint="versions never change: choose the next number",
        )
    for blob in package.manifest.blobs():
        client.upload_artifact(package.blob(blob))
    client.upload_artifact(package.folder / "manifest.json")
    targets.signed.targets[name] = TargetFile.from_data(name, package.manifest_bytes, ["sha256"])
    targets.signed.version += 1
    targets.signed.expires = _expiry(clock, TARGETS_DAYS)
    targets.sign(signer)
    return client.publish_release(targets.to_bytes(), package.manifest_bytes)
