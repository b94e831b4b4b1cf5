"""Policies and rollouts change as they like: what devices are told comes to rest, at what they can run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from controller.rollouts.plan import Seen, plan, predecessor
from edgeward.wire.desired import ModelRef
from edgeward.wire.reports import Phase, SlotReport
from edgeward.wire.resources import Gate, RolloutSpec, RolloutStatus, Wave

MODELS = tuple(ModelRef("m", version, str(version) * 64) for version in (1, 2, 3))
POLICIES = ("any", "cuda", "tight")
ROUNDS = 60

Wish = tuple[ModelRef, str]


@dataclass
class Device:
    """As the agent does: what runs goes on running until its successor has passed, and a refusal stands for
    as long as its wish does. `lasting` holds digests that no policy helps, `refused` those it helps."""

    lasting: frozenset[str] = frozenset()
    refused: frozenset[tuple[str, str]] = frozenset()
    running: Wish | None = None
    wish: Wish | None = None
    quarantined: frozenset[str] = frozenset()
    generations: int = 0

    def told(self, wish: Wish | None) -> None:
        if wish != self.wish:
            self.wish = wish
            self.generations += 1

    def report(self) -> SlotReport | None:
        runs = self.running[0] if self.running else None
        if self.wish is None:
            return SlotReport(Phase.ACTIVE, running=runs) if runs else None
        model, policy = self.wish
        if model.digest in self.lasting:
            self.quarantined |= {model.digest}
        if self.wish != self.running and (
            model.digest in self.quarantined or (model.digest, policy) in self.refused
        ):
            return SlotReport(Phase.QUARANTINED, "NotRunnable", target=model, running=runs)
        self.running = self.wish
        return SlotReport(Phase.ACTIVE, target=model, running=model)


@dataclass
class Controller:
    """The reconciler's pass over one fleet and slot, without its database."""

    devices: dict[str, Device] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)
    rollouts: list[tuple[RolloutSpec, RolloutStatus, ModelRef]] = field(default_factory=list)
    policy: str = POLICIES[0]
    now: float = 0.0

    def join(self, device: Device) -> None:
        name = f"d{len(self.devices)}"
        self.devices[name], self.seen[name] = device, Seen()

    def roll_out(self, model: ModelRef, success: float) -> None:
        spec = RolloutSpec(
            "f", "m", model.version, waves=[Wave(count=1), Wave(share=1.0)], gate=Gate(min_success=success)
        )
        self.rollouts.append((spec, RolloutStatus(), model))

    def step(self) -> None:
        complete = [at for at, (_, status, _) in enumerate(self.rollouts) if status.phase == "Complete"]
        for at, (spec, status, target) in enumerate(self.rollouts):
            if status.phase in ("Halted", "Superseded"):
                continue
            newer = "newer" if at < len(self.rollouts) - 1 else ""
            adopts = complete[-1:] == [at]
            made = plan(spec, status, target, self.seen, self.now, superseded_by=newer, adopts=adopts)
            self.rollouts[at] = spec, made.status, target
            for name, model in made.changes.items():
                before = self.seen[name]
                previous = predecessor(before) if model == target else None
                self.seen[name] = replace(before, assigned=model, previous=previous)
        for name, seen in self.seen.items():
            self.devices[name].told((seen.assigned, self.policy) if seen.assigned else None)
        self.now += 20.0

    def hear(self, name: str) -> None:
        device = self.devices[name]
        slot = device.report()
        self.seen[name] = replace(self.seen[name], slot=slot, quarantined=device.quarantined)


devices = st.builds(
    Device,
    lasting=st.frozensets(st.sampled_from([model.digest for model in MODELS]), max_size=1),
    refused=st.frozensets(
        st.tuples(st.sampled_from([model.digest for model in MODELS]), st.sampled_from(POLICIES)), max_size=6
    ),
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_after_the_last_change_what_devices_are_told_comes_to_rest(data: st.DataObject) -> None:
    controller = Controller()
    controller.join(data.draw(devices))
    for _ in range(data.draw(st.integers(1, 8), label="events")):
        match data.draw(st.sampled_from(["policy", "rollout", "join"])):
            case "policy":
                controller.policy = data.draw(st.sampled_from(POLICIES))
            case "rollout":
                controller.roll_out(
                    data.draw(st.sampled_from(MODELS)), data.draw(st.sampled_from([0.0, 0.5, 1.0]))
                )
            case "join" if len(controller.devices) < 4:
                controller.join(data.draw(devices))
        for _ in range(data.draw(st.integers(0, 4), label="rounds")):
            controller.step()
            for name in data.draw(st.sets(st.sampled_from(sorted(controller.devices)))):
                controller.hear(name)

    began = {name: device.generations for name, device in controller.devices.items()}
    rested = dict(began)
    for at in range(ROUNDS):
        controller.step()
        for name in controller.devices:
            controller.hear(name)
        if at == ROUNDS // 2:
            rested = {name: device.generations for name, device in controller.devices.items()}
    for name, device in controller.devices.items():
        assert device.generations == rested[name], "it is told something new for ever"
        # Each model may be tried and taken back once, and one more may be the one it stays with.
        assert device.generations - began[name] <= 2 * len(MODELS) + 1

    if controller.rollouts and controller.rollouts[-1][1].phase == "Complete":
        target = controller.rollouts[-1][2]
        for name, device in controller.devices.items():
            if target.digest in device.lasting:
                assert controller.seen[name].assigned != target
            elif (target.digest, controller.policy) not in device.refused:
                assert device.running == (target, controller.policy), "it can run it, so it does"


def test_a_refusal_under_a_changed_policy_stands_until_the_policy_changes_again() -> None:
    controller = Controller()
    device = Device(refused=frozenset({(MODELS[0].digest, "cuda")}))
    controller.join(device)
    controller.roll_out(MODELS[0], 1.0)
    for policy, phase in (("any", Phase.ACTIVE), ("cuda", Phase.QUARANTINED), ("any", Phase.ACTIVE)):
        before = device.generations
        controller.policy = policy
        for _ in range(10):
            controller.step()
            controller.hear("d0")
        slot = controller.seen["d0"].slot
        assert slot is not None and (slot.phase, slot.running) == (phase, MODELS[0])
        assert device.generations == before + 1 and controller.rollouts[0][1].phase == "Complete"


def test_a_failing_minority_is_told_once() -> None:
    controller = Controller()
    controller.join(Device())
    controller.join(Device(refused=frozenset({(MODELS[1].digest, "any")})))
    controller.join(Device())
    for model in MODELS[:2]:
        controller.roll_out(model, 0.5)
        for _ in range(10):
            controller.step()
            for name in controller.devices:
                controller.hear(name)
    assert controller.rollouts[1][1].phase == "Complete"
    refusing = controller.devices["d1"]
    assert refusing.generations == 2 and refusing.running == (MODELS[0], "any")


def test_nobody_goes_back_to_what_it_refused() -> None:
    refusal = SlotReport(Phase.QUARANTINED, "NotRunnable", target=MODELS[1], running=MODELS[0])
    refusing = Seen(slot=refusal, assigned=MODELS[1], previous=MODELS[0])
    assert predecessor(refusing) == MODELS[0]
    runs = SlotReport(Phase.ACTIVE, target=MODELS[1], running=MODELS[1])
    assert predecessor(replace(refusing, slot=runs)) == MODELS[1]
    assert predecessor(Seen()) is None


def test_who_joins_when_the_last_wave_passes_gets_the_new_model() -> None:
    """A fleet of one: the last wave has nobody left, passes as it starts, and ends the rollout with it."""
    controller = Controller()
    controller.join(Device())
    for model, waves in ((MODELS[0], 3), (MODELS[1], 2)):
        controller.roll_out(model, 1.0)
        for _ in range(waves):  # each starts in a step, and passes in the next
            controller.step()
            controller.hear("d0")
    assert [len(status.waves) for _, status, _ in controller.rollouts] == [2, 2]
    controller.join(Device())
    for _ in range(3):
        controller.step()
    assert controller.seen["d1"].assigned == MODELS[1]
