"""Outbox, uplink, acks, desired state and sequences: what is kept, sent, and refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.desired import check
from agent.state import SlotRecord, State
from agent.trusted_clock import TrustedClock
from agent.uplink import BATCH_ROWS, RESEND_AFTER, WINDOW_ROWS, Sending, Uplink, plan
from edgeward.clock import ManualClock
from edgeward.errors import TrustError
from edgeward.identifiers import DeviceName
from edgeward.trust import certificates, dsse, keys
from edgeward.trust.certificates import DeviceIdentity, Identity, StoreIdentity, TrustAnchor
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import topics
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState, ModelRef
from edgeward.wire.desired import encode as encode_desired
from edgeward.wire.envelope import seal
from edgeward.wire.rows import Ack, ResultRow, Row
from edgeward.wire.topics import Lane

ME = DeviceName("north", "turbine-1")


def row(seq: int) -> tuple[Lane, Row]:
    return "result", ResultRow(seq, "s", 1, "", "e", seq, "d", "v", "p", {"score": 0.5}, False)


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state.db")


# --- the outbox and its plan ----------------------------------------------------------------------


@settings(max_examples=100)
@given(st.data())
def test_the_plan_sends_everything_in_order_within_its_window(data: st.DataObject) -> None:
    sending, acked, produced, now = Sending(), -1, 0, 0.0
    highest = -1
    for _ in range(60):
        produced += data.draw(st.integers(0, 900))
        now += data.draw(st.sampled_from([0.0, 0.1, RESEND_AFTER, 40.0]))
        sending, span = plan(sending, produced, acked, now)
        if span is not None:
            first, count = span
            assert acked < first <= highest + 1 and count >= 1
            assert count <= BATCH_ROWS and first + count <= produced
            assert first + count - 1 - acked <= WINDOW_ROWS
            highest = max(highest, first + count - 1)
        if highest > acked and data.draw(st.booleans()):
            acked = data.draw(st.integers(acked, highest))
            sending = Sending(sending.sent, now)
    for _ in range(2000):
        if acked == produced - 1:
            break
        now += 60.0
        sending, span = plan(sending, produced, acked, now)
        if span is not None and span[0] == acked + 1:
            acked = span[0] + span[1] - 1
            sending = Sending(sending.sent, now)
    assert acked == produced - 1


def test_without_progress_it_goes_back_to_the_floor_more_and_more_patiently() -> None:
    sending, span = plan(Sending(), 10, -1, 0.0)
    assert span == (0, 10)
    sending, span = plan(sending, 10, -1, RESEND_AFTER / 2)
    assert span is None
    sending, span = plan(sending, 10, -1, RESEND_AFTER)
    assert span == (0, 10)
    sending, span = plan(sending, 10, -1, RESEND_AFTER * 2)
    assert span is None, "patience has doubled"
    assert plan(sending, 10, -1, RESEND_AFTER * 3)[1] == (0, 10)


def test_rows_and_positions_survive_and_number_on(tmp_path: Path) -> None:
    first = State(tmp_path / "state.db")
    first.commit_rows([row(0), row(1)], {"sensors/a": ("e", 1)})
    epoch = first.epoch
    first.close()
    again = State(tmp_path / "state.db")
    assert (again.epoch, again.source("sensors/a")) == (epoch, ("e", 1))
    again.commit_rows([row(2)])
    assert len(again.read_rows("result", 0, 9)) == 3
    again.acknowledge("result", 1)
    assert (again.lane("result").floor, again.lane("result").next_seq) == (2, 3)
    assert len(again.read_rows("result", 0, 9)) == 1


def test_a_failed_commit_leaves_neither_rows_nor_position(state: State) -> None:
    class Unpackable:
        pass

    with pytest.raises(TypeError):
        state.commit_rows([row(0), ("result", Unpackable())], {"t": ("e", 0)})  # type: ignore[list-item]
    with pytest.raises(Exception, match=r"bind|support"):
        state.commit_rows([row(0)], {"t": (object(), 0)})  # type: ignore[dict-item]
    assert state.source("t") is None
    assert state.lane("result").next_seq == 0
    assert state.outbox_size() == (0, 0)


def test_a_sigkill_between_windows_keeps_rows_and_position_together(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from agent.state import State
        from edgeward.wire.rows import ResultRow
        state = State(Path(sys.argv[1]))
        seq = 0
        while True:
            rows = [("result", ResultRow(s, "s", 1, "", "e", s, "d", "v", "p", {}, False)) for s in range(seq, seq + 7)]
            seq += 7
            state.commit_rows(rows, {"t": ("e", seq - 1)})
            print(seq, flush=True)
        """
    )
    for attempt in range(3):
        path = tmp_path / f"state-{attempt}.db"
        child = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(5 + attempt * 17):
            last = int(child.stdout.readline())
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        state = State(path)
        position = state.source("t")
        assert position is not None and position[1] + 1 == state.lane("result").next_seq >= last
        stored = [
            msgspec.msgpack.decode(item, type=ResultRow).source_seq
            for item in state.read_rows("result", 0, 10**6)
        ]
        assert stored == list(range(position[1] + 1))
        state.close()


def test_the_status_can_be_read_while_the_agent_writes(tmp_path: Path) -> None:
    writer = State(tmp_path / "state.db")
    writer.set_slot("default", SlotRecord(ModelRef("m", 1, "d")))
    reader = State(tmp_path / "state.db", read_only=True)
    writer.commit_rows([row(0)])
    assert reader.lane("result").next_seq == 1
    assert reader.slots()["default"].running == ModelRef("m", 1, "d")


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


def test_only_the_sites_own_store_can_delete_rows(state: State) -> None:
    clock = ManualClock()
    fleet = Fleet(clock)
    me = fleet.member(DeviceIdentity(ME))
    uplink = Uplink(state, ME, fleet.anchor, lambda: me, clock, lambda topic, payload: True, lambda: True)
    state.commit_rows([row(index) for index in range(5)])
    topic = topics.ack(ME, "result")
    store = fleet.member(StoreIdentity("plant", frozenset({"north"})))

    def offer(signer: SigningIdentity, ack: Ack, on: str = topic, signed_for: str = topic) -> int:
        uplink.on_ack(on, seal(ack, signed_for, signer, with_certificate=True))
        return state.outbox_size()[0]

    good = Ack(state.epoch, 2)
    elsewhere = fleet.member(StoreIdentity("harbour", frozenset({"harbour"})))
    stranger = Fleet(clock).member(StoreIdentity("plant", frozenset({"north"})))
    other_topic = topics.ack(DeviceName("north", "turbine-2"), "result")
    assert offer(elsewhere, good) == 5, "another site's store"
    assert offer(stranger, good) == 5, "another fleet's store"
    assert offer(me, good) == 5, "a device is no store"
    assert offer(store, good, signed_for=topics.ack(ME, "alarm")) == 5, "signed for another lane"
    assert offer(store, good, on=other_topic, signed_for=other_topic) == 5, "for another device"
    assert offer(store, Ack("other-epoch", 2)) == 5, "another outbox"
    assert offer(store, Ack(state.epoch, 5)) == 5, "rows that do not exist"
    uplink.on_ack(topic, b"rubbish")
    uplink.on_ack("x/y", b"rubbish")
    assert uplink.counts["refused acks"] == 9
    assert offer(store, good) == 2, "the real one"
    assert offer(store, Ack(state.epoch, 0)) == 2, "an old one again changes nothing"


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
