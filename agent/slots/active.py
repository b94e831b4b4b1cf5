"""What runs in a slot, as streams and local servers see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from agent.runtime.port import Runner
from agent.slots.drift import ScoreBins
from agent.slots.guard import Guard, Health
from agent.slots.opened import Opened
from agent.slots.shadow import Side, score_output
from agent.slots.tap import Tap
from agent.streams.sketches import LiveBaseline
from agent.verify import VerifiedPackage
from edgeward.clock import Clock
from edgeward.wire.desired import ModelRef
from edgeward.wire.reports import Condition
from edgeward.wire.slots import SlotPolicy


@dataclass(frozen=True)
class ActiveModel:
    """A verified package, ready to infer; `live` collects what its drift figure is made of.

    `condition` is what the device shall tell of the provider it runs on. Who asks the model counts in
    `health` how that went, and offers what it answered to the shadow at its `tap`, if there is one.
    """

    package: VerifiedPackage
    runner: Runner
    live: LiveBaseline
    policy: SlotPolicy = field(default_factory=SlotPolicy)
    condition: Condition | None = None
    health: Health = field(default_factory=Health)
    guard: Guard | None = None
    tap: Tap = field(default_factory=Tap)

    @property
    def ref(self) -> ModelRef:
        return self.package.ref

    @property
    def score(self) -> str:
        """The output that the model is judged by; empty without any of numbers."""
        decision = self.package.manifest.decision
        return score_output(Side(self.runner.outputs, decision))


def make_active(opened: Opened, policy: SlotPolicy, clock: Clock) -> ActiveModel:
    condition = opened.condition
    if condition is not None and not condition.last_transition_time:
        condition = msgspec.structs.replace(condition, last_transition_time=clock.now())
    live = LiveBaseline(opened.package.manifest.baseline)
    health = Health()
    if policy.guard.output_drift is not None:
        health.scores = ScoreBins()
    guard = Guard(policy.guard)
    return ActiveModel(opened.package, opened.runner, live, policy, condition, health, guard)


def conditions(active: Mapping[str, ActiveModel]) -> list[Condition]:
    """What is unusual about what runs, by slot: one condition of each type, naming the slots."""
    by_type: dict[str, Condition] = {}
    for slot, model in sorted(active.items()):
        found = model.condition
        if found is None:
            continue
        first = by_type.get(found.type)
        message = f"slot {slot}: {found.message}"
        by_type[found.type] = (
            msgspec.structs.replace(found, message=message)
            if first is None
            else msgspec.structs.replace(
                first,
                message=f"{first.message}; {message}",
                last_transition_time=max(first.last_transition_time, found.last_transition_time),
            )
        )
    return list(by_type.values())
