"""The planner: examples of each decision, and properties over random fleets."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.rollouts.plan import (
    ENDED,
    TRANSITIONS,
    Plan,
    Seen,
    Verdict,
    cumulative,
    forgiven,
    plan,
    verdict,
)
from edgeward.wire.desired import ModelRef
from edgeward.wire.reports import Phase, SlotReport
from edgeward.wire.resources import Gate, RolloutSpec, RolloutStatus, Wave

V1, V2 = ModelRef("m", 1, "1" * 64), ModelRef("m", 2, "2" * 64)


class Fleet:
    """Devices that do what they are told, except those named as failing or silent."""

    def __init__(
        self, size: int, failing: frozenset[str] = frozenset(), silent: frozenset[str] = frozenset()
    ):
        self.seen = {f"d{i:02}": Seen(assigned=V1) for i in range(size)}
        self.failing, self.silent = failing, silent
        self.touched: set[str] = set()

    def obey(self, made: Plan) -> None:
        for name, model in made.changes.items():
            before = self.seen[name]
            assert model is None or model.digest not in before.quarantined, (
                "a refused digest was pushed again"
            )
            if model == V2:
                self.touched.add(name)
            self.seen[name] = replace(
                before, assigned=model, previous=before.assigned if model == V2 else None
            )

    def report(self) -> None:
        for name, seen in self.seen.items():
            wish = seen.assigned
            if wish is None or name in self.silent:
                continue
            if wish == V2 and name in self.failing:
                slot = SlotReport(Phase.QUARANTINED, "SelfTestFailed", "off", 0.5, 0.1, target=V2, running=V1)
                self.seen[name] = replace(seen, slot=slot, quarantined=frozenset({V2.digest}))
            else:
                self.seen[name] = replace(seen, slot=SlotReport(Phase.ACTIVE, target=wish, running=wish))


def spec_of(waves: list[Wave], **more: object) -> RolloutSpec:
    return RolloutSpec(fleet="f", model="m", version=2, waves=waves, **more)  # type: ignore[arg-type]


CANARY = spec_of([Wave(count=1), Wave(share=1.0)])


def drive(
    spec: RolloutSpec, fleet: Fleet, steps: int = 200, status: RolloutStatus | None = None
) -> RolloutStatus:
    status, now = status or RolloutStatus(), 0.0
    for _ in range(steps):
        made = plan(spec, status, V2, fleet.seen, now)
        assert made.status.phase == status.phase or made.status.phase in TRANSITIONS[status.phase]
        status = made.status
        fleet.obey(made)
        if status.phase in ENDED:
            return status
        fleet.report()
        now += 10.0
    return status


waves = st.lists(st.integers(1, 12), max_size=3).map(
    lambda counts: [Wave(count=count) for count in sorted(counts)] + [Wave(share=1.0)]
)


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 12),
    waves=waves,
    failing=st.frozensets(st.integers(0, 11), max_size=4),
    silent=st.frozensets(st.integers(0, 11), max_size=3),
    success=st.sampled_from([0.5, 0.9, 1.0]),
    soak=st.sampled_from([0.0, 15.0]),
)
def test_it_never_touches_more_than_its_waves_allow_and_always_ends(
    size: int, waves: list[Wave], failing: frozenset[int], silent: frozenset[int], success: float, soak: float
) -> None:
    fleet = Fleet(
        size,
        frozenset(f"d{i:02}" for i in failing if i < size),
        frozenset(f"d{i:02}" for i in silent if i < size),
    )
    spec = spec_of(waves, gate=Gate(min_success=success, soak=soak), deadline=100.0)
    status, now = RolloutStatus(), 0.0
    for _ in range(200):
        before = status
        made = plan(spec, status, V2, fleet.seen, now)
        status = made.status
        fleet.obey(made)
        assert len(fleet.touched) <= cumulative(spec, max(0, len(status.waves) - 1), size)
        if len(status.waves) > len(before.waves) > 0:
            # A wave starts only when the share of the one before holds.
            done = before.waves[-1].devices
            ok = sum(verdict(fleet.seen[name], V2) is Verdict.SUCCEEDED for name in done)
            assert ok >= success * len(done) - 1e-9
        if status.phase in ENDED:
            break
        fleet.report()
        now += 10.0
    assert status.phase in ("Complete", "Halted")
    refused = {name for name, seen in fleet.seen.items() if seen.quarantined}
    for wave in status.waves:
        over = len(refused & set(wave.devices)) > forgiven(spec, len(wave.devices))
        assert not over or status.phase == "Halted"
    if status.phase == "Halted":
        assert status.reason and status.message
        assert all(fleet.seen[name].assigned == V1 for name in status.waves[-1].devices)
        assert plan(spec, status, V2, fleet.seen, now + 1e6).changes == {}  # untouched ones stay
    for name in refused:
        assert fleet.seen[name].assigned != V2


def test_the_canary_stops_the_rollout_with_the_device_s_reason() -> None:
    fleet = Fleet(5, failing=frozenset({"d00"}))
    status = drive(CANARY, fleet)
    assert (status.phase, status.reason) == ("Halted", "SelfTestFailed")
    event = next(line for line in status.timeline if line.reason == "SelfTestFailed")
    assert (event.device, event.measured, event.limit, event.wave) == ("d00", 0.5, 0.1, 0)
    assert fleet.touched == {"d00"} and fleet.seen["d00"].assigned == V1


def test_a_device_that_tries_the_target_without_acting_is_on_its_way() -> None:
    shadow = SlotReport(Phase.SHADOW, "Shadowing", target=V2, running=V1)
    assert verdict(Seen(slot=shadow), V2) is Verdict.WAITING
    assert verdict(Seen(slot=msgspec.structs.replace(shadow, phase=Phase.QUARANTINED)), V2) is Verdict.FAILED


def test_a_refusal_known_beforehand_touches_nobody() -> None:
    fleet = Fleet(3)
    fleet.seen["d02"] = replace(fleet.seen["d02"], quarantined=frozenset({V2.digest}))
    status = drive(spec_of([Wave(count=2), Wave(share=1.0)]), fleet)
    assert status.phase == "Halted" and status.reason == "Quarantined"
    assert fleet.touched == set()


def test_a_silent_canary_halts_at_the_deadline_with_what_was_measured() -> None:
    fleet = Fleet(2, silent=frozenset({"d00", "d01"}))
    status = drive(CANARY, fleet)
    assert (status.phase, status.reason) == ("Halted", "DeadlineExceeded")
    event = status.timeline[-2]
    assert event.measured is not None and event.limit == 600.0 and event.measured > event.limit
    assert "d00" in status.message


def test_soak_holds_the_next_wave_and_starts_over_when_lost() -> None:
    spec = spec_of([Wave(count=1), Wave(share=1.0)], gate=Gate(soak=60.0))
    fleet = Fleet(2)
    made = plan(spec, RolloutStatus(), V2, fleet.seen, 0.0)
    fleet.obey(made)
    fleet.report()
    made = plan(spec, made.status, V2, fleet.seen, 10.0)
    assert made.status.reason == "Soaking" and made.status.waves[0].held_since == 10.0
    lost = dict(fleet.seen)
    lost["d00"] = replace(lost["d00"], slot=SlotReport(Phase.DEGRADED, target=V2, running=V2))
    made = plan(spec, made.status, V2, lost, 50.0)
    assert made.status.waves[0].held_since is None
    made = plan(spec, made.status, V2, fleet.seen, 60.0)
    assert len(plan(spec, made.status, V2, fleet.seen, 119.0).status.waves) == 1
    assert len(plan(spec, made.status, V2, fleet.seen, 120.0).status.waves) == 2


@pytest.mark.parametrize(("psi", "phase"), [(0.4, "Halted"), (0.1, "Complete")])
def test_drift_above_the_limit_halts(psi: float, phase: str) -> None:
    fleet = Fleet(1)
    fleet.seen["d00"] = replace(fleet.seen["d00"], psi=psi)
    status = drive(spec_of([Wave(share=1.0)], gate=Gate(max_psi=0.25)), fleet)
    assert status.phase == phase
    if phase == "Halted":
        event = next(line for line in status.timeline if line.reason == "DriftAboveLimit")
        assert (event.measured, event.limit) == (0.4, 0.25)


def test_without_a_drift_figure_the_gate_does_not_open() -> None:
    status = drive(spec_of([Wave(share=1.0)], gate=Gate(max_psi=0.25)), Fleet(1))
    assert status.reason == "DeadlineExceeded" and "no drift figure" in status.message


def test_pausing_lets_begun_devices_finish_and_starts_no_wave() -> None:
    fleet = Fleet(3)
    made = plan(CANARY, RolloutStatus(), V2, fleet.seen, 0.0)
    fleet.obey(made)
    paused = msgspec.structs.replace(CANARY, paused=True)
    made = plan(paused, made.status, V2, fleet.seen, 1.0)
    assert made.status.phase == "Paused"
    fleet.report()
    for now in (2.0, 3.0, 10_000.0):
        made = plan(paused, made.status, V2, fleet.seen, now)
    assert made.status.phase == "Paused" and made.status.waves[0].passed_at is not None
    assert len(made.status.waves) == 1 and fleet.touched == {"d00"}
    assert drive(CANARY, fleet, status=made.status).phase == "Complete"


def test_a_newer_rollout_supersedes_and_an_empty_fleet_waits() -> None:
    made = plan(CANARY, RolloutStatus(), V2, Fleet(2).seen, 0.0, superseded_by="newer")
    assert made.status.phase == "Superseded" and made.changes == {}
    made = plan(CANARY, RolloutStatus(), V2, {}, 0.0)
    assert (made.status.phase, made.status.reason) == ("Pending", "NoDevices")


def test_devices_that_join_are_taken_in_by_the_last_wave_and_after_it() -> None:
    fleet = Fleet(2)
    made = plan(spec_of([Wave(share=1.0)]), RolloutStatus(), V2, fleet.seen, 0.0)
    fleet.obey(made)
    fleet.seen["new"] = Seen()
    made = plan(spec_of([Wave(share=1.0)]), made.status, V2, fleet.seen, 1.0)
    assert made.changes == {"new": V2}
    fleet.obey(made)
    status = drive(spec_of([Wave(share=1.0)]), fleet, status=made.status)
    assert status.phase == "Complete"
    later = {"later": Seen(), "refused": Seen(quarantined=frozenset({V2.digest}))}
    assert plan(CANARY, status, V2, later, 9.0, adopts=True).changes == {"later": V2}
    assert plan(CANARY, status, V2, later, 9.0).changes == {}


def test_a_wave_without_devices_is_not_soaked() -> None:
    """A fleet of one: the canary is everybody, and nobody is left to watch for another soak."""
    spec = spec_of([Wave(count=1), Wave(share=1.0)], gate=Gate(soak=30.0), deadline=600.0)
    status = drive(spec, Fleet(1))
    assert status.phase == "Complete"
    at = {(event.reason, event.wave): event for event in status.timeline}
    assert at["WavePassed", 0].at - at["WaveStarted", 0].at >= 30.0
    assert at["WavePassed", 1].at == at["WaveStarted", 1].at
    assert at["WaveStarted", 1].message == "m:2 to no further device"


# --- devices that wait for their site --------------------------------------------------------------


def staying(
    fleet: Fleet,
    name: str,
    phase: Phase = Phase.STAGED,
    reason: str = "MaintenanceWindow",
    opens: float | None = None,
) -> None:
    """The device has the target and reports that it waits."""
    slot = SlotReport(phase, reason, "the window opens later", target=V2, running=V1, deadline=opens)
    fleet.seen[name] = replace(fleet.seen[name], slot=slot)


def going_on(fleet: Fleet, name: str) -> None:
    fleet.seen[name] = replace(fleet.seen[name], slot=SlotReport(Phase.SELF_TEST, target=V2, running=V1))


class Rolling:
    """A rollout that is looked at again and again; it ends at the first look after its deadline of 600 s."""

    def __init__(self, spec: RolloutSpec, fleet: Fleet) -> None:
        self.spec, self.fleet, self.status = spec, fleet, RolloutStatus()

    def look(self, now: float) -> RolloutStatus:
        made = plan(self.spec, self.status, V2, self.fleet.seen, now)
        again = plan(self.spec, made.status, V2, self.fleet.seen, now)
        assert again.status == made.status, "the same once more: nothing to write"
        self.status = made.status
        self.fleet.obey(made)
        return self.status


@pytest.mark.parametrize(
    ("phase", "reason", "opens"),
    [
        (Phase.STAGED, "MaintenanceWindow", 40_000.0),
        (Phase.STAGED, "ActivationTime", 40_000.0),
        (Phase.PENDING, "BandwidthWindow", 40_000.0),
        (Phase.STAGED, "ClockUnknown", None),
        (Phase.HELD, "LocalHold", None),
        (Phase.HELD, "LocalHold", 40_000.0),
    ],
)
def test_the_deadline_counts_from_the_opening(phase: Phase, reason: str, opens: float | None) -> None:
    fleet = Fleet(2)
    rolling = Rolling(CANARY, fleet)
    rolling.look(0.0)
    staying(fleet, "d00", phase, reason, opens)
    for now in (10.0, 5_000.0, 39_999.0):
        status = rolling.look(now)
        assert (status.phase, status.reason) == ("Progressing", reason) and len(status.waves) == 1
        assert "d00: the window opens later" in status.message
    going_on(fleet, "d00")
    assert rolling.look(40_001.0).reason == "WaveInProgress"
    assert rolling.look(40_601.0).phase == "Progressing"
    status = rolling.look(40_602.0)
    assert (status.phase, status.reason) == ("Halted", "DeadlineExceeded")
    assert status.timeline[-2].measured == 601.0


def test_once_it_has_opened_the_rollout_goes_on() -> None:
    fleet = Fleet(2)
    rolling = Rolling(CANARY, fleet)
    rolling.look(0.0)
    staying(fleet, "d00", opens=9_000.0)
    rolling.look(8_000.0)
    fleet.report()
    assert len(rolling.look(9_010.0).waves) == 2 and rolling.status.waves[0].passed_at == 9_010.0
    rolling.look(9_011.0)
    staying(fleet, "d01", opens=20_000.0)
    rolling.look(19_000.0)
    fleet.report()
    assert rolling.look(20_010.0).phase == "Complete"


def test_a_device_that_is_silent_after_its_opening_is_late() -> None:
    fleet = Fleet(1)
    rolling = Rolling(CANARY, fleet)
    rolling.look(0.0)
    staying(fleet, "d00", opens=9_000.0)
    rolling.look(8_000.0)
    assert rolling.look(9_000.0).phase == "Progressing"
    assert rolling.look(9_601.0).reason == "DeadlineExceeded"


def test_who_does_not_wait_is_late_beside_others_that_do() -> None:
    fleet = Fleet(2)
    rolling = Rolling(spec_of([Wave(share=1.0)]), fleet)
    rolling.look(0.0)
    staying(fleet, "d00", Phase.HELD, "LocalHold")
    assert rolling.look(600.0).phase == "Progressing"
    status = rolling.look(601.0)
    assert (status.phase, status.reason) == ("Halted", "DeadlineExceeded")
    assert status.timeline[-2].device == "d01"


def test_a_wave_may_pass_without_a_held_device_where_its_gate_forgives_one() -> None:
    fleet = Fleet(4)
    rolling = Rolling(spec_of([Wave(share=1.0)], gate=Gate(min_success=0.75)), fleet)
    rolling.look(0.0)
    fleet.report()
    staying(fleet, "d03", Phase.HELD, "LocalHold")
    assert rolling.look(10.0).phase == "Complete"


@pytest.mark.parametrize(
    ("phase", "reason"),
    [(Phase.DOWNLOADING, "MaintenanceWindow"), (Phase.PENDING, "Unavailable"), (Phase.STAGED, "")],
)
def test_a_device_that_is_on_its_own_time_is_late(phase: Phase, reason: str) -> None:
    fleet = Fleet(1)
    rolling = Rolling(CANARY, fleet)
    rolling.look(0.0)
    staying(fleet, "d00", phase, reason)
    assert rolling.look(601.0).reason == "DeadlineExceeded"


def test_what_waits_with_another_model_is_no_excuse() -> None:
    fleet = Fleet(1)
    rolling = Rolling(CANARY, fleet)
    rolling.look(0.0)
    slot = SlotReport(Phase.HELD, "LocalHold", target=V1)
    fleet.seen["d00"] = replace(fleet.seen["d00"], slot=slot)
    assert rolling.look(601.0).reason == "DeadlineExceeded"
