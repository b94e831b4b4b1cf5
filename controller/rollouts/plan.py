"""The rollout planner: `(spec, status, what devices report, now) -> (new status, changes per device)`.

Pure: no clock, no database. Levels, not edges: asked again with the same input it answers the same.

A wave's devices get the target; the wave passes when `min_success` of them run it, through `soak`
seconds, with no drift above `max_psi`. It fails when more devices refuse the target than
`min_success` forgives, when drift is above the limit, or when `deadline` is over. Then the rollout
halts: devices of that wave go back to what they had, all others stay as they are.

A model that a device refuses whatever the policy (its digest is quarantined there) is taken back from
it. One that it refuses under the slot's present policy stays its wish while the rollout stands: the
device runs what it ran and says why, and takes the model once the policy or the device allows it.
Taken back, it would be given again as soon as the refusal no longer stands in the device's report.

The `deadline` runs for each device by itself. It does not run while the device waits for its site's hours, for
the activation time, or because somebody there holds it: until the instant that the device names, or, without
one, until it goes on. Such a device neither fails the wave nor passes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from controller.rollouts import waiting
from edgeward.wire.desired import ModelRef
from edgeward.wire.reports import Phase, SlotReport
from edgeward.wire.resources import RolloutEvent, RolloutSpec, RolloutStatus, WaveStatus

#: From each phase, where a rollout can go. Ended phases have no way out: a new try is a new rollout.
TRANSITIONS: dict[str, frozenset[str]] = {
    "Pending": frozenset({"Progressing", "Paused", "Superseded", "Halted"}),
    "Progressing": frozenset({"Paused", "Complete", "Halted", "Superseded"}),
    "Paused": frozenset({"Pending", "Progressing", "Complete", "Halted", "Superseded"}),
    "Complete": frozenset(),
    "Halted": frozenset(),
    "Superseded": frozenset(),
}
ENDED = frozenset(phase for phase, ways in TRANSITIONS.items() if not ways)

TIMELINE_KEPT = 200


@dataclass(frozen=True)
class Seen:
    """What is known of one device of the fleet, for the rollout's slot.

    `psi` is the largest drift figure it reported for the target, None without one; `assigned` and
    `previous` are the models that rollouts gave to its slot.
    """

    slot: SlotReport | None = None
    quarantined: frozenset[str] = frozenset()
    online: bool = True
    psi: float | None = None
    assigned: ModelRef | None = None
    previous: ModelRef | None = None


@dataclass(frozen=True)
class Plan:
    """`changes` maps a device to the model its slot shall hold from now on; None empties the slot."""

    status: RolloutStatus
    changes: dict[str, ModelRef | None] = field(default_factory=dict)


class Verdict(Enum):
    WAITING = "waiting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


def verdict(seen: Seen, target: ModelRef) -> Verdict:
    """Where one device stands on its way to the target."""
    slot = seen.slot
    if target.digest in seen.quarantined:
        return Verdict.FAILED
    if slot is None:
        return Verdict.WAITING
    if slot.phase == Phase.QUARANTINED and slot.target is not None and slot.target.digest == target.digest:
        return Verdict.FAILED
    running = slot.running is not None and slot.running.digest == target.digest
    if running and slot.phase == Phase.ACTIVE:
        return Verdict.SUCCEEDED
    return Verdict.WAITING


class _Draft:
    """A status under construction."""

    def __init__(self, status: RolloutStatus, now: float) -> None:
        self.status = status
        self.now = now

    def set(self, **values: object) -> None:
        self.status = msgspec.structs.replace(self.status, **values)

    def move(self, phase: str, reason: str = "", message: str = "") -> None:
        if phase != self.status.phase and phase not in TRANSITIONS[self.status.phase]:
            raise AssertionError(f"no way from {self.status.phase} to {phase}")
        self.set(phase=phase, reason=reason, message=message)

    def event(
        self,
        reason: str,
        message: str,
        *,
        device: str = "",
        measured: float | None = None,
        limit: float | None = None,
    ) -> None:
        line = RolloutEvent(
            self.now, reason, message, max(0, len(self.status.waves) - 1), device, measured, limit
        )
        self.set(timeline=[*self.status.timeline, line][-TIMELINE_KEPT:])

    def wave(self, **values: object) -> WaveStatus:
        """Change the newest wave."""
        changed: WaveStatus = msgspec.structs.replace(self.status.waves[-1], **values)
        self.set(waves=[*self.status.waves[:-1], changed])
        return changed


def plan(
    spec: RolloutSpec,
    status: RolloutStatus,
    target: ModelRef,
    fleet: Mapping[str, Seen],
    now: float,
    *,
    generation: int = 1,
    superseded_by: str = "",
    adopts: bool = False,
) -> Plan:
    """One step. `fleet` holds the devices that match now.

    `superseded_by` names a newer rollout of the same fleet and slot; `adopts` says that this complete
    rollout is the newest one, whose model also goes to devices that joined later.
    """
    draft = _Draft(status, now)
    draft.set(observed_generation=generation, devices=len(fleet))
    if status.phase in ENDED:
        draft.set(updated=_updated(fleet, target))
        return Plan(draft.status, _after(fleet, target, adopts) if status.phase == "Complete" else {})
    if superseded_by:
        draft.event("Superseded", f"rollout {superseded_by} goes to the same fleet and slot")
        draft.move("Superseded", "Superseded", f"by rollout {superseded_by}")
        return Plan(draft.status)
    draft.set(updated=_updated(fleet, target))
    changes = _step(spec, draft, target, fleet)
    return Plan(draft.status, changes)


def _updated(fleet: Mapping[str, Seen], target: ModelRef) -> int:
    return sum(verdict(seen, target) is Verdict.SUCCEEDED for seen in fleet.values())


def _after(fleet: Mapping[str, Seen], target: ModelRef, adopts: bool) -> dict[str, ModelRef | None]:
    """Once complete: newcomers get the model, and who refuses it late, whatever the policy, goes back."""
    changes: dict[str, ModelRef | None] = {}
    for name, seen in fleet.items():
        if verdict(seen, target) is Verdict.FAILED:
            if _taken_back(seen, target):
                changes[name] = _before(seen)
        elif adopts and seen.assigned is None:
            changes[name] = target
    return changes


def _step(
    spec: RolloutSpec, draft: _Draft, target: ModelRef, fleet: Mapping[str, Seen]
) -> dict[str, ModelRef | None]:
    _pause_or_resume(spec, draft)
    if draft.status.waves and (halted := _judge(spec, draft, target, fleet)) is not None:
        return halted
    waves = draft.status.waves
    due = not waves or (waves[-1].passed_at is not None and len(waves) < len(spec.waves))
    if due and not spec.paused:
        if not _start_wave(spec, draft, target, fleet):
            return {}
        # Judged at once: what is known to fail is not pushed to the others of its wave.
        if (halted := _judge(spec, draft, target, fleet)) is not None:
            return halted
    waves = draft.status.waves
    # In the step in which the last wave passes: who joins after it is a newcomer to a complete rollout.
    if len(waves) == len(spec.waves) and waves[-1].passed_at is not None:
        draft.event("Complete", f"{target.model}:{target.version} runs on the fleet")
        draft.move("Complete", "Complete", f"{draft.status.updated} of {len(fleet)} devices run it")
    return _assignments(draft, target, fleet)


def _pause_or_resume(spec: RolloutSpec, draft: _Draft) -> None:
    phase = draft.status.phase
    if spec.paused and phase != "Paused":
        draft.event("Paused", "no further wave starts until it is resumed")
        draft.move("Paused", "Paused", "no further wave starts until it is resumed")
    elif not spec.paused and phase == "Paused":
        draft.event("Resumed", "going on")
        draft.move("Progressing" if draft.status.waves else "Pending")
        if draft.status.waves and draft.status.waves[-1].passed_at is None:
            draft.wave(started_at=draft.now)  # the pause is not the devices' fault


def _start_wave(spec: RolloutSpec, draft: _Draft, target: ModelRef, fleet: Mapping[str, Seen]) -> bool:
    """Choose the next wave's devices. False when there is nobody to begin with."""
    if not fleet:
        draft.move("Pending" if not draft.status.waves else draft.status.phase, "NoDevices",
                   f"no device matches fleet {spec.fleet}")  # fmt: skip
        return False
    index = len(draft.status.waves)
    touched = {name for wave in draft.status.waves for name in wave.devices}
    reach = cumulative(spec, index, len(fleet))
    # Who refused this digest before comes first: the halt then costs nobody else a try.
    free = sorted(
        fleet.keys() - touched,
        key=lambda name: (target.digest not in fleet[name].quarantined, not fleet[name].online, name),
    )
    chosen = free[: max(0, reach - len(touched & fleet.keys()))]
    draft.set(waves=[*draft.status.waves, WaveStatus(devices=chosen, started_at=draft.now)])
    whom = (
        f"{len(chosen)} device{'s' * (len(chosen) != 1)}: {_names(chosen)}" if chosen else "no further device"
    )
    draft.event("WaveStarted", f"{target.model}:{target.version} to {whom}")
    draft.move("Progressing")
    return True


def cumulative(spec: RolloutSpec, index: int, devices: int) -> int:
    """How many of `devices` the waves up to `index` may touch together."""
    wave = spec.waves[index]
    wanted = wave.count if wave.count is not None else math.ceil((wave.share or 0.0) * devices - 1e-9)
    return min(devices, max(1, wanted))


def forgiven(spec: RolloutSpec, devices: int) -> int:
    """How many of a wave's devices may fail without failing the wave."""
    return math.floor((1 - spec.gate.min_success) * devices + 1e-9)


def _assignments(draft: _Draft, target: ModelRef, fleet: Mapping[str, Seen]) -> dict[str, ModelRef | None]:
    """Target for every touched device, back for those which refuse it for good; only what differs."""
    changes: dict[str, ModelRef | None] = {}
    for wave in draft.status.waves:
        for name in wave.devices:
            seen = fleet.get(name)
            if seen is None:
                continue
            if verdict(seen, target) is Verdict.FAILED:
                if _taken_back(seen, target):
                    changes[name] = _before(seen)
            elif seen.assigned != target:
                changes[name] = target
    return changes


def _taken_back(seen: Seen, target: ModelRef) -> bool:
    return seen.assigned == target and target.digest in seen.quarantined


def predecessor(seen: Seen) -> ModelRef | None:
    """What a device goes back to from the next model it gets: never one that it refuses."""
    if seen.assigned is not None and verdict(seen, seen.assigned) is Verdict.FAILED:
        return seen.previous
    return seen.assigned


def _before(seen: Seen) -> ModelRef | None:
    if seen.previous is None or seen.previous.digest in seen.quarantined:
        return None
    return seen.previous


def _judge(
    spec: RolloutSpec, draft: _Draft, target: ModelRef, fleet: Mapping[str, Seen]
) -> dict[str, ModelRef | None] | None:
    """Weigh the waves so far. Changes when the rollout halts, None when it goes on."""
    last = len(draft.status.waves) == len(spec.waves)
    wave = draft.status.waves[-1]
    if last and wave.passed_at is None:
        touched = {name for one in draft.status.waves for name in one.devices}
        joined = sorted(fleet.keys() - touched)
        if joined:  # the last wave reaches all, newcomers too
            wave = draft.wave(devices=[*wave.devices, *joined], held_since=None)
            draft.event("DevicesJoined", f"the last wave takes in {_names(joined)}")
    for one in draft.status.waves:
        present = [name for name in one.devices if name in fleet]
        failed = [name for name in present if verdict(fleet[name], target) is Verdict.FAILED]
        if len(failed) > forgiven(spec, len(present)):
            _count(draft, target, fleet)
            return _halt_on_failure(draft, target, fleet, failed)
    if wave.passed_at is not None:
        return None
    present, succeeded = _count(draft, target, fleet)
    drifted = _worst_drift(fleet, succeeded)
    limit = spec.gate.max_psi
    if limit is not None and drifted is not None and drifted[1] > limit:
        name, psi = drifted
        return _halt(
            draft, target, fleet, "DriftAboveLimit",
            f"{name} reports a PSI of {psi:.3f}, the limit is {limit:g}", name, psi, limit,
        )  # fmt: skip
    share = len(succeeded) / len(present) if present else 1.0
    unmeasured = [name for name in succeeded if fleet[name].psi is None] if limit is not None else []
    held = share >= spec.gate.min_success - 1e-9 and not unmeasured
    wave = draft.wave(
        held_since=(wave.held_since if wave.held_since is not None else draft.now) if held else None
    )
    soak = spec.gate.soak if present else 0.0  # there is nobody to watch in an empty wave
    if wave.held_since is not None and draft.now - wave.held_since >= soak:
        draft.wave(passed_at=draft.now)
        draft.event(
            "WavePassed", f"{len(succeeded)} of {len(present)} devices run {target.model}:{target.version}",
            measured=share, limit=spec.gate.min_success,
        )  # fmt: skip
        draft.set(reason="", message="")
        return None
    missing = [name for name in present if name not in succeeded]
    reports = {name: fleet[name].slot for name in present}
    wave = draft.wave(excused=waiting.excused(wave.excused, reports, target, draft.now))
    late = {
        name: elapsed
        for name in (*missing, *unmeasured)
        if (elapsed := waiting.elapsed(wave, name, draft.now)) > spec.deadline
    }
    overdue = [name for name in missing if name in late]
    lacking = (
        f"no drift figure yet from {_names(unmeasured)}" if unmeasured else f"waiting for {_names(missing)}"
    )
    lost = len(overdue) > forgiven(spec, len(present)) or any(name in late for name in unmeasured)
    if not held and not spec.paused and lost:
        return _halt(
            draft, target, fleet, "DeadlineExceeded",
            f"{len(succeeded)} of {len(present)} devices run it after {spec.deadline:g} s; {lacking}",
            overdue[0] if len(overdue) == 1 else "", max(late.values()), spec.deadline,
        )  # fmt: skip
    if not spec.paused:
        reason, message = (
            ("Soaking", f"held for {spec.gate.soak:g} s")
            if held
            else waiting.told(wave, reports, missing, lacking)
        )
        draft.set(reason=reason, message=message)
    return None


def _count(draft: _Draft, target: ModelRef, fleet: Mapping[str, Seen]) -> tuple[list[str], list[str]]:
    """Write the newest wave's figures; its devices that are still in the fleet, and those on the target."""
    present = [name for name in draft.status.waves[-1].devices if name in fleet]
    verdicts = {name: verdict(fleet[name], target) for name in present}
    succeeded = [name for name in present if verdicts[name] is Verdict.SUCCEEDED]
    failed = sum(found is Verdict.FAILED for found in verdicts.values())
    draft.wave(succeeded=len(succeeded), failed=failed)
    return present, succeeded


def _worst_drift(fleet: Mapping[str, Seen], devices: list[str]) -> tuple[str, float] | None:
    figures = [(name, psi) for name in devices if (psi := fleet[name].psi) is not None]
    return max(figures, key=lambda pair: pair[1], default=None)


def _halt_on_failure(
    draft: _Draft, target: ModelRef, fleet: Mapping[str, Seen], failed: list[str]
) -> dict[str, ModelRef | None]:
    """Halt with the reason that the first device with one gives."""
    for name in failed:
        slot = fleet[name].slot
        if (
            slot is not None
            and slot.reason
            and slot.target is not None
            and slot.target.digest == target.digest
        ):
            return _halt(
                draft, target, fleet, slot.reason, f"{name}: {slot.message or slot.reason}", name,
                slot.measured, slot.limit,
            )  # fmt: skip
    return _halt(
        draft, target, fleet, "Quarantined",
        f"{_names(failed)} refused {target.model}:{target.version} before", failed[0], None, None,
    )  # fmt: skip


def _halt(
    draft: _Draft,
    target: ModelRef,
    fleet: Mapping[str, Seen],
    reason: str,
    message: str,
    device: str,
    measured: float | None,
    limit: float | None,
) -> dict[str, ModelRef | None]:
    """End the rollout; the newest wave's devices, and any that failed, go back to what they had."""
    draft.event(reason, message, device=device, measured=measured, limit=limit)
    back: dict[str, ModelRef | None] = {}
    for index, wave in enumerate(draft.status.waves):
        newest = index == len(draft.status.waves) - 1
        for name in wave.devices:
            seen = fleet.get(name)
            if seen is None or seen.assigned != target:
                continue
            if newest or verdict(seen, target) is Verdict.FAILED:
                back[name] = _before(seen)
    if back:
        draft.event("RolledBack", f"back to the model before: {_names(sorted(back))}")
    draft.move("Halted", reason, _with_figures(message, measured, limit))
    return back


def _with_figures(message: str, measured: float | None, limit: float | None) -> str:
    if measured is None:
        return message
    return f"{message} [measured {measured:g}{'' if limit is None else f', limit {limit:g}'}]"


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
