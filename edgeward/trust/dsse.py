"""DSSE envelopes (github.com/secure-systems-lab/dsse v1.0.2) for what the controller decides."""

from __future__ import annotations

import json
from typing import TypeVar

import msgspec
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import (
    CryptoSigner,
    Key,
    SSlibKey,
)

from edgeward.errors import TrustError
from edgeward.trust.keys import PrivateKey, load_public

T = TypeVar("T")

MAX_DSSE_BYTES = 4 << 20


def sign(payload: bytes, payload_type: str, key: PrivateKey) -> bytes:
    """A DSSE envelope in JSON with one ECDSA P-256 signature."""
    envelope = Envelope(payload, payload_type, {})
    envelope.sign(CryptoSigner(key))
    return json.dumps(envelope.to_dict(), separators=(",", ":")).encode()


def verify(raw: bytes, payload_type: str, trusted_pems: list[str], type_: type[T]) -> T:
    """The payload as `type_`, when one of the trusted keys signed it as `payload_type`.

    The payload is parsed only after its signature holds. Raises TrustError.
    """
    if len(raw) > MAX_DSSE_BYTES:
        raise TrustError(f"signed document larger than {MAX_DSSE_BYTES} bytes")
    try:
        envelope = Envelope.from_dict(json.loads(raw))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise TrustError("not a DSSE envelope") from None
    keys: list[Key] = [SSlibKey.from_crypto(load_public(pem)) for pem in trusted_pems]
    try:
        envelope.verify(keys, 1)
    except (VerificationError, ValueError, TypeError):
        raise TrustError("no trusted key signed this document") from None
    if envelope.payload_type != payload_type:
        raise TrustError(f"signed as {envelope.payload_type!r}, expected {payload_type!r}")
    try:
        return msgspec.json.decode(envelope.payload, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TrustError(f"signed, but not a {type_.__name__}: {error}") from None
