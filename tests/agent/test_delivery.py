"""Acks and desired state: what is taken, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.desired import check
from agent.state import State
from agent.trusted_clock import TrustedClock
from agent.uplink import Uplink
from edgeward.clock import ManualClock
from edgeward.errors import TrustError
from edgeward.identifiers import DeviceName
from edgeward.trust import certificates, dsse, keys
from edgeward.trust.certificates import DeviceIdentity, Identity, StoreIdentity, TrustAnchor
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import topics
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState
from edgeward.wire.desired import encode as encode_desired
from edgeward.wire.envelope import seal
from edgeward.wire.rows import Ack
from tests.agent.outboxes import open_outbox, row

ME = DeviceName("north", "turbine-1")


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state.db")


# --- acks -----------------------------------------------------------------------------------------


class Fleet:
    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.key = keys.generate_key()
        self.ca = certificates.make_ca(self.key, clock.now())
        self.anchor = TrustAnchor(certificates.to_pem(self.ca))

    def member(self, identity: Identity) -> SigningIdentity:
        key = keys.generate_key()
        issued = certificates.issue(
            self.ca, self.key, key.public_key(), identity, self.clock.now(), lifetime=3600
        )
        return SigningIdentity(key, certificates.to_der(issued))


def test_only_the_sites_own_store_can_delete_rows(tmp_path: Path) -> None:
    clock = ManualClock()
    outbox = open_outbox(tmp_path)
    fleet = Fleet(clock)
    me = fleet.member(DeviceIdentity(ME))
    uplink = Uplink(outbox, ME, fleet.anchor, lambda: me, clock, lambda topic, payload: True, lambda: True)
    outbox.commit_rows([row(index) for index in range(5)])
    topic = topics.ack(ME, "result")
    store = fleet.member(StoreIdentity("plant", frozenset({"north"})))

    def offer(signer: SigningIdentity, ack: Ack, on: str = topic, signed_for: str = topic) -> int:
        uplink.on_ack(on, seal(ack, signed_for, signer, with_certificate=True))
        return outbox.sizes()["result"].rows

    good = Ack(outbox.epoch, 2)
    elsewhere = fleet.member(StoreIdentity("harbour", frozenset({"harbour"})))
    stranger = Fleet(clock).member(StoreIdentity("plant", frozenset({"north"})))
    other_topic = topics.ack(DeviceName("north", "turbine-2"), "result")
    assert offer(elsewhere, good) == 5, "another site's store"
    assert offer(stranger, good) == 5, "another fleet's store"
    assert offer(me, good) == 5, "a device is no store"
    assert offer(store, good, signed_for=topics.ack(ME, "alarm")) == 5, "signed for another lane"
    assert offer(store, good, on=other_topic, signed_for=other_topic) == 5, "for another device"
    assert offer(store, Ack("other-epoch", 2)) == 5, "another outbox"
    assert offer(store, Ack(outbox.epoch, 5)) == 5, "rows that do not exist"
    assert offer(store, Ack(outbox.epoch, 1, [(3, 9)])) == 5, "ranges of rows that do not exist"
    assert offer(store, Ack(outbox.epoch, 1, [(4, 3)])) == 5, "a range that ends before it begins"
    assert offer(store, Ack(outbox.epoch, -1, [(4, 4), (2, 2)])) == 5, "ranges out of order"
    uplink.on_ack(topic, b"rubbish")
    uplink.on_ack("x/y", b"rubbish")
    assert uplink.counts["refused acks"] == 12
    assert offer(store, good) == 2, "the real one"
    assert offer(store, Ack(outbox.epoch, 0)) == 2, "an old one again changes nothing"
    assert offer(store, Ack(outbox.epoch, 2, [(4, 4)])) == 1, "fresh rows before the backlog"


# --- desired state --------------------------------------------------------------------------------


def test_desired_state_is_applied_only_when_genuine_newer_mine_and_fresh(state: State) -> None:
    clock = TrustedClock(ManualClock(), state)
    now = clock.now()
    key, thief = keys.generate_key(), keys.generate_key()
    trusted = [keys.public_pem(key.public_key())]

    def signed(
        generation: int = 5, device: str = "turbine-1", expires: float = 60.0, by: keys.PrivateKey = key
    ) -> bytes:
        desired = DesiredState("north", device, generation, now, now + expires, {}, [])
        return dsse.sign(encode_desired(desired), PAYLOAD_TYPE, by)

    accepted = check(signed(), trusted, ME, 4, clock)
    assert accepted is not None and accepted.generation == 5
    assert check(signed(), trusted, ME, 5, clock) is None, "the one accepted already"
    for raw, says in [
        (signed(generation=3), "older"),
        (signed(device="turbine-2"), "is for north/turbine-2"),
        (signed(expires=-1), "expired"),
        (signed(by=thief), "no trusted key"),
        (signed()[:-10], "not a DSSE"),
    ]:
        with pytest.raises(TrustError, match=says):
            check(raw, trusted, ME, 4, clock)
