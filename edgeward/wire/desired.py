"""DesiredState: the whole of what one device shall run. Signed by the controller (DSSE), never a delta."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from edgeward.wire.schedule import ActivationTerms, Delivery
from edgeward.wire.slots import SlotPolicy
from edgeward.wire.streams import StreamSpec

PAYLOAD_TYPE = "application/vnd.edgeward.desired.v1+json"


class ModelRef(Struct, frozen=True):
    """A released model version; `digest` is the SHA-256 of its manifest."""

    model: str
    version: int
    digest: str


class SlotTarget(Struct, frozen=True):
    """What a model slot shall hold: the acting model and, if set, a candidate that runs without acting.

    `terms` say when `active` may take over; it is fetched and verified before that.
    """

    active: ModelRef
    shadow: ModelRef | None = None
    policy: SlotPolicy = SlotPolicy()
    terms: ActivationTerms = ActivationTerms()


class StreamTarget(Struct, frozen=True):
    """A stream to run. `revision` is the Stream resource's generation, kept in every row it makes."""

    name: str
    revision: int
    spec: StreamSpec


class DesiredState(Struct, frozen=True):
    """`generation` grows with every change and never goes back, a roll-back included.

    `issued_at` and `expires_at` are seconds since 1970. After `expires_at` a device refuses to
    *apply* this state; what it already runs goes on.
    """

    site: str
    device: str
    generation: int
    issued_at: float
    expires_at: float
    slots: dict[str, SlotTarget]
    streams: list[StreamTarget]
    policies: dict[str, Any] = {}
    delivery: Delivery = Delivery()


encode = msgspec.json.Encoder().encode
