"""What a device shall run and how it is doing: pure functions over resources and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from edgeward.storage import sha256_hex
from edgeward.wire.desired import DesiredState, ModelRef, SlotTarget, StreamTarget
from edgeward.wire.lanes import LanePolicy
from edgeward.wire.reports import Phase, SlotReport
from edgeward.wire.resources import FleetSpec, RolloutSpec, SiteSpec
from edgeward.wire.schedule import ActivationTerms, Delivery
from edgeward.wire.slots import SlotPolicy
from edgeward.wire.topics import Lane

DESIRED_LIFETIME = 7 * 86400.0
REISSUE_BEFORE = 2 * 86400.0
#: Without a message for this long a device counts as offline: a broker that was killed delivers no will.
SILENCE = 180.0

_canonical = msgspec.json.Encoder(order="deterministic")


def matches(labels: dict[str, str], match_labels: dict[str, str]) -> bool:
    return match_labels.items() <= labels.items()


def content_digest(desired: DesiredState) -> str:
    """Identifies what a desired state says, apart from its generation and times."""
    said = [desired.slots, desired.streams, desired.delivery, desired.policies]
    return sha256_hex(_canonical.encode(said))


def compose(
    site: str,
    device: str,
    generation: int,
    now: float,
    models: dict[str, ModelRef],
    streams: list[StreamTarget],
    policies: Mapping[str, SlotPolicy] | None = None,
    terms: Mapping[str, ActivationTerms] | None = None,
    delivery: Delivery | None = None,
    shadows: Mapping[str, ModelRef] | None = None,
    outbox: Mapping[Lane, LanePolicy] | None = None,
) -> DesiredState:
    """`models`, `policies`, `terms` and `shadows` by slot; a slot without a policy runs by the default one,
    an `outbox` lane too.

    A shadow that is the slot's own model has nothing to show.
    """
    default, policies, terms, shadows = SlotPolicy(), policies or {}, terms or {}, shadows or {}
    return DesiredState(
        site=site,
        device=device,
        generation=generation,
        issued_at=now,
        expires_at=now + DESIRED_LIFETIME,
        slots={
            slot: SlotTarget(
                active=model,
                shadow=beside if (beside := shadows.get(slot)) != model else None,
                policy=policies.get(slot, default),
                terms=terms.get(slot, ActivationTerms()),
            )
            for slot, model in sorted(models.items())
        },
        streams=sorted(streams, key=lambda stream: stream.name),
        delivery=delivery or Delivery(),
        policies={"outbox": msgspec.to_builtins(outbox)} if outbox else {},
    )


def terms_of(
    site: SiteSpec, fleet: FleetSpec | None, rollout: RolloutSpec | None, model: ModelRef
) -> ActivationTerms:
    """When a device may switch a slot to `model`. A rollout's time is for its own model, not for the way back."""
    at = None
    if rollout is not None and rollout.activate_at is not None:
        at = rollout.activate_at.timestamp() if _is_of(model, rollout) else None
    maintenance = fleet.maintenance if fleet is not None else None
    return ActivationTerms(at=at, maintenance=maintenance or site.maintenance)


def _is_of(model: ModelRef, rollout: RolloutSpec) -> bool:
    return (model.model, model.version) == (rollout.model, rollout.version)


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
