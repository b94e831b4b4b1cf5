"""A trend store's certificate is renewed by itself: with one that has ended no agent takes its acks."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeward.clock import SystemClock
from edgeward.errors import Conflict, Forbidden, NotFound, TrustError
from edgeward.trust import dsse
from edgeward.trust.certificates import StoreIdentity
from edgeward.trust.keys import generate_key
from edgeward.wire import topics
from edgeward.wire.denied import PAYLOAD_TYPE, Denied, encode
from edgeward.wire.enrollment import EnrollResponse
from edgeward.wire.envelope import seal
from edgeward.wire.rows import Batch, ResultRow, encode_rows
from trends.identity import Identity, enroll, read_enrollment
from trends.ingest import Ingest
from trends.journal import Journal


@pytest.fixture
def folder(plant: Any, tmp_path: Path) -> Path:
    plant.begin()
    made = tmp_path / "store"
    token = plant.client.create_enrollment_token(["north"], role="store")
    enroll(made, plant.url, token, "plant-store")
    return made


def make_due(folder: Path) -> EnrollResponse:
    old = msgspec.structs.replace(read_enrollment(folder), renew_after=0.0)
    (folder / "enrollment.json").write_bytes(msgspec.json.encode(old))
    return old


def test_it_is_renewed_when_due_and_kept(folder: Path) -> None:
    assert not Identity(folder, SystemClock()).renew_if_due()
    old = make_due(folder)
    identity = Identity(folder, SystemClock())
    before = identity.signer.keyid
    assert identity.renew_if_due()
    assert identity.signer.keyid != before
    kept = read_enrollment(folder)
    assert kept.certificate != old.certificate and kept.renew_after > 0
    again = Identity(folder, SystemClock())
    assert again.store == StoreIdentity("plant-store", frozenset({"north"}))
    assert again.signer.keyid == identity.signer.keyid


def test_acks_are_signed_by_the_renewed_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_due(folder)
    identity = Identity(folder, SystemClock())
    old = identity.signer
    monkeypatch.setattr("trends.identity._LOOK_EVERY", 0.01)
    stop, signers = threading.Event(), []

    def changed(fresh: Identity) -> None:
        signers.append(fresh.signer)
        stop.set()

    identity.keep_fresh(stop, changed)
    assert signers == [identity.signer] and signers != [old]


def test_a_revoked_store_is_refused_and_a_second_enrolment_too(plant: Any, folder: Path) -> None:
    make_due(folder)
    assert plant.client._http.request("DELETE", "/api/v1/certificates/plant-store").json() == {"revoked": 1}
    with pytest.raises(Forbidden, match="revoked"):
        Identity(folder, SystemClock()).renew_if_due()
    with pytest.raises(Conflict, match="enrolled already"):
        enroll(folder, plant.url, "x", "plant-store")
    (folder / "controller.url").unlink()
    with pytest.raises(NotFound, match=r"controller\.url"):
        Identity(folder, SystemClock()).renew_if_due()


@pytest.fixture
def revoke(plant: Any, make: Any) -> Any:
    """Without a resourceVersion, since the reconciler writes to the device, too."""

    def set_revoked(name: str, revoked: bool) -> None:
        plant.client.apply([make("Device", name, site="north", revoked=revoked)])

    return set_revoked


def test_a_revoked_device_stores_no_more_rows(plant: Any, folder: Path, tmp_path: Path, revoke: Any) -> None:
    """The store hears devices over a broker, so that the controller's own door does not help."""
    device, other = plant.enroll("d1"), plant.enroll("d2")
    identity = Identity(folder, SystemClock())
    journal = Journal(tmp_path / "journal.db")
    ingest = Ingest(journal, identity.anchor, identity.store.sites, SystemClock())

    def stored(sender: Any, seq: int) -> bool:
        topic = topics.up(sender.name, "result")
        row = ResultRow(int(time.time() * 1e6), "s", 1, "", "se", seq, "d" * 64, "v", "p", {}, False)
        batch = Batch("e", seq, 1, seq, encode_rows([row]))
        with journal.transaction():
            return (
                ingest.handle(topic, seal(batch, topic, sender.identity, with_certificate=True)) is not None
            )

    assert stored(device, 0) and stored(other, 0)
    assert not identity.learn_denied()
    revoke("d1", True)
    assert identity.learn_denied() and not identity.learn_denied()
    ingest.denied = identity.denied
    assert not stored(device, 1) and stored(other, 1)
    # A restart without the controller forgets nothing.
    assert Identity(folder, SystemClock()).denied == identity.denied == {device.identity.keyid}
    revoke("d1", False)
    assert identity.learn_denied() and not identity.denied
    plant.client.delete("Device", "d2")
    assert identity.learn_denied() and identity.denied == {other.identity.keyid}
    journal.close()


def test_a_forged_or_old_deny_list_changes_nothing(
    plant: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, revoke: Any
) -> None:
    device = plant.enroll("d1")
    identity = Identity(folder, SystemClock())
    empty = plant.controller.signed_denied()
    revoke("d1", True)
    assert identity.learn_denied()
    forged = dsse.sign(encode(Denied(time.time() + 60, [])), PAYLOAD_TYPE, generate_key())
    desired = dsse.sign(
        encode(Denied(time.time() + 60, [])), "application/json", plant.controller._desired_key
    )
    for answer in (forged, desired, b"", empty):
        monkeypatch.setattr(plant.controller, "signed_denied", lambda answer=answer: answer)
        with pytest.raises(TrustError):
            identity.learn_denied()
        assert identity.denied == {device.identity.keyid}
