"""Whose time it is that passes while a device is on its way to a rollout's model. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from edgeward.wire.desired import ModelRef
from edgeward.wire.reports import Phase, SlotReport, WaitReason
from edgeward.wire.resources import WaveStatus

_PHASES = (Phase.PENDING, Phase.STAGED, Phase.HELD)
_REASONS = frozenset(WaitReason)


def waits(slot: SlotReport | None, target: ModelRef, now: float) -> bool:
    """Whether the device is kept from going on by its site's hours or people, or by the time that its policy gives
    a run without acting, and so is not late."""
    if slot is None or slot.target != target:
        return False
    if slot.phase is Phase.SHADOW:
        return slot.deadline is not None and now < slot.deadline
    if slot.phase not in _PHASES:
        return False
    # Silent since its window has opened: from then on it is late all the same.
    return slot.reason in _REASONS and (slot.deadline is None or now < slot.deadline)


def excused(
    before: Mapping[str, float | None],
    reports: Mapping[str, SlotReport | None],
    target: ModelRef,
    now: float,
) -> dict[str, float | None]:
    """WaveStatus.excused after a look at the wave's devices; the same again until one of them changes."""
    after: dict[str, float | None] = {}
    for name, slot in reports.items():
        if waits(slot, target, now):
            after[name] = None
        elif name in before:
            since = before[name]
            after[name] = now if since is None else since
    return after


def elapsed(wave: WaveStatus, device: str, now: float) -> float:
    """Seconds of a device's deadline that are over."""
    began = wave.excused.get(device, wave.started_at)
    return 0.0 if began is None else now - max(wave.started_at, began)


def told(
    wave: WaveStatus, reports: Mapping[str, SlotReport | None], missing: list[str], lacking: str
) -> tuple[str, str]:
    """Reason and message of a wave under way: the first waiting device's where all that are `missing` wait."""
    stays = [name for name in missing if name in wave.excused and wave.excused[name] is None]
    slot = reports[stays[0]] if stays else None
    if slot is None:
        return "WaveInProgress", lacking
    reason = slot.reason if len(stays) == len(missing) else "WaveInProgress"
    return reason, f"{lacking} ({stays[0]}: {slot.message or slot.reason})"
