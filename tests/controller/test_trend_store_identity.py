"""A trend store's certificate is renewed by itself: with one that has ended no agent takes its acks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeward.clock import SystemClock
from edgeward.errors import Conflict, Forbidden, NotFound
from edgeward.trust.certificates import StoreIdentity
from edgeward.wire.enrollment import EnrollResponse
from trends.identity import Identity, enroll, read_enrollment


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
    monkeypatch.setattr("trends.identity._LOOK_EVERY", 0.01)
    stop, signers = threading.Event(), []

    def renewed(signer: Any) -> None:
        signers.append(signer)
        stop.set()

    identity.keep_fresh(stop, renewed)
    assert signers == [identity.signer]


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
