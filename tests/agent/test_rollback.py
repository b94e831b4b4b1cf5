"""A model that breaks its guard gives way to its predecessor: at once, without a network, and for good."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.fetch import NoRoom
from agent.slots.guard import Guard
from agent.slots.opened import Setup
from agent.slots.slots import Slots
from agent.state import State
from edgeward.clock import SystemClock
from edgeward.errors import DigestMismatch, TrustError
from edgeward.wire.desired import ModelRef, SlotTarget
from edgeward.wire.reports import Phase, SlotReport
from edgeward.wire.slots import GuardPolicy, SlotPolicy

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
Build = Callable[..., Slots]


@pytest.fixture
def open_slots(tmp_path: Path, releaser: Any, engine: Any) -> Iterator[Build]:
    made: list[Slots] = []

    def build(state: State | None = None) -> Slots:
        state = state or State(tmp_path / "state.db")
        setup = Setup(machine="here", compiled=tmp_path / "compiled", seconds=0.1)
        slots = Slots(state, releaser, engine, {"onnx": "onnxruntime 1"}, SystemClock(), lambda: None, setup)
        engine._events = type(engine._events)(
            lambda name, losses, seconds: slots.crash_looped(name, losses, seconds), slots.recovered
        )
        slots.start()
        made.append(slots)
        return slots

    yield build
    for slots in made:
        slots.stop()


def wish(slots: Slots, ref: ModelRef, **guard: Any) -> None:
    policy = SlotPolicy(guard=GuardPolicy(**{"minimum": 10, **guard}))
    slots.wish({"default": SlotTarget(ref, policy=policy)})


def report(slots: Slots) -> SlotReport:
    return slots.report()["default"]


def active(slots: Slots, ref: ModelRef, until: Any) -> Any:
    return until(lambda: (model := slots.active("default")) is not None and model.ref == ref and model)


def one_after_the_other(
    slots: Slots, releaser: Any, models: Any, until: Any
) -> tuple[ModelRef, ModelRef, Any]:
    """Two versions that both ran; the second one does, and is what comes third."""
    good = releaser.release(1, ("only", models["fast"]))
    bad = releaser.release(2, ("only", models["slow"]))
    for ref in (good, bad):
        wish(slots, ref)
        model = active(slots, ref, until)
    return good, bad, model


def works(slots: Slots) -> bool:
    model = slots.active("default")
    assert model is not None
    return bool(np.array_equal(model.runner.infer({"x": ROWS})["y"], ROWS * 2))


@pytest.mark.parametrize(
    ("guard", "reason", "measured"),
    [
        ({}, "GuardErrorRate", 0.9),
        ({"error_rate": None}, "GuardNanRate", 1.0),
        ({"error_rate": None, "nan_rate": None, "alarm_rate": 0.1}, "GuardAlarmRate", 0.5),
        ({"error_rate": None, "nan_rate": None, "latency_ms": 100.0}, "GuardLatency", 500.0),
    ],
)
def test_a_breach_brings_the_predecessor_back_offline_and_across_restarts(
    open_slots: Build, releaser: Any, models: Any, until: Any, tmp_path: Path, guard: dict[str, Any], reason: str,
    measured: float,
) -> None:  # fmt: skip
    slots = open_slots()
    good = releaser.release(1, ("only", models["fast"]))
    bad = releaser.release(2, ("only", models["slow"]))
    wish(slots, good)
    active(slots, good, until)
    wish(slots, bad, **guard)
    model = active(slots, bad, until)
    assert report(slots).previous == good
    releaser.offline = True
    model.health.note(500_000_000, 10)
    model.health.failed, model.health.not_finite, model.health.alarms = 90, 10, 5
    active(slots, good, until)
    got = until(lambda: (now := report(slots)).phase is Phase.QUARANTINED and now)
    assert (got.reason, got.target, got.running, got.previous) == (reason, bad, good, None)
    assert got.measured == pytest.approx(measured, rel=0.1) and got.limit is not None and works(slots)
    wish(slots, bad, **guard)
    wish(slots, bad, **guard, window=30.0)
    assert (report(slots).phase, report(slots).running) == (Phase.QUARANTINED, good)

    slots.stop()
    again = open_slots(State(tmp_path / "state.db"))
    wish(again, bad, **guard)
    after = report(again)
    assert (after.phase, after.reason, after.running) == (Phase.QUARANTINED, reason, good)
    assert (after.measured, after.limit, after.since) == (
        got.measured,
        got.limit,
        pytest.approx(got.since, abs=5),
    )
    assert works(again)


def test_scores_that_drift_bring_the_predecessor_back(
    open_slots: Build, releaser: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    good = releaser.release(1, ("only", models["fast"]))
    bad = releaser.release(2, ("only", models["slow"]))
    wish(slots, good)
    assert active(slots, good, until).health.scores is None, "nobody asked for it"
    wish(slots, bad, output_drift=0.25)
    model = active(slots, bad, until)
    random = np.random.default_rng(5)
    model.health.note_scores(random.normal(0, 1, 1500))
    model.health.note(1_000_000, 1500)
    until(
        lambda: (
            len(model.guard._marks) and model.guard.look(model.health, slots._board.clock.monotonic()) is None
        )
    )
    assert report(slots).running == bad
    model.health.note_scores(random.normal(2, 1, 1500))
    model.health.note(1_000_000, 1500)
    active(slots, good, until)
    got = until(lambda: (now := report(slots)).phase is Phase.QUARANTINED and now)
    assert (got.reason, got.limit) == ("GuardOutputDrift", 0.25) and got.measured > 0.25 and works(slots)


def test_without_a_predecessor_it_goes_on_degraded_until_it_is_well(
    open_slots: Build, releaser: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    only = releaser.release(1, ("only", models["fast"]))
    wish(slots, only, window=1.0)
    model = active(slots, only, until)
    model.health.failed += 50
    got = until(lambda: (now := report(slots)).phase is Phase.DEGRADED and now)
    assert (got.reason, got.running) == ("GuardErrorRate", only) and "no model to go back to" in got.message
    assert works(slots) and not slots._state.quarantined()
    recovered = until(lambda: (now := report(slots)).phase is Phase.ACTIVE and now)
    assert recovered.reason == "Recovered"


def test_a_predecessor_that_cannot_run_is_no_way_out(
    open_slots: Build, releaser: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    good, bad, model = one_after_the_other(slots, releaser, models, until)
    releaser.blobs[releaser.manifests[good.digest].variants[0].blob.digest] = b"damaged"
    model.health.failed += 50
    got = until(lambda: (now := report(slots)).phase is Phase.DEGRADED and now)
    assert got.running == bad and "cannot run: damaged" in got.message and works(slots)
    assert not slots._state.quarantined()


def test_a_crash_loop_brings_the_predecessor_back(
    open_slots: Build, releaser: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    good, bad, model = one_after_the_other(slots, releaser, models, until)
    killed: set[int] = set()

    def kill() -> bool:
        pid = model.runner.pid
        if pid is not None and pid not in killed:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        return report(slots).running == good

    until(kill)
    got = until(lambda: (now := report(slots)).phase is Phase.QUARANTINED and now)
    assert (got.reason, got.target, got.measured) == ("CrashLoop", bad, float(len(killed))) and works(slots)


def test_a_newer_wish_is_not_touched_by_the_fall_of_the_model_before_it(
    open_slots: Build, releaser: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    good, bad, model = one_after_the_other(slots, releaser, models, until)
    releaser.offline = True
    newest = releaser.release(3, ("only", models["fast"]), outputs=ROWS * 2, inputs=ROWS)
    wish(slots, newest)
    until(lambda: report(slots).reason == "Unavailable")
    model.health.failed += 50
    active(slots, good, until)
    assert report(slots).target == newest and report(slots).phase is not Phase.QUARANTINED
    releaser.offline = False
    active(slots, newest, until)
    assert list(slots._state.quarantined()) == [bad.digest]


@pytest.mark.parametrize("error", [DigestMismatch, TrustError])
def test_what_the_link_did_is_not_held_against_a_release(
    open_slots: Build, releaser: Any, models: Any, until: Any, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    slots = open_slots()
    ref = releaser.release(1, ("only", models["fast"]))
    fetch, broken = releaser.fetch_manifest, [True]

    def flaky(wanted: ModelRef) -> Any:
        if broken[0]:
            raise error("not what was signed")
        return fetch(wanted)

    monkeypatch.setattr(releaser, "fetch_manifest", flaky)
    wish(slots, ref)
    got = until(lambda: (now := report(slots)).reason == error.__name__ and now)
    assert got.phase is Phase.PENDING and got.deadline and not slots._state.quarantined()
    broken[0] = False
    active(slots, ref, until)


def test_a_disk_that_cannot_take_the_verdict_does_not_load_the_predecessor_at_every_look(
    open_slots: Build, releaser: Any, models: Any, until: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(State):
        tries, full = 0, True

        def roll_back(self, *arguments: Any) -> None:
            self.tries += 1
            if self.full:
                raise sqlite3.OperationalError("database or disk is full")
            super().roll_back(*arguments)

    state = Full(tmp_path / "full.db")
    slots = open_slots(state)
    good, bad, model = one_after_the_other(slots, releaser, models, until)
    looks = []
    look = Guard.look
    monkeypatch.setattr(Guard, "look", lambda *given: (looks.append(1), look(*given))[1])
    model.health.failed += 50
    until(lambda: state.tries)
    seen = len(looks)
    until(lambda: len(looks) > seen + 3)
    assert state.tries == 1 and report(slots).running == bad and works(slots)
    assert report(slots).phase is Phase.ROLLING_BACK
    state.full = False
    slots._care._again_at.clear()
    active(slots, good, until)
    assert list(state.quarantined()) == [bad.digest]


def test_a_predecessor_that_the_disk_does_not_give_now_is_asked_for_again(
    open_slots: Build, releaser: Any, models: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = open_slots()
    good, bad, model = one_after_the_other(slots, releaser, models, until)

    def broken(ref: ModelRef) -> Any:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as disk:
        disk.setattr(releaser, "reopen_manifest", broken)
        model.health.failed += 50
        until(lambda: slots._care._again_at)
        assert report(slots).running == bad and report(slots).phase is Phase.ROLLING_BACK
    slots._care._again_at.clear()
    active(slots, good, until)


def test_both_or_neither_of_the_verdict_and_the_record_are_written(tmp_path: Path) -> None:
    from agent.lifecycle import Verdict
    from agent.state import SlotRecord

    class Full(State):
        def _condemn(self, digest: str, verdict: Verdict) -> None:
            super()._condemn(digest, verdict)
            raise OSError(28, "No space left on device")

    state = Full(tmp_path / "state.db")
    old, new = (SlotRecord(running=ModelRef("m", version, "1" * 64)) for version in (1, 2))
    state.set_slot("default", new)
    with pytest.raises(OSError, match="No space"):
        state.roll_back("default", old, "2" * 64, Verdict("GuardErrorRate", 1.0))
    assert state.slots() == {"default": new} and not state.quarantined()


def test_blobs_of_what_no_slot_can_need_are_collected(
    open_slots: Build, releaser: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    refs = {version: releaser.release(version, ("only", models["fast"])) for version in (1, 2, 3, 5)}
    refs[4] = releaser.release(4, ("only", models["fast"]), outputs=ROWS * 3)
    for version in (1, 2, 3):
        wish(slots, refs[version])
        active(slots, refs[version], until)
    until(lambda: releaser.kept == {2, 3})
    wish(slots, refs[4])
    until(lambda: report(slots).phase is Phase.QUARANTINED)
    assert releaser.kept == {2, 3}, "what was refused for good is nothing to keep"
    releaser.offline = True
    other = SlotTarget(refs[5], policy=SlotPolicy())
    policy = SlotPolicy(guard=GuardPolicy(minimum=10))
    slots.wish({"default": SlotTarget(refs[3], policy=policy), "other": other})
    until(lambda: slots.report()["other"].reason == "Unavailable")
    model = slots.active("default")
    assert model is not None
    model.health.failed += 50
    active(slots, refs[2], until)
    until(lambda: releaser.kept == {2, 5})


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), NoRoom("0" * 64, 10, 20)])
def test_a_disk_without_room_says_so_and_is_tried_again_soon(
    open_slots: Build,
    releaser: Any,
    models: Any,
    until: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    slots = open_slots()
    good = releaser.release(1, ("only", models["fast"]))
    wish(slots, good)
    active(slots, good, until)
    full, fetch = [True], releaser.fetch_blobs

    def fetch_blobs(*arguments: Any, **more: Any) -> None:
        if full[0]:
            raise error
        fetch(*arguments, **more)

    monkeypatch.setattr(releaser, "fetch_blobs", fetch_blobs)
    wish(slots, releaser.release(2, ("only", models["fast"])))
    got = until(lambda: (now := report(slots)).reason == type(error).__name__ and now)
    assert got.running == good and works(slots) and got.phase is Phase.PENDING
    if isinstance(error, NoRoom):
        assert (got.measured, got.limit) == (10.0, 20.0)
    full[0] = False
    until(lambda: report(slots).running.version == 2)
