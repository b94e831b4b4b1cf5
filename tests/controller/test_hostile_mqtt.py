"""A client of the broker without a key, or with another device's, moves nothing."""

from __future__ import annotations

import time
from typing import Any

import pytest

from edgeward.errors import Forbidden, InvalidDocument, NotFound, TrustError
from edgeward.trust import certificates, dsse, keys
from edgeward.trust.certificates import DeviceIdentity
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import topics
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState, ModelRef
from edgeward.wire.envelope import seal
from edgeward.wire.reports import OutboxReport, Phase, Report, Reported, SlotReport, StreamReport

FAKE = ModelRef("m", 9, "9" * 64)


def lie(device: Any, identity: SigningIdentity, topic: str = "") -> tuple[str, bytes]:
    topic = topic or topics.reported(device.name)
    message = Reported(99, 99, time.time(), 99, {"default": SlotReport(Phase.ACTIVE, running=FAKE)})
    return topic, seal(message, topic, identity, with_certificate=True)


def test_nothing_that_a_stranger_publishes_reaches_a_device_s_status(
    plant_with_broker: Any, until: Any
) -> None:
    plant = plant_with_broker
    plant.begin()
    good, other = plant.enroll("d1"), plant.enroll("d2")
    # The stranger's own CA and key, with the victim's name in the certificate.
    key = keys.generate_key()
    own = certificates.issue(
        certificates.make_ca(key, time.time()), key, key.public_key(),
        DeviceIdentity(good.name), time.time(), lifetime=3600,
    )  # fmt: skip
    forged = SigningIdentity(key, certificates.to_der(own))
    topic, genuine = good.reported(1, {"default": SlotReport(Phase.ACTIVE)})
    birth_topic, birth = good.birth()
    with plant.stranger() as stranger:
        attacks = [
            (topic, b"garbage"),
            (topic, b""),
            lie(good, forged),
            lie(good, other.identity),  # d2 speaks for d1
            (topic, lie(other, other.identity)[1]),  # d2's own message, moved to d1's topic
            (topics.report(good.name), genuine),  # moved to another channel
            (topic, genuine[:-1] + bytes([genuine[-1] ^ 1])),
            ("edgeward/v1/north/../d1/status", birth),
        ]
        for attack in attacks:
            assert stranger.publish(*attack, retain=True)
        # The broker keeps the order of one client: when the last is in, the others were refused.
        assert stranger.publish(birth_topic, birth)
        until(lambda: plant.device("d1")["status"]["connection"] == "Online")
    status = plant.device("d1")["status"]
    assert status["slots"] == {} and status.get("observedGeneration", 0) == 0
    assert plant.device("d2")["status"]["connection"] == "Unseen"


@pytest.mark.parametrize("attack", ["forged", "other", "moved", "channel", "flipped"])
def test_each_attack_is_refused_by_name(plant: Any, attack: str) -> None:
    """The same attacks one by one, so that a lost defence shows which."""
    plant.begin()
    good, other = plant.enroll("d1"), plant.enroll("d2")
    key = keys.generate_key()
    ca = certificates.make_ca(key, time.time())
    own = certificates.issue(ca, key, key.public_key(), DeviceIdentity(good.name), time.time(), lifetime=3600)
    topic, raw = good.reported(1, {})
    match attack:
        case "forged":
            topic, raw = lie(good, SigningIdentity(key, certificates.to_der(own)))
        case "other":
            topic, raw = lie(good, other.identity)
        case "moved":
            raw = lie(other, other.identity)[1]
        case "channel":
            topic = topics.report(good.name)
        case "flipped":
            raw = raw[:-1] + bytes([raw[-1] ^ 1])
    with pytest.raises(TrustError):
        plant.controller.ingest.accept(topic, raw)
    assert plant.device("d1")["status"]["slots"] == {}
    with pytest.raises((Forbidden, InvalidDocument)):
        other.http.send(topic, raw)  # over HTTP neither


def test_a_recorded_message_cannot_be_replayed(plant: Any) -> None:
    plant.begin()
    device = plant.enroll("d1")
    accept = plant.controller.ingest.accept
    will = device.birth(state="offline")  # signed ahead of the birth
    old = device.runs(FAKE, 1)
    assert accept(*device.birth())
    new = device.reported(1, {})
    assert accept(*new)
    assert not accept(*old) and not accept(*new)
    assert plant.device("d1")["status"]["slots"] == {}
    # The will counts once after a birth, not whenever a stranger has it.
    assert accept(*will) and not accept(*will)
    assert plant.device("d1")["status"]["connection"] == "Offline"
    assert accept(*device.reported(1, {}))
    assert plant.device("d1")["status"]["connection"] == "Online"
    assert not accept(*will)
    assert plant.device("d1")["status"]["connection"] == "Online"


def test_a_revoked_device_is_refused_everywhere(plant: Any, make: Any) -> None:
    plant.begin()
    device = plant.enroll("d1")
    assert plant.controller.ingest.accept(*device.birth())
    # Without a resourceVersion, since the reconciler writes to the device, too.
    plant.client.apply([make("Device", "d1", site="north", revoked=True)])
    message = device.runs(FAKE)
    with pytest.raises(Forbidden):
        plant.controller.ingest.accept(*message)
    for attempt in (
        lambda: device.http.desired(newer_than=0, wait=0),
        lambda: device.http.send(*message),
        lambda: device.http.http.request("GET", f"/artifacts/{'0' * 64}"),
    ):
        with pytest.raises(Forbidden):
            attempt()
    assert plant.device("d1")["status"]["slots"] == {}


def test_a_deleted_device_s_certificate_does_not_speak_for_its_successor(plant: Any) -> None:
    plant.begin()
    old = plant.enroll("d1")
    plant.client.delete("Device", "d1")
    with pytest.raises(NotFound):
        plant.device("d1")
    new = plant.enroll("d1")
    with pytest.raises(Forbidden):
        plant.controller.ingest.accept(*old.runs(FAKE))
    assert plant.controller.ingest.accept(*new.birth())


def test_desired_state_comes_back_after_a_stranger_cleared_it_and_the_broker_was_killed(
    plant_with_broker: Any, until: Any
) -> None:
    plant = plant_with_broker
    plant.begin()
    device = plant.enroll("d1")
    topic = topics.desired(device.name)
    got: list[bytes] = []
    with plant.stranger(
        subscriptions=(topic,), on_message=lambda message: got.append(message.payload)
    ) as stranger:
        until(lambda: got)
        state = dsse.verify(got[-1], PAYLOAD_TYPE, device.response.trust.desired_keys, DesiredState)
        assert (state.device, state.site) == ("d1", "north")
        stranger.publish(topic, b"", retain=True)
        until(lambda: got[-1] == b"")
        # The device says that it is behind; the controller sends its state again.
        stranger.publish(*device.reported(0, {}))
        until(lambda: got[-1] != b"")
        plant.broker.kill()
        got.clear()
        plant.broker.start()
        until(lambda: got and got[-1])
    assert plant.controller.link.connected


def test_numbers_that_no_gate_can_weigh_are_left_out(plant: Any) -> None:
    plant.begin()
    device = plant.enroll("d1")
    stream = StreamReport(
        "s1", FAKE.digest, 1, 0, 0, 0, score_mean=float("inf"), psi={"a": float("nan"), "b": 0.2}
    )
    report = Report(1, 1, time.time(), 1.0, [stream], OutboxReport(0, 0, 0, 0))
    topic = topics.report(device.name)
    assert plant.controller.ingest.accept(topic, seal(report, topic, device.identity))
    kept = plant.client.device_reports("d1")[-1]["streams"][0]
    assert kept["psi"] == {"b": 0.2} and "score_mean" not in kept
