"""How much of each outbox lane a device keeps while the trend store is away, and what gives way first."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from edgeward.wire.spec import Seconds, SpecStruct
from edgeward.wire.topics import Lane

DAY = 86_400.0
MIB = 1 << 20


class LanePolicy(SpecStruct, frozen=True):
    """One lane of a Fleet's `spec.outbox`, carried to the device in its desired state.

    `bytes` is the lane's budget on the device. While all lanes together stay within the sum of their
    budgets nothing is evicted; beyond it the lanes that exceed their own budget give way, those of the
    lowest `priority` first. Only then does a lane of higher priority take room from the others, and the
    highest one loses rows last of all.

    `time_to_live` is how long a row is worth sending, in seconds that the agent ran: a device that was
    switched off, or whose clock jumped, loses nothing by it. With `fsync: before-send` a power cut may cost
    the rows of the last moments (a kill never does), which spares the disk; those that left the device are
    safe either way.
    """

    bytes: Annotated[int, Meta(ge=64 << 10, le=1 << 44)] = 64 * MIB
    time_to_live: Seconds = 30 * DAY
    priority: Annotated[int, Meta(ge=0, le=100)] = 10
    fsync: Literal["every-commit", "before-send"] = "every-commit"


#: What a device does that was told nothing else.
DEFAULT_POLICIES: dict[Lane, LanePolicy] = {
    "alarm": LanePolicy(bytes=32 * MIB, time_to_live=365 * DAY, priority=40),
    "trend": LanePolicy(bytes=64 * MIB, time_to_live=365 * DAY, priority=30),
    "sample": LanePolicy(bytes=64 * MIB, time_to_live=7 * DAY, priority=20),
    "result": LanePolicy(bytes=256 * MIB, time_to_live=30 * DAY, priority=10),
}
