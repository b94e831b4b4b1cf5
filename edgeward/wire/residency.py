"""Residency between a site's trend store and the controller: the policy down, the decisions made by it up.

The policy is signed by the controller (DSSE) and whole; the newest counts, until it expires. Decisions are
records of a hash chain that the store keeps: each names the SHA-256 of the one before.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from edgeward.storage import sha256_hex
from edgeward.wire.resources import Residency
from edgeward.wire.topics import Lane

PAYLOAD_TYPE = "application/vnd.edgeward.residency.v1+json"

MAX_DECISIONS = 100
MAX_SPANS = 100

_canonical = msgspec.json.Encoder(order="deterministic")


class ResidencyPolicy(Struct, frozen=True):
    """What may leave each of a trend store's sites; a site that is not named lets nothing leave.

    Times are seconds since 1970. Nothing is forwarded by a policy that has expired.
    """

    issued_at: float
    expires_at: float
    sites: dict[str, Residency]


class Span(Struct, frozen=True, rename="camel"):
    """Of one device's epoch: numbers within `first_seq .. last_seq`, of which so many rows were `forwarded`, so
    many `withheld`, and so many `lost` before (their gaps were forwarded)."""

    device: str
    epoch: str
    first_seq: int
    last_seq: int
    forwarded: int
    withheld: int
    lost: int


class Decision(Struct, frozen=True, rename="camel"):
    """What a store decided for one lane of one site by one policy between `since` and `until` (seconds, 1970).

    `policy` is the SHA-256 of the site's Residency. A number that is sent again counts once for each policy.
    `chain` tells one store's logs apart (microseconds since 1970 when it began), `number` counts from 1 in it,
    `previous` is the digest of the record before, empty in the first.
    """

    chain: int
    number: int
    previous: str
    since: float
    until: float
    site: str
    lane: Lane
    policy: str
    forwarded: int
    withheld: int
    lost: int
    bytes: int
    spans: list[Span]


class Decisions(Struct, frozen=True):
    """What a store reports: records in the order of their numbers, at most MAX_DECISIONS."""

    decisions: list[Decision]


def encode(message: Struct) -> bytes:
    return _canonical.encode(message)


def digest(item: Residency | Decision) -> str:
    """SHA-256 of its canonical JSON."""
    return sha256_hex(_canonical.encode(item))
