"""The deny-list as a trend store gets it: signed by the controller (DSSE), whole, the newest counts."""

from __future__ import annotations

import msgspec
from msgspec import Struct

PAYLOAD_TYPE = "application/vnd.edgeward.denied.v1+json"


class Denied(Struct, frozen=True):
    """`keyids` are the certificates not yet ended whose holders may not speak any more."""

    issued_at: float
    keyids: list[str]


def encode(denied: Denied) -> bytes:
    return msgspec.json.encode(denied)
