"""How a device keeps its identity: renewal, weeks without a network, and revocation, on a clock of ours."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.identity import LOOK_EVERY, Identity, enroll
from agent.state import State
from agent.trusted_clock import TrustedClock
from controller.identity import CERTIFICATE_LIFETIME, RENEWAL_GRACE
from edgeward.clock import ManualClock
from edgeward.errors import Conflict, Forbidden, TrustError
from edgeward.trust import tokens
from edgeward.trust.certificates import load_certificate_pem, make_csr, to_der
from edgeward.trust.keys import SigningIdentity, generate_key
from edgeward.wire import topics
from edgeward.wire.enrollment import RenewRequest
from edgeward.wire.envelope import seal
from edgeward.wire.reports import Status
from edgeward.wire.rows import Batch, ResultRow, encode_rows
from trends.identity import _LOOK_EVERY
from trends.identity import Identity as StoreIdentity
from trends.identity import enroll as enroll_store
from trends.ingest import Ingest
from trends.journal import Journal

DAY = 86400.0


class Device:
    """An agent's identity and state; `boot` is a start of the agent at the controller's time."""

    def __init__(self, plant: Any, folder: Path, clock: ManualClock) -> None:
        self.plant, self.folder, self.world = plant, folder, clock
        self.answer = enroll(folder, plant.url, plant.client.create_enrollment_token(["north"]), "d1", {})
        self.state = State(folder / "state.db")

    def boot(self) -> Identity:
        self.machine = ManualClock(self.world.now())
        return Identity(self.folder, TrustedClock(self.machine, self.state))

    def run(self, identity: Identity, seconds: float) -> list[float]:
        """Let `keep_fresh` run for so long; when it renewed, as seconds from now."""
        began, renewed = self.world.now(), threading.Event()
        times: list[float] = []

        class Stop(threading.Event):
            def wait(stop, timeout: float | None = None) -> bool:
                assert timeout is not None and timeout <= 60
                if renewed.is_set():
                    renewed.clear()
                    times.append(self.world.now() - began)
                left = seconds - (self.world.now() - began)
                # Nothing is due on the long way; towards the end each look is made.
                step = min(left, timeout if left < DAY / 2 else DAY / 4)
                self.world.advance(step)
                self.machine.advance(step)
                return left <= 0

        identity.keep_fresh(Stop(), renewed)
        return times


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(time.time())


@pytest.fixture
def plant(tmp_path: Path, start: Any, clock: ManualClock) -> Iterator[Any]:
    with start(tmp_path, clock=clock) as made:
        made.begin()
        yield made


@pytest.fixture
def device(plant: Any, tmp_path: Path, clock: ManualClock) -> Iterator[Device]:
    made = Device(plant, tmp_path / "d1", clock)
    yield made
    made.state.close()


def works(identity: Identity) -> bool:
    try:
        identity.client.desired(newer_than=99, wait=0.0)
    except Forbidden:
        return False
    return True


def test_the_key_is_its_owners_alone_and_never_leaves(device: Device, plant: Any) -> None:
    key = device.folder / "identity.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(device.folder.stat().st_mode) == 0o700
    secret = key.read_bytes().split(b"\n")[1]
    for folder in (device.folder, plant.folder / "data"):
        holding = [path for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]
        assert holding == ([key] if folder == device.folder else [])
    key.chmod(0o640)
    with pytest.raises(TrustError, match="chmod 600"):
        device.boot()
    key.chmod(0o600)
    with pytest.raises(Conflict, match="enrolled already"):
        enroll(device.folder, plant.url, "another", "d1", {})


def test_it_is_renewed_at_two_thirds_of_its_life(device: Device) -> None:
    identity = device.boot()
    before = identity.signer().keyid
    assert device.run(identity, 19.9 * DAY) == [] and identity.signer().keyid == before
    (at,) = device.run(identity, 0.2 * DAY)
    assert abs(at - 0.1 * DAY) <= LOOK_EVERY + 1
    assert identity.signer().keyid != before and works(identity)
    again = device.boot()
    assert again.signer().keyid == identity.signer().keyid, "and is kept"
    assert device.run(again, 25 * DAY) != [], "each in its turn"


@pytest.mark.parametrize(
    "offline", [30 * DAY + 3600, CERTIFICATE_LIFETIME + 30 * DAY, CERTIFICATE_LIFETIME + 89 * DAY]
)
def test_weeks_offline_need_nobody_on_site(device: Device, clock: ManualClock, offline: float) -> None:
    clock.advance(offline)
    identity = device.boot()
    before = identity.signer()
    assert not works(identity), "the certificate has ended"
    assert device.run(identity, 0.0) == [0.0], "at the first look"
    assert works(identity)
    assert identity.signer().keyid != before.keyid and identity.signer().key == before.key
    audit = device.plant.client.audit()[-1]
    assert (audit["action"], audit["name"]) == ("renew", "d1") and "days ago" in audit["detail"]


def test_after_the_grace_it_must_enrol_again(device: Device, clock: ManualClock) -> None:
    clock.advance(CERTIFICATE_LIFETIME + RENEWAL_GRACE + DAY)
    identity = device.boot()
    assert device.run(identity, 120.0) == [] and not works(identity)


def test_the_grace_is_a_setting(tmp_path: Path, start: Any, clock: ManualClock) -> None:
    with start(tmp_path, clock=clock, renewal_grace=DAY) as plant:
        plant.begin()
        device = Device(plant, tmp_path / "d1", clock)
        clock.advance(CERTIFICATE_LIFETIME + 2 * DAY)
        assert device.run(device.boot(), 0.0) == []
        device.state.close()


@pytest.mark.parametrize("how", ["revoked", "certificate revoked", "deleted"])
def test_what_was_revoked_meanwhile_does_not_come_back(
    device: Device, clock: ManualClock, make: Any, how: str
) -> None:
    client = device.plant.client
    clock.advance(CERTIFICATE_LIFETIME + DAY)
    if how == "revoked":
        client.apply([make("Device", "d1", site="north", revoked=True)])
    elif how == "deleted":
        client.delete("Device", "d1")
    else:
        client._http.request("DELETE", "/api/v1/certificates/d1")
    identity = device.boot()
    with pytest.raises(Forbidden, match="revoked"):
        identity.renew_if_due()
    assert device.run(identity, 120.0) == []


def test_an_ended_certificate_is_worth_nothing_without_its_key(device: Device, clock: ManualClock) -> None:
    first = device.boot()
    old = first.signer()
    # While it holds, it may be exchanged for another key's.
    csr = make_csr(generate_key(), "d1")
    clock.advance(CERTIFICATE_LIFETIME - DAY)
    first = device.boot()
    first.client.renew(RenewRequest(csr))
    clock.advance(2 * DAY)
    after = device.boot()
    with pytest.raises(Forbidden, match="own key"):
        after.client.renew(RenewRequest(csr))
    with pytest.raises(Forbidden, match="own key"):
        after.renew_if_due()  # the key that came after it owns the identity now
    thief = SigningIdentity(generate_key(), old.certificate_der)
    with pytest.raises(Forbidden, match="signature"):
        device.plant.client._http.request(
            "POST",
            "/device/v1/renew",
            json={"csr": csr},
            headers={"Authorization": f"Bearer {tokens.mint(thief, clock.now())}"},
            anonymous=True,
        )


def test_another_key_gets_nothing_for_an_ended_certificate(device: Device, clock: ManualClock) -> None:
    clock.advance(CERTIFICATE_LIFETIME + DAY)
    identity = device.boot()
    with pytest.raises(Forbidden, match="own key"):
        identity.client.renew(RenewRequest(make_csr(generate_key(), "d1")))
    assert identity.renew_if_due()


# revocation


def test_a_revoked_device_is_refused_at_once_over_http_and_mqtt(
    device: Device, clock: ManualClock, make: Any
) -> None:
    identity, controller = device.boot(), device.plant.controller
    topic = topics.status(identity.name)

    def birth(n: int) -> bytes:
        message = Status(1, n, clock.now(), "online", "test")
        return seal(message, topic, identity.signer(), with_certificate=True)

    assert works(identity) and controller.ingest.accept(topic, birth(1))
    revoked_at = clock.now()
    device.plant.client.apply([make("Device", "d1", site="north", revoked=True)])
    for call in (
        lambda: identity.client.desired(newer_than=0, wait=0.0),
        lambda: identity.client.renew(RenewRequest(make_csr(generate_key(), "d1"))),
        lambda: identity.client.send(topic, birth(2)),
        lambda: identity.transport.request("GET", "/artifacts/" + "0" * 64),
        lambda: controller.ingest.accept(topic, birth(3)),
    ):
        with pytest.raises(Forbidden, match="revoked"):
            call()
    assert clock.now() == revoked_at, "not a second later"


def test_a_revoked_devices_rows_are_refused_within_a_minute(
    device: Device, plant: Any, tmp_path: Path, clock: ManualClock, make: Any
) -> None:
    """The trend store hears devices over a broker and looks at the signed deny-list now and then."""
    folder = tmp_path / "store"
    enroll_store(folder, plant.url, plant.client.create_enrollment_token(["north"], role="store"), "store")
    store, identity = StoreIdentity(folder, clock), device.boot()
    journal = Journal(tmp_path / "journal.db")
    ingest = Ingest(journal, store.anchor, store.store.sites, clock)
    topic = topics.up(identity.name, "result")
    seq = -1

    def stored() -> bool:
        nonlocal seq
        seq += 1
        row = ResultRow(int(clock.now() * 1e6), "s", 1, "", "se", seq, "d" * 64, "v", "p", {}, False)
        batch = Batch("e", seq, 1, seq, encode_rows([row]))
        with journal.transaction():
            sealed = seal(batch, topic, identity.signer(), with_certificate=True)
            return ingest.handle(topic, sealed) is not None

    revoked_at: list[float] = []
    refused_at: list[float] = []

    class Stop(threading.Event):
        """Second by second; the revocation comes at the worst moment, right after a look."""

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            if not revoked_at:
                assert stored()
                plant.client.apply([make("Device", "d1", site="north", revoked=True)])
                revoked_at.append(clock.now())
            for _ in range(int(timeout)):
                if not stored():
                    refused_at.append(clock.now())
                    return True
                clock.advance(1.0)
            return clock.now() > revoked_at[0] + 600

    def changed(fresh: StoreIdentity) -> None:
        ingest.denied = fresh.denied

    store.keep_fresh(Stop(), changed)
    journal.close()
    assert refused_at[0] - revoked_at[0] == _LOOK_EVERY <= 60


def test_a_trend_store_that_was_off_for_weeks_renews_by_itself(
    plant: Any, tmp_path: Path, clock: ManualClock
) -> None:
    folder = tmp_path / "store"
    enroll_store(folder, plant.url, plant.client.create_enrollment_token(["north"], role="store"), "store")
    clock.advance(CERTIFICATE_LIFETIME + 30 * DAY)
    store = StoreIdentity(folder, clock)
    old = to_der(load_certificate_pem(store.enrollment.certificate))
    assert store.renew_if_due() and store.signer.certificate_der != old
    assert not store.learn_denied()
