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


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Raises ValueError for a key that is there twice: other readers may take the other value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _canonical(envelope: Envelope, raw: bytes) -> bool:
    """Whether this is how it would be written: base64 decoders skip what they do not know, and drop spare bits."""
    return bool(envelope.to_dict() == json.loads(raw))


def verify(raw: bytes, payload_type: str, trusted_pems: list[str], type_: type[T]) -> T:
    """The payload as `type_`, when one of the trusted keys signed it as `payload_type`.

    The payload is parsed only after its signature holds. Stricter than DSSE: members that the envelope does not
    know, members given twice and base64 that no encoder writes are refused, too. Raises TrustError.
    """
    if len(raw) > MAX_DSSE_BYTES:
        raise TrustError(f"signed document larger than {MAX_DSSE_BYTES} bytes")
    try:
        envelope = Envelope.from_dict(json.loads(raw, object_pairs_hook=_once))
        if not _canonical(envelope, raw):
            raise ValueError
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
