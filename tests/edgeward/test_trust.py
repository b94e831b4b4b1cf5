"""Signatures, certificates and tokens: what holds, and what each defence refuses."""

from __future__ import annotations

import json
import stat

import msgspec
import pytest

from edgeward.clock import ManualClock
from edgeward.errors import TrustError
from edgeward.identifiers import DeviceName
from edgeward.trust import certificates, dsse, keys, tokens
from edgeward.trust.certificates import DeviceIdentity, StoreIdentity, TrustAnchor
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import topics
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState
from edgeward.wire.desired import encode as encode_desired
from edgeward.wire.envelope import Envelope, UnknownSigner, open_envelope, seal
from edgeward.wire.rows import Ack

NOW = ManualClock().now()
DEVICE = DeviceName("north", "turbine-1")
TOPIC = topics.ack(DEVICE, "result")


class Fleet:
    """A certificate authority and a way to enrol with it."""

    def __init__(self) -> None:
        self.key = keys.generate_key()
        self.ca = certificates.make_ca(self.key, NOW)
        self.anchor = TrustAnchor(certificates.to_pem(self.ca))

    def member(self, identity: certificates.Identity, lifetime: float = 3600.0) -> SigningIdentity:
        key = keys.generate_key()
        public = certificates.csr_public_key(certificates.make_csr(key, "wish"))
        certificate = certificates.issue(self.ca, self.key, public, identity, NOW, lifetime=lifetime)
        return SigningIdentity(key, certificates.to_der(certificate))


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture(scope="module")
def device(fleet: Fleet) -> SigningIdentity:
    return fleet.member(DeviceIdentity(DEVICE))


def test_envelope_gives_back_body_and_signer(fleet: Fleet, device: SigningIdentity) -> None:
    raw = seal(Ack("e", 7), TOPIC, device, with_certificate=True)
    opened = open_envelope(raw, TOPIC, fleet.anchor, NOW)
    assert opened.identity == DeviceIdentity(DEVICE)
    assert opened.decode(Ack) == Ack("e", 7)


def test_envelope_without_certificate_needs_a_known_one(fleet: Fleet, device: SigningIdentity) -> None:
    raw = seal(Ack("e", 7), TOPIC, device)
    with pytest.raises(UnknownSigner):
        open_envelope(raw, TOPIC, fleet.anchor, NOW)
    known = {device.keyid: device.certificate_der}
    assert open_envelope(raw, TOPIC, fleet.anchor, NOW, find_certificate=known.get).keyid == device.keyid


def test_envelope_cannot_move_to_another_topic(fleet: Fleet, device: SigningIdentity) -> None:
    raw = seal(Ack("e", 7), TOPIC, device, with_certificate=True)
    with pytest.raises(TrustError, match="signature"):
        open_envelope(raw, topics.ack(DEVICE, "alarm"), fleet.anchor, NOW)


def test_every_flipped_byte_of_an_envelope_is_refused(fleet: Fleet, device: SigningIdentity) -> None:
    raw = seal(Ack("e", 7), TOPIC, device, with_certificate=True)
    for index in range(0, len(raw), 3):
        bent = raw[:index] + bytes([raw[index] ^ 1]) + raw[index + 1 :]
        try:
            opened = open_envelope(bent, TOPIC, fleet.anchor, NOW)
        except TrustError:
            continue
        assert opened.body == msgspec.msgpack.encode(Ack("e", 7)), f"byte {index}"


def test_certificate_of_another_authority_is_refused(fleet: Fleet) -> None:
    stranger = Fleet().member(DeviceIdentity(DEVICE))
    raw = seal(Ack("e", 7), TOPIC, stranger, with_certificate=True)
    with pytest.raises(TrustError, match="not issued"):
        open_envelope(raw, TOPIC, fleet.anchor, NOW)


def test_somebody_elses_certificate_does_not_help(fleet: Fleet, device: SigningIdentity) -> None:
    thief = SigningIdentity(keys.generate_key(), device.certificate_der)
    raw = seal(Ack("e", 7), TOPIC, thief, with_certificate=True)
    with pytest.raises(TrustError, match="signature"):
        open_envelope(raw, TOPIC, fleet.anchor, NOW)
    named = msgspec.msgpack.decode(raw, type=Envelope)
    swapped = msgspec.msgpack.encode(
        Envelope(1, "0" * 64, named.body, named.signature, device.certificate_der)
    )
    with pytest.raises(TrustError, match="not the one"):
        open_envelope(swapped, TOPIC, fleet.anchor, NOW)


def test_expired_and_future_certificates_are_refused(fleet: Fleet) -> None:
    short = fleet.member(DeviceIdentity(DEVICE), lifetime=60.0)
    raw = seal(Ack("e", 7), TOPIC, short, with_certificate=True)
    assert open_envelope(raw, TOPIC, fleet.anchor, NOW + 30)
    with pytest.raises(TrustError, match="expired"):
        open_envelope(raw, TOPIC, fleet.anchor, NOW + 1000)
    with pytest.raises(TrustError, match="not valid yet"):
        open_envelope(raw, TOPIC, fleet.anchor, NOW - 1000)


def test_store_identity_names_its_sites(fleet: Fleet) -> None:
    store = fleet.member(StoreIdentity("plant", frozenset({"north", "south"})))
    raw = seal(Ack("e", 7), TOPIC, store, with_certificate=True)
    identity = open_envelope(raw, TOPIC, fleet.anchor, NOW).identity
    assert identity == StoreIdentity("plant", frozenset({"north", "south"}))


def test_the_ca_certificate_is_no_member(fleet: Fleet) -> None:
    own = SigningIdentity(fleet.key, certificates.to_der(fleet.ca))
    with pytest.raises(TrustError):
        open_envelope(seal(Ack("e", 7), TOPIC, own, with_certificate=True), TOPIC, fleet.anchor, NOW)


def desired(generation: int = 1) -> DesiredState:
    return DesiredState(DEVICE.site, DEVICE.device, generation, NOW, NOW + 60, {}, [])


def test_dsse_round_trip_and_refusals() -> None:
    key, other = keys.generate_key(), keys.generate_key()
    trusted = [keys.public_pem(key.public_key())]
    raw = dsse.sign(encode_desired(desired()), PAYLOAD_TYPE, key)
    assert dsse.verify(raw, PAYLOAD_TYPE, trusted, DesiredState) == desired()
    with pytest.raises(TrustError, match="no trusted key"):
        dsse.verify(raw, PAYLOAD_TYPE, [keys.public_pem(other.public_key())], DesiredState)
    with pytest.raises(TrustError, match="signed as"):
        dsse.verify(dsse.sign(b"{}", "text/plain", key), PAYLOAD_TYPE, trusted, DesiredState)
    document = json.loads(raw)
    document["payload"] = json.loads(dsse.sign(encode_desired(desired(2)), PAYLOAD_TYPE, other))["payload"]
    with pytest.raises(TrustError, match="no trusted key"):
        dsse.verify(json.dumps(document).encode(), PAYLOAD_TYPE, trusted, DesiredState)
    for rubbish in (b"", b"[]", b"{}", b'{"payload": 1}', b"\xff\xfe", b"[" * 100_000):
        with pytest.raises(TrustError):
            dsse.verify(rubbish, PAYLOAD_TYPE, trusted, DesiredState)


def test_device_token(fleet: Fleet, device: SigningIdentity) -> None:
    certificate = certificates.load_certificate_der(device.certificate_der)
    token = tokens.mint(device, NOW)
    assert tokens.keyid_of(token) == device.keyid
    tokens.verify(token, certificate, NOW + 10)
    with pytest.raises(TrustError, match="expired"):
        tokens.verify(token, certificate, NOW + 3600)
    with pytest.raises(TrustError, match="expired"):
        tokens.verify(token, certificate, NOW - 3600)
    with pytest.raises(TrustError, match="signature"):
        tokens.verify(
            tokens.mint(SigningIdentity(keys.generate_key(), device.certificate_der), NOW), certificate, NOW
        )
    for rubbish in ("", "a.b.c", "eyJhbGciOiJub25lIn0.e30."):
        with pytest.raises(TrustError):
            tokens.keyid_of(rubbish)


def test_private_keys_are_for_their_owner_only(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "identity.key"
    key = keys.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.private_pem(keys.load_or_create(path)) == keys.private_pem(key)
    path.chmod(0o644)
    with pytest.raises(TrustError, match="chmod 600"):
        keys.load_or_create(path)
