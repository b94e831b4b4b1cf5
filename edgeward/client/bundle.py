"""Collect what some devices need into one offline bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from edgeward.bundle import Source, blob_name, desired_name, manifest_name, metadata_name, order, write_bundle
from edgeward.client.controller import ControllerClient
from edgeward.errors import Conflict, InvalidDocument, TrustError
from edgeward.trust import dsse
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState, ModelRef
from edgeward.wire.package import MAX_MANIFEST_BYTES, decode_manifest, target_path

MAX_ROOTS = 1024


@dataclass(frozen=True)
class Packed:
    """A model version in the bundle: its manifest's and blobs' sizes in bytes, and who is to run it."""

    ref: ModelRef
    size: int
    blobs: int
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Exported:
    """What was written. `expires_at` is when devices begin to refuse it, because `expires` has expired."""

    size: int
    metadata_size: int
    timestamp_version: int
    desired: dict[str, DesiredState]
    models: list[Packed]
    expires_at: float
    expires: str


class _Meta(Struct):
    version: int


class _TargetFile(Struct):
    length: int
    hashes: dict[str, str]


class _Signed(Struct):
    """What of any TUF role's metadata is needed to collect the rest; its signatures are the devices' matter."""

    version: int
    expires: datetime
    meta: dict[str, _Meta] = {}
    targets: dict[str, _TargetFile] = {}


class _Metadata(Struct):
    signed: _Signed


def export(client: ControllerClient, devices: list[str], out: Path) -> Exported:
    """Write a bundle for `devices` to `out`.

    Raises NotFound for an unknown device, Conflict for one that has no desired state or when nothing is
    released yet, TrustError for a wished version that is not released, and what ControllerClient raises.
    """
    trusted = client.trust()
    raws = {name: client.desired(name) for name in sorted(set(devices))}
    states = {
        name: dsse.verify(raw, PAYLOAD_TYPE, trusted["desiredKeys"], DesiredState)
        for name, raw in raws.items()
    }
    # After the desired states, so that every version that they name is in it.
    metadata = _collect_metadata(client)
    parsed = {name: _parse(name, data).signed for name, data in metadata.items()}
    members = [Source(metadata_name(name), len(data), [data]) for name, data in metadata.items()]
    members += [Source(desired_name(name), len(raw), [raw]) for name, raw in raws.items()]
    blobs: dict[str, int] = {}
    models = []
    for ref, users in sorted(_wanted(states).items(), key=lambda item: (item[0].model, item[0].version)):
        manifest = _manifest(client, ref, parsed)
        members.append(Source(manifest_name(ref.digest), len(manifest), [manifest]))
        needed = {blob.digest: blob.size for blob in decode_manifest(manifest).blobs()}
        blobs |= needed
        models.append(Packed(ref, len(manifest) + sum(needed.values()), len(needed), tuple(users)))
    members += [
        Source(blob_name(digest), size, _checked(client, digest, size)) for digest, size in blobs.items()
    ]
    size = write_bundle(out, sorted(members, key=lambda member: order(member.name)))
    expires = [
        (signed.expires.timestamp(), f"the release metadata {name}") for name, signed in _current(parsed)
    ]
    expires += [(state.expires_at, f"the desired state of {name}") for name, state in states.items()]
    return Exported(
        size,
        sum(map(len, metadata.values())),
        parsed["timestamp.json"].version,
        states,
        models,
        *min(expires),
    )


def _wanted(states: dict[str, DesiredState]) -> dict[ModelRef, list[str]]:
    """Every wished version with the devices that wish for it."""
    found: dict[ModelRef, list[str]] = {}
    for name, state in states.items():
        for slot in state.slots.values():
            for ref in (slot.active, slot.shadow):
                if ref is not None and name not in found.setdefault(ref, []):
                    found[ref].append(name)
    return found


def _collect_metadata(client: ControllerClient) -> dict[str, bytes]:
    """The whole root chain, and one consistent snapshot of the rest (TUF specification 1.0, 6.2)."""
    found: dict[str, bytes] = {}
    for version in range(1, MAX_ROOTS):
        data = client.tuf_metadata(f"{version}.root.json")
        if data is None:
            break
        found[f"{version}.root.json"] = data
    timestamp = client.tuf_metadata("timestamp.json")
    if timestamp is None or not found:
        raise Conflict("nothing is released yet", hint="edgeward release init, then edgeward publish")
    found["timestamp.json"] = timestamp
    meta = _parse("timestamp.json", timestamp).signed.meta
    pending = [f"{meta['snapshot.json'].version}.snapshot.json"] if "snapshot.json" in meta else []
    while pending:
        name = pending.pop()
        data = client.tuf_metadata(name)
        if data is None:
            raise Conflict(f"the controller lacks {name} of its own metadata", hint="export again")
        found[name] = data
        for role, entry in _parse(name, data).signed.meta.items():
            pending.append(f"{entry.version}.{role}")
    return found


def _parse(name: str, data: bytes) -> _Metadata:
    try:
        return msgspec.json.decode(data, type=_Metadata)
    except msgspec.DecodeError as error:
        raise InvalidDocument(f"not TUF metadata: {error}", source=name) from None


def _current(parsed: dict[str, _Signed]) -> list[tuple[str, _Signed]]:
    """All roles' metadata but roots that another has replaced, whose expiry does not count any more."""
    newest = max(signed.version for name, signed in parsed.items() if name.endswith(".root.json"))
    return [
        (name, signed)
        for name, signed in parsed.items()
        if not name.endswith(".root.json") or signed.version == newest
    ]


def _manifest(client: ControllerClient, ref: ModelRef, parsed: dict[str, _Signed]) -> bytes:
    path = target_path(ref.model, ref.version)
    target = next((signed.targets[path] for signed in parsed.values() if path in signed.targets), None)
    if target is None or target.hashes.get("sha256") != ref.digest:
        raise TrustError(
            f"{ref.model}:{ref.version} is wished for but not released like that",
            hint="`edgeward get modelversions` shows what is released",
        )
    if target.length > MAX_MANIFEST_BYTES:
        raise InvalidDocument(f"larger than {MAX_MANIFEST_BYTES} bytes", source=path)
    return b"".join(_checked(client, ref.digest, target.length))


def _checked(client: ControllerClient, digest: str, size: int) -> Iterator[bytes]:
    """An artifact's bytes; raises TrustError at its end when they are not those of its digest."""
    have, got = 0, hashlib.sha256()
    for chunk in client.artifact(digest):
        have += len(chunk)
        if have > size:
            break
        got.update(chunk)
        yield chunk
    if have != size or got.hexdigest() != digest:
        raise TrustError(
            f"artifact {digest[:16]}: what the controller sent is not it, {have} of {size} bytes",
            hint="the controller's store is damaged, or something between: publish the package again",
        )
