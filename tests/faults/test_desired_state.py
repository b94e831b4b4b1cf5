"""Desired states that are not this device's newest genuine one, through every door: none is applied.

The envelopes are really signed, the doors are the daemon's own: MQTT, HTTPS, an import, and what its disk gives
back at boot. Each attack has a control: with its defence taken away it is applied.
"""

from __future__ import annotations

import base64
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope

from agent import applying
from agent import desired as decisions
from agent.applying import Applying
from agent.attempts import Attempts
from agent.daemon import Daemon
from agent.state import State
from agent.trusted_clock import TrustedClock
from edgeward.clock import ManualClock
from edgeward.identifiers import DeviceName
from edgeward.mqtt import Message
from edgeward.trust import dsse
from edgeward.trust.certificates import DeviceIdentity, issue, make_ca, to_pem
from edgeward.trust.keys import generate_key, load_or_create, public_pem
from edgeward.wire import topics
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState, ModelRef, SlotTarget, encode
from edgeward.wire.enrollment import EnrollResponse, TrustBundle
from edgeward.wire.schedule import Delivery
from tests.faults.conftest import head

ME = DeviceName("north", "turbine-1")
NOW = ManualClock().now()
DAY = 86400.0
KEY, OTHER = generate_key(), generate_key()
OTHER_TYPE = "application/vnd.edgeward.denied.v1+json"


def state(generation: int, **changes: Any) -> DesiredState:
    slots = {"default": SlotTarget(ModelRef("m", generation, f"{generation:064d}"))}
    made = DesiredState(ME.site, ME.device, generation, NOW - DAY, NOW + 7 * DAY, slots, [])
    return msgspec.structs.replace(made, **changes)


def signed(generation: int, key: Any = KEY, type_: str = PAYLOAD_TYPE, **changes: Any) -> bytes:
    return dsse.sign(encode(state(generation, **changes)), type_, key)


def twice(generation: int) -> bytes:
    """The genuine envelope, with another payload before the one that was signed."""
    other = base64.b64encode(encode(state(generation + 1))).decode()
    return b'{"payload":"%s",' % other.encode() + signed(generation)[1:]


def spare_bits(generation: int) -> bytes:
    """The same content in base64 that no encoder writes: the bits behind its end are not zero."""
    made = (signed(generation, policies={"filler": "x" * count}) for count in range(3))
    envelope = next(one for raw in made if (one := json.loads(raw))["payload"].endswith("=="))
    payload = envelope["payload"]
    envelope["payload"] = payload[:-3] + chr(ord(payload[-3]) + 1) + "=="
    assert base64.b64decode(payload) == base64.b64decode(envelope["payload"])
    return json.dumps(envelope).encode()


class Device:
    """An enrolled device whose controller is a socket of the test's."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        if not folder.exists():
            folder.mkdir()
            ca_key = generate_key()
            ca = make_ca(ca_key, NOW - DAY)
            own = load_or_create(folder / "identity.key").public_key()
            certificate = issue(ca, ca_key, own, DeviceIdentity(ME), NOW - DAY, lifetime=90 * DAY)
            trust = TrustBundle(to_pem(ca), [public_pem(KEY.public_key())])
            answer = EnrollResponse(
                ME.device,
                "device",
                [ME.site],
                to_pem(certificate),
                trust,
                "mqtt://127.0.0.1:1",
                NOW + 60 * DAY,
            )
            (folder / "enrollment.json").write_bytes(msgspec.json.encode(answer))
            (folder / "controller.url").write_text(url)
        self.daemon = Daemon(folder, ManualClock())
        self.applied: list[int] = []
        wish = self.daemon.slots.wish

        def wished(slots: dict[str, SlotTarget], delivery: Delivery | None = None) -> None:
            self.applied.append(slots["default"].active.version)
            wish(slots, delivery)

        self.daemon.slots.wish = wished  # type: ignore[method-assign]

    def close(self) -> None:
        self.daemon.state.close()
        self.daemon.engine.loop.close()
        os.close(self.daemon._lock_file)

    def mqtt(self, raw: bytes) -> None:
        self.daemon._on_message(Message(topics.desired(ME), raw, True, lambda: None))
        self.daemon._take_offers()


@pytest.fixture
def answers() -> list[bytes]:
    return [b""]


@pytest.fixture
def device(tmp_path: Path, serve: Any, answers: list[bytes]) -> Iterator[Device]:
    def answer(connection: socket.socket, offset: int) -> None:
        # One request, one connection: the next poll must not meet one that is just being closed.
        start = head(len(answers[0])).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        connection.sendall(start + answers[0])

    server, _ = serve(answer)
    made = Device(tmp_path / "device", server.url)
    yield made
    made.close()


@pytest.fixture
def door(request: Any, device: Device, answers: list[bytes]) -> Callable[[bytes], None]:
    """Hand bytes in, that way."""

    def https(raw: bytes) -> None:
        answers[0] = raw
        device.daemon._poll_desired()

    def bundle(raw: bytes) -> None:
        with device.daemon._imports.receiving() as part:
            (part / "desired.json").write_bytes(raw)
        device.daemon._take_import()

    return {"mqtt": device.mqtt, "https": https, "import": bundle}[request.param]


ATTACKS: dict[str, Callable[[], bytes]] = {
    "replayed": lambda: signed(3),
    "the same generation, other content": lambda: signed(5, slots={"default": state(9).slots["default"]}),
    "forged": lambda: signed(6, OTHER),
    "signed as something else": lambda: signed(6, type_=OTHER_TYPE),
    "expired": lambda: signed(6, expires_at=NOW - 1),
    "another device's": lambda: signed(6, device="turbine-2"),
    "another site's": lambda: signed(6, site="south"),
    "a key twice": lambda: twice(6),
    "spare bits": lambda: spare_bits(6),
    "unsigned": lambda: json.dumps(Envelope(encode(state(6)), PAYLOAD_TYPE, {}).to_dict()).encode(),
    "the payload alone": lambda: encode(state(6)),
}


def without_defence(attack: str, device: Device, patch: pytest.MonkeyPatch) -> None:
    if attack in ("replayed", "the same generation, other content"):
        patch.setattr(device.daemon.state, "generation", lambda: 0)
    elif attack in ("forged", "unsigned"):
        patch.setattr(Envelope, "verify", lambda *_: {})
    elif attack == "signed as something else":
        patch.setattr(decisions, "PAYLOAD_TYPE", OTHER_TYPE)
    elif attack == "expired":
        patch.setattr(TrustedClock, "now", lambda self: NOW - DAY)
    elif attack.startswith("another"):
        raw = ATTACKS[attack]()
        named = json.loads(base64.b64decode(json.loads(raw)["payload"]))
        patch.setattr(device.daemon._applying, "_name", DeviceName(named["site"], named["device"]))
    elif attack == "a key twice":
        patch.setattr(dsse, "_once", dict)
    elif attack == "spare bits":
        patch.setattr(dsse, "_canonical", lambda *_: True)
    else:
        patch.setattr(dsse, "verify", lambda raw, *_: msgspec.json.decode(raw, type=DesiredState))


@pytest.mark.parametrize("door", ["mqtt", "https", "import"], indirect=True)
@pytest.mark.parametrize("attack", list(ATTACKS))
@pytest.mark.parametrize("defended", [True, False])
def test_nothing_but_the_newest_genuine_one_is_applied(
    device: Device, door: Any, attack: str, defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    door(signed(5))
    assert device.applied == [5]
    raw = ATTACKS[attack]()
    if not defended:
        without_defence(attack, device, monkeypatch)
    door(raw)
    assert len(device.applied) == (1 if defended else 2)
    if defended:
        assert device.daemon.state.generation() == 5 and device.daemon.state.desired() == signed_before(
            device
        )
        door(signed(6))
        assert device.applied == [5, 6], "what is genuine comes in all the same"


def signed_before(device: Device) -> bytes:
    raw = device.daemon.state.desired()
    assert (
        raw is not None
        and dsse.verify(raw, PAYLOAD_TYPE, [public_pem(KEY.public_key())], DesiredState).generation == 5
    )
    return raw


@pytest.mark.parametrize("door", ["mqtt", "https", "import"], indirect=True)
def test_the_order_of_arrival_does_not_matter(device: Device, door: Any) -> None:
    for generation in (7, 6, 5, 7, 8, 6):
        door(signed(generation))
    assert device.applied == [7, 8]


STORED = [attack for attack in ATTACKS if attack not in ("expired", "the same generation, other content")]


@pytest.mark.parametrize("attack", STORED)
@pytest.mark.parametrize("defended", [True, False])
def test_what_the_disk_gives_back_at_boot_is_not_trusted_either(
    device: Device, attack: str, defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Genuine: generation 6, also when it has expired since."""
    expired = signed(6, expires_at=NOW - 1)
    device.daemon.state.accept_desired(6, expired)
    device.daemon._applying.restore()
    assert device.applied == [6], "what was accepted goes on"
    device.daemon.state.accept_desired(6, ATTACKS[attack]())
    if not defended:
        if attack == "replayed":
            monkeypatch.setattr(
                applying, "stored", lambda raw, keys, *_: dsse.verify(raw, PAYLOAD_TYPE, keys, DesiredState)
            )
        else:
            without_defence(attack, device, monkeypatch)
    device.daemon._applying.restore()
    assert len(device.applied) == (1 if defended else 2)
    if defended:
        (condition,) = device.daemon._applying.conditions()
        assert (condition.status, condition.reason) == ("False", "Damaged")
        device.mqtt(signed(5))
        assert device.applied == [6], "an older one is no substitute"
        device.mqtt(signed(6))
        assert device.applied == [6, 6] and not device.daemon._applying.conditions(), "the same one again is"


@pytest.mark.parametrize("defended", [True, False])
def test_no_flipped_bit_goes_unnoticed(
    device: Device, defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = signed(6)
    if not defended:
        monkeypatch.setattr(Envelope, "verify", lambda *_: {})
    for at in range(len(raw)):
        for bit in range(8):
            device.daemon._applying.offer(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
    assert bool(device.applied) == (not defended)
    if defended:
        for cut in range(len(raw)):
            device.daemon._applying.offer(raw[:cut])
        assert not device.applied
        device.daemon._applying.offer(raw)
        assert device.applied == [6]


@st.composite
def offers(draw: st.DrawFn) -> tuple[int, bool, bool, bool, bool]:
    genuine = draw(st.booleans())
    flags = (True,) * 3 if genuine else draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    return (draw(st.integers(1, 9)), *flags, draw(st.booleans()))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(offers(), max_size=15))
def test_whatever_comes_in_whatever_order_only_newer_genuine_ones_are_applied(
    tmp_path_factory: pytest.TempPathFactory, sequence: list[tuple[int, bool, bool, bool, bool]]
) -> None:
    """Offers are (generation, of the right key, for this device, not expired, the agent restarts behind it)."""
    path = tmp_path_factory.mktemp("offers") / "state.db"
    applied: list[int] = []

    def boot() -> tuple[State, Applying]:
        opened = State(path)
        made = Applying(
            opened, Attempts(opened), ME, lambda: [public_pem(KEY.public_key())],
            lambda desired: applied.append(desired.generation), TrustedClock(ManualClock(), opened),
        )  # fmt: skip
        made.restore()
        return opened, made

    opened, current = boot()
    expected: list[int] = []
    highest = 0
    for generation, right_key, mine, fresh, restarts in sequence:
        changes: dict[str, Any] = {} if mine else {"device": "turbine-2"}
        if not fresh:
            changes["expires_at"] = NOW - 1
        current.offer(signed(generation, KEY if right_key else OTHER, **changes))
        if right_key and mine and fresh and generation > highest:
            highest = generation
            expected.append(generation)
        if restarts:
            current.stop()
            opened.close()
            opened, current = boot()
            expected += [highest] if highest else []
        assert applied == expected and opened.generation() == highest
    opened.close()
