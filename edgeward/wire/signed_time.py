"""The controller's answer to "what time is it?", signed (DSSE) over the question's nonce.

The nonce is what makes it an answer of now: a recorded one fits no other question. It must not need a
device token, since a device whose clock is wrong cannot mint one that holds.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Struct

from edgeward.errors import InvalidDocument

PAYLOAD_TYPE = "application/vnd.edgeward.time.v1+json"

#: In the TUF timestamp's signed part: when the controller signed it, in whole seconds since 1970 (TUF
#: itself names expiries only; unknown fields are signed along and ignored by other clients).
TUF_FIELD = "x-edgeward-signed-at"

_NONCE = re.compile(r"[0-9a-f]{32,64}")


class SignedTime(Struct, frozen=True):
    """`at` is seconds since 1970 when it was signed."""

    nonce: str
    at: float


def check_nonce(text: str) -> str:
    """16 to 32 random bytes in lower-case hex. Raises InvalidDocument."""
    if not _NONCE.fullmatch(text):
        raise InvalidDocument("expected 32 to 64 lower-case hex digits", source="request", field="nonce")
    return text


encode = msgspec.json.Encoder().encode
