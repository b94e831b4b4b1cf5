"""What a device shall run and how it is doing: pure functions over resources and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from edgeward.storage import sha256_hex
from edgeward.wire.desired import DesiredState, ModelRef, SlotTarget, StreamTarget
from edgeward.wire.lanes import LanePolicy
from edgeward.wire.reports import Phase, SlotReport
from edgeward.wire.slots import SlotPolicy
from edgeward.wire.topics import Lane

DESIRED_LIFETIME = 7 * 86400.0
REISSUE_BEFORE = 2 * 86400.0
#: Without a message for this long a device counts as offline: a broker that was killed delivers no will.
SILENCE = 180.0

_canonical = msgspec.json.Encoder(order="deterministic")


def matches(labels: dict[str, str], match_labels: dict[str, str]) -> bool:
    return match_labels.items() <= labels.items()


def content_digest(
    slots: dict[str, SlotTarget], streams: list[StreamTarget], policies: Mapping[str, Any] | None = None
) -> str:
    """Identifies what a desired state says, apart from its generation and times."""
    said: list[Any] = [slots, streams]
    if policies:  # else as before there were any, so that no device gets a new generation for nothing
        said.append(policies)
    return sha256_hex(_canonical.encode(said))


def compose(
    site: str,
    device: str,
    generation: int,
    now: float,
    models: dict[str, ModelRef],
    streams: list[StreamTarget],
    policies: Mapping[str, SlotPolicy] | None = None,
    outbox: Mapping[Lane, LanePolicy] | None = None,
) -> DesiredState:
    """`models` and `policies` by slot; a slot without a policy runs by the default one, an `outbox` lane too."""
    default, policies = SlotPolicy(), policies or {}
    return DesiredState(
        site=site,
        device=device,
        generation=generation,
        issued_at=now,
        expires_at=now + DESIRED_LIFETIME,
        slots={
            slot: SlotTarget(active=model, policy=policies.get(slot, default))
            for slot, model in sorted(models.items())
        },
        streams=sorted(streams, key=lambda stream: stream.name),
        policies={"outbox": msgspec.to_builtins(outbox)} if outbox else {},
    )


def slots_of(status: dict[str, Any]) -> dict[str, SlotReport]:
    """The slot reports that a Device's status keeps as builtins."""
    slots: dict[str, SlotReport] = msgspec.convert(status.get("slots", {}), type=dict[str, SlotReport])
    return slots


def device_state(status: dict[str, Any], models: dict[str, ModelRef], generation: int) -> str:
    """UpToDate, Updating, OutOfDate or Error.

    `models` is what each slot shall hold, `generation` that of the newest desired state.
    """
    slots = slots_of(status)
    if any(report.phase in (Phase.QUARANTINED, Phase.DEGRADED) for report in slots.values()):
        return "Error"
    behind = status.get("observedGeneration", 0) < generation
    if behind and status.get("connection") != "Online":
        return "OutOfDate"
    if behind:
        return "Updating"
    for slot, model in models.items():
        report = slots.get(slot)
        running = report.running if report else None
        if (
            report is None
            or report.phase != Phase.ACTIVE
            or running is None
            or running.digest != model.digest
        ):
            return "Updating"
    return "UpToDate"


def worst_psi(report: Mapping[str, Any] | None, digest: str) -> float | None:
    """The largest PSI of any feature that a report gives for a model; None when it gives none."""
    figures = [
        psi
        for stream in (report or {}).get("streams", [])
        if stream["digest"] == digest
        for psi in stream["psi"].values()
    ]
    return max(figures, default=None)
