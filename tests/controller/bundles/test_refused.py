"""Bundles that were tampered with: refused, and nothing of them stays."""

from __future__ import annotations

import json
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Snapshot, Timestamp

from agent.bundle import import_bundle
from agent.imports import Imports
from agent.state import State
from agent.trusted_clock import TrustedClock
from agent.verify import signed_length
from edgeward.bundle import order
from edgeward.clock import Clock, ManualClock, SystemClock
from edgeward.errors import EdgewardError, NotFound, PackageError, TrustError
from edgeward.trust import dsse
from edgeward.trust.keys import generate_key
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState, ModelRef
from tests.controller.bundles.carrying import (
    Offline,
    contents,
    footprint,
    now,
    resigned,
    signed,
    unchanged,
    written,
)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_one_wrong_bit_in_any_member_that_the_device_needs_is_refused(
    offline: Offline, tmp_path: Path
) -> None:
    offline.release(1)
    device = offline.device("d1")
    offline.roll_out(1)
    members = contents(offline.export("d1"))
    kinds = {name.partition("/")[0] for name in members}
    assert kinds == {"tuf", "desired", "manifests", "blobs"}
    for name, data in members.items():
        if name == "tuf/1.root.json":
            continue  # the device has its own and never reads it
        kind = name.partition("/")[0]
        # Before it is parsed, and before more than what is signed is copied.
        why = {"manifests": "is not the signed one|at most", "blobs": "hashes to|signed are"}.get(kind, ".")
        bad = written(tmp_path / "bad", {**members, name: flipped(data, len(data) // 2)})
        with unchanged(device), pytest.raises(EdgewardError, match=why):
            import_bundle(bad, device, SystemClock())
        for wrong in (data[:-1], data + b" "):
            if why != ".":
                bad = written(tmp_path / "bad", {**members, name: wrong})
                with unchanged(device), pytest.raises(EdgewardError, match=why.replace("hashes to|", "")):
                    import_bundle(bad, device, SystemClock())
        rest = {other: value for other, value in members.items() if other != name}
        with unchanged(device), pytest.raises((PackageError, NotFound, TrustError)):
            import_bundle(written(tmp_path / "bad", rest), device, SystemClock())
    import_bundle(written(tmp_path / "good", members), device, SystemClock())


def test_only_the_devices_own_newest_desired_state_is_taken(offline: Offline, tmp_path: Path) -> None:
    offline.release(1)
    device = offline.device("d1")
    offline.device("d2")
    offline.roll_out(1)
    members = contents(offline.export("d1"))
    others = contents(offline.export("d2"))["desired/d2.json"]

    def refused(raw: bytes, why: str) -> None:
        bad = written(tmp_path / "bad", {**members, "desired/d1.json": raw})
        with unchanged(device), pytest.raises(TrustError, match=why):
            import_bundle(bad, device, SystemClock())

    refused(others, "is for north/d2")
    refused(signed(offline, generate_key()), "no trusted key")
    refused(signed(offline, expires_at=time.time() - 1), "has expired")
    refused(signed(offline, site="south"), "is for south/d1")
    refused(b"{}", "not a DSSE envelope")
    State(device / "state.db").accept_desired(7, b"x")
    refused(signed(offline, generation=6), "generation 6 is older than 7")
    refused(members["desired/d1.json"], "older than 7")
    # An import that still waits for the daemon counts, too.
    nine = written(tmp_path / "nine", {**members, "desired/d1.json": signed(offline, generation=9)})
    import_bundle(nine, device, SystemClock())
    refused(signed(offline, generation=8), "generation 8 is older than 9")
    import_bundle(nine, device, SystemClock())


def test_a_version_that_is_not_released_is_not_taken(offline: Offline, tmp_path: Path) -> None:
    """A stolen desired-state key can choose among released versions only."""
    ref = offline.release(1)
    device = offline.device("d1")
    offline.roll_out(1)
    members = contents(offline.export("d1"))
    slots = dsse.verify(
        members["desired/d1.json"], PAYLOAD_TYPE, offline.plant.controller.desired_keys, DesiredState
    ).slots
    for wish, why in (
        (ModelRef("m", 1, "0" * 64), "another digest"),
        (ModelRef("m", 9, ref.digest), "not released"),
    ):
        forged = signed(offline, slots={"default": msgspec.structs.replace(slots["default"], active=wish)})
        bad = written(tmp_path / "bad", {**members, "desired/d1.json": forged})
        with unchanged(device), pytest.raises(TrustError, match=why):
            import_bundle(bad, device, SystemClock())


def test_expired_metadata_is_refused_and_when_is_said(offline: Offline, tmp_path: Path) -> None:
    offline.release(1)
    device = offline.device("d1")
    offline.roll_out(1)
    members = contents(offline.export("d1"))
    late = now() - timedelta(hours=1)
    bad = written(tmp_path / "bad", resigned(offline, members, expires=late))
    with unchanged(device), pytest.raises(TrustError, match="expired") as caught:
        import_bundle(bad, device, SystemClock())
    assert f"{late:%Y-%m-%dT%H:%M:%SZ}" in str(caught.value) and "export a fresh bundle" in caught.value.hint


def test_metadata_older_than_what_the_device_trusts_is_refused(offline: Offline, tmp_path: Path) -> None:
    """As after a newer import: the device's own metadata decides, not only the bundle's."""
    ref = offline.release(1)
    device = offline.device("d1")
    offline.roll_out(1)
    members = contents(offline.export("d1"))
    newer = resigned(offline, members, expires=now() + timedelta(hours=1), ahead=5)
    (device / "tuf").mkdir()
    root = json.loads((device / "enrollment.json").read_bytes())["trust"]["tuf_root"].encode()
    clock = TrustedClock(SystemClock(), State(tmp_path / "state.db"))
    signed_length(device / "tuf", root, lambda name: newer.get(f"tuf/{name}"), ref, clock)
    with unchanged(device), pytest.raises(TrustError, match="version"):
        import_bundle(written(tmp_path / "old", members), device, SystemClock())
    import_bundle(written(tmp_path / "new", newer), device, SystemClock())


def test_another_fleets_bundle_is_refused(
    offline: Offline, tmp_path: Path, start: Any, until: Any, make: Any
) -> None:
    """Its snapshot and timestamp are signed, but not by keys of this device's root."""
    offline.release(1)
    device = offline.device("d1")
    offline.roll_out(1)
    members = contents(offline.export("d1"))
    controller = offline.plant.controller
    own = controller.releases._signer
    controller.releases._signer = CryptoSigner(generate_key())
    try:
        foreign = resigned(offline, members, expires=now() + timedelta(hours=1), ahead=1)
        snapshot = Metadata(
            Snapshot(version=99, expires=now() + timedelta(hours=1), meta={"targets.json": MetaFile(2)})
        )
        snapshot.sign(controller.releases._signer)
    finally:
        controller.releases._signer = own
    with unchanged(device), pytest.raises(TrustError, match="does not verify"):
        import_bundle(written(tmp_path / "foreign", foreign), device, SystemClock())
    # A timestamp that is ours with a snapshot that is not.
    timestamp = Metadata[Timestamp].from_bytes(members["tuf/timestamp.json"])
    timestamp.signed.version, timestamp.signed.snapshot_meta = 50, MetaFile(99)
    timestamp.sign(own)
    mixed = {
        **members,
        "tuf/timestamp.json": timestamp.to_bytes(),
        "tuf/99.snapshot.json": snapshot.to_bytes(),
    }
    mixed = dict(sorted(mixed.items(), key=lambda item: order(item[0])))
    with unchanged(device), pytest.raises(TrustError, match="does not verify"):
        import_bundle(written(tmp_path / "mixed", mixed), device, SystemClock())


def test_a_full_disk_is_seen_before_the_first_blob(
    offline: Offline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import agent.bundle as module

    offline.release(1)
    device = offline.device("d1")
    offline.roll_out(1)
    path = offline.export("d1")
    monkeypatch.setattr(module, "RESERVE", shutil.disk_usage(tmp_path).total)
    with unchanged(device), pytest.raises(EdgewardError, match="KiB are free") as caught:
        import_bundle(path, device, SystemClock())
    assert "make room" in caught.value.hint


def test_whatever_bytes_are_changed_the_device_takes_the_signed_ones_or_nothing(
    offline: Offline, tmp_path: Path
) -> None:
    offline.release(1)
    device = offline.device("d1")
    offline.roll_out(1)
    path = offline.export("d1")
    good, members = path.read_bytes(), contents(path)
    needed = {name: data for name, data in members.items() if not name.startswith("tuf/")}
    bad, clock = tmp_path / "bad", SystemClock()

    @settings(max_examples=300)
    @given(st.data())
    def mutated(data: st.DataObject) -> None:
        content = bytearray(good)
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(content)))
            length = data.draw(st.sampled_from([0, 1, 1, 4, 512, 1024, len(content)]))
            content[at : at + length] = data.draw(
                st.one_of(st.binary(min_size=length if length < 5 else 0, max_size=4), st.just(bytes(512)))
            )
        check_bytes(bytes(content), bad, device, clock, needed)

    mutated()


def check_bytes(content: bytes, path: Path, device: Path, clock: Clock, needed: dict[str, bytes]) -> None:
    """Refused with nothing left, or taken with every byte that matters as it was signed."""
    path.write_bytes(content)
    before = footprint(device)
    try:
        import_bundle(path, device, clock)
    except EdgewardError:
        assert footprint(device) == before
        return
    imports = Imports(device)
    found = imports.newest()
    assert found is not None
    assert found.desired() == needed["desired/d1.json"]
    held = {entry.name: entry.read_bytes() for entry in (found.folder / "blobs").iterdir()}
    wanted = {name.partition("/")[2].removesuffix(".json"): data for name, data in needed.items()}
    del wanted["d1"]
    assert held == wanted
    imports.drop(found.number)


def test_time_is_the_clocks(offline: Offline) -> None:
    offline.release(1)
    device = offline.device("d1")
    offline.roll_out(1)
    later = ManualClock(time.time() + 30 * 86400)
    with unchanged(device), pytest.raises(TrustError, match="has expired"):
        import_bundle(offline.export("d1"), device, later)
