"""The signed envelope around every message that a broker carries upstream, and around acks.

The signature (ECDSA P-256, SHA-256, DER) covers a domain tag, the topic and the body, so that a
message cannot be replayed on another topic. Who signed is decided by the certificate alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import Struct

from edgeward.errors import TrustError
from edgeward.trust.certificates import Identity, TrustAnchor, fingerprint, load_certificate_der
from edgeward.trust.keys import SigningIdentity

T = TypeVar("T")

MAX_ENVELOPE_BYTES = 20 << 20
_DOMAIN = b"edgeward.dev/envelope/v1\x00"
_ECDSA = ec.ECDSA(hashes.SHA256())


class Envelope(Struct, frozen=True, array_like=True):
    """`keyid` is the SHA-256 of the signer's certificate (DER); `certificate` travels in births and acks."""

    version: int
    keyid: str
    body: bytes
    signature: bytes
    certificate: bytes = b""


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Envelope)


def _signed_bytes(topic: str, body: bytes) -> bytes:
    return _DOMAIN + len(topic.encode()).to_bytes(4, "big") + topic.encode() + body


def seal(message: Struct, topic: str, signer: SigningIdentity, *, with_certificate: bool = False) -> bytes:
    """Encode and sign `message` for `topic`."""
    body = _encode(message)
    signature = signer.key.sign(_signed_bytes(topic, body), _ECDSA)
    certificate = signer.certificate_der if with_certificate else b""
    return _encode(Envelope(1, signer.keyid, body, signature, certificate))


class Opened(Struct, frozen=True):
    """A message whose signature and signer's certificate hold."""

    identity: Identity
    keyid: str
    certificate: bytes
    body: bytes

    def decode(self, type_: type[T]) -> T:
        """The body as `type_`. Raises TrustError when a genuine signer sent something else."""
        try:
            return msgspec.msgpack.decode(self.body, type=type_)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise TrustError(f"signed by {self.identity}, but not a {type_.__name__}: {error}") from None


def open_envelope(
    raw: bytes,
    topic: str,
    anchor: TrustAnchor,
    now: float,
    *,
    find_certificate: Callable[[str], bytes | None] = lambda keyid: None,
) -> Opened:
    """Verify `raw` as received on `topic` and return its body and signer.

    `find_certificate` maps a keyid to a certificate (DER) seen before, for envelopes without one.
    Raises TrustError; `UnknownSigner` when only the certificate is missing.
    """
    if len(raw) > MAX_ENVELOPE_BYTES:
        raise TrustError(f"envelope larger than {MAX_ENVELOPE_BYTES} bytes")
    try:
        envelope = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise TrustError("not a signed envelope") from None
    if envelope.version != 1:
        raise TrustError(f"envelope version {envelope.version} is not supported")
    der = envelope.certificate or find_certificate(envelope.keyid)
    if not der:
        raise UnknownSigner(f"no certificate known for key {envelope.keyid[:16]}")
    if fingerprint(der) != envelope.keyid:
        raise TrustError("the certificate is not the one the envelope names")
    certificate = load_certificate_der(der)
    identity = anchor.verify(certificate, now)
    _verify_signature(certificate, envelope.signature, _signed_bytes(topic, envelope.body))
    return Opened(identity, envelope.keyid, der, envelope.body)


def _verify_signature(certificate: x509.Certificate, signature: bytes, data: bytes) -> None:
    public = certificate.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise TrustError("the certificate does not hold an elliptic-curve key")
    try:
        public.verify(signature, data, _ECDSA)
    except InvalidSignature:
        raise TrustError("the signature does not hold for this topic and body") from None


class UnknownSigner(TrustError):
    """The signer's certificate has not been seen yet; it may come with the next birth."""
