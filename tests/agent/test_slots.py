"""Slots with real workers: what becomes active, what is refused, and what runs meanwhile."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from agent import lifecycle
from agent.commands import register
from agent.runtime.providers import Plan, Verdict
from agent.runtime.providers import Rules as ProviderRules
from agent.serving.metrics import exposition
from agent.serving.statistics import Statistics
from agent.slots.catalog import SlotCatalog
from agent.slots.opened import Setup
from agent.slots.slots import Slots
from agent.state import SlotRecord, State
from edgeward.clock import ManualClock, SystemClock
from edgeward.errors import RuntimeFault
from edgeward.wire.desired import ModelRef, SlotTarget
from edgeward.wire.reports import Condition, Phase, ShadowReport, SlotReport, StreamReport, VariantMeasure
from edgeward.wire.slots import SlotPolicy

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
RUNTIMES = {"onnx": "onnxruntime 1"}


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(machine="here", compiled=tmp_path / "compiled", seconds=0.2)


@pytest.fixture
def open_slots(tmp_path: Path, releaser: Any, engine: Any, setup: Setup) -> Iterator[Callable[..., Slots]]:
    made: list[Slots] = []

    def build(use: Any = None, how: Setup | None = None, state: State | None = None, **more: Any) -> Slots:
        state = state or State(tmp_path / "state.db")
        slots = Slots(
            state, releaser, use or engine, RUNTIMES, SystemClock(), lambda: None, how or setup, **more
        )
        slots.start()
        made.append(slots)
        return slots

    yield build
    for slots in made:
        slots.stop()


def wish(slots: Slots, ref: ModelRef, **policy: Any) -> None:
    slots.wish({"default": SlotTarget(ref, policy=SlotPolicy(**policy))})


def report(slots: Slots) -> SlotReport:
    return slots.report()["default"]


def settled(slots: Slots, until: Any) -> SlotReport:
    """The report once the newest wish has come to its end."""
    ends = (Phase.ACTIVE, Phase.QUARANTINED, Phase.DEGRADED)
    found: SlotReport = until(lambda: (got := report(slots)).phase in ends and got)
    return found


def workers(engine: Any) -> set[int]:
    return {runner.pid for runner in list(engine._runners) if runner.pid is not None}


def doubles(slots: Slots) -> bool:
    active = slots.active("default")
    assert active is not None
    return bool(np.array_equal(active.runner.infer({"x": ROWS})["y"], ROWS * 2))


def test_a_good_model_becomes_active_without_a_measurement_that_nobody_needs(
    open_slots: Any, releaser: Any, engine: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    ref = releaser.release(1, ("only", models["fast"]))
    wish(slots, ref)
    got = settled(slots, until)
    assert (got.phase, got.reason, got.running, got.variant) == (Phase.ACTIVE, "SelfTestPassed", ref, "only")
    assert got.measured == 0.0 and got.provider and doubles(slots)
    assert engine.names == ["m:1"] and got.variants[0].chosen and got.variants[0].p95_ms is None
    assert slots.active("default").policy == SlotPolicy()


def test_a_version_in_several_slots_is_served_once(
    open_slots: Any, releaser: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    ref = releaser.release(1, ("only", models["fast"]))
    too_slow = SlotTarget(ref, policy=SlotPolicy(max_latency_ms=1e-6))
    slots.wish({"a": too_slow, "b": SlotTarget(ref), "c": SlotTarget(ref)})
    until(lambda: slots.report()["a"].reason and slots.active("b") and slots.active("c"))
    assert slots.active("a") is None

    catalog = SlotCatalog(slots)
    catalog.refresh()

    (served,) = catalog.all()
    assert served.ready and (served.name, served.version) == ("m", "1")
    assert catalog.find("m") is served and catalog.find("m", "1") is served
    series = [
        line.rpartition(" ")[0]
        for line in exposition(Statistics(), catalog).decode().splitlines()
        if not line.startswith("#")
    ]
    assert len(series) == len(set(series))


def test_a_new_model_is_fetched_with_the_slots_earlier_ones_as_bases(
    open_slots: Any, releaser: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    refs = [releaser.release(version, ("only", models["fast"])) for version in (1, 2, 3)]
    for ref in refs:
        wish(slots, ref)
        assert settled(slots, until).running == ref
    assert releaser.bases == {2: [refs[0]], 3: [refs[1], refs[0]]}


def test_a_model_off_its_golden_vectors_is_refused_and_the_running_one_stays(
    open_slots: Any, releaser: Any, engine: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    good = releaser.release(1, ("only", models["fast"]))
    bad = releaser.release(2, ("only", models["fast"]), outputs=ROWS * 3)
    wish(slots, good)
    settled(slots, until)
    wish(slots, bad)
    got = settled(slots, until)
    assert (got.phase, got.reason, got.target, got.running) == (
        Phase.QUARANTINED, "SelfTestFailed", bad, good,
    )  # fmt: skip
    assert got.measured is not None and got.limit is not None and got.measured > got.limit
    assert doubles(slots) and list(slots._state.quarantined()) == [bad.digest]
    assert workers(engine) == {slots.active("default").runner.pid}
    wish(slots, good)
    assert report(slots).phase is Phase.ACTIVE
    wish(slots, bad, threads=2)
    assert report(slots).phase is Phase.QUARANTINED, "the content is bad whatever the policy"


def test_of_several_variants_the_fastest_is_taken_and_the_table_says_why(
    open_slots: Any, releaser: Any, engine: Any, models: Any, until: Any, tmp_path: Path
) -> None:
    slots = open_slots()
    ref = releaser.release(
        1,
        ("slow", models["slow"], 0.9),
        ("fast", models["fast"], 0.9),
        ("poor", models["fast"], 0.5),
        ("other", models["fast"], 0.9, "tflite"),
    )
    wish(slots, ref)
    got = settled(slots, until)
    assert got.variant == "fast" and doubles(slots)
    table = {row.name: row for row in got.variants}
    assert table["fast"].chosen and not table["slow"].chosen
    assert table["slow"].reason == "slower than the chosen one"
    assert table["slow"].p50_ms > table["fast"].p50_ms > 0 and table["fast"].memory_bytes > 0
    assert table["fast"].p95_ms >= table["fast"].p50_ms and table["fast"].provider
    assert "quality" in table["poor"].reason and table["poor"].p95_ms is None
    assert "not installed" in table["other"].reason
    assert set(releaser.fetched) == {"slow", "fast"}, "only what may be chosen is downloaded"
    assert engine.names == ["m:1 slow", "m:1 fast", "m:1"]
    assert workers(engine) == {slots.active("default").runner.pid}


def test_quality_may_be_given_up_within_tolerance_only(
    open_slots: Any, releaser: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    ref = releaser.release(1, ("exact", models["slow"], 0.9), ("quick", models["fast"], 0.8))
    wish(slots, ref)
    assert settled(slots, until).variant == "exact"
    wish(slots, ref, quality_tolerance=0.2)
    assert until(lambda: report(slots).variant == "quick")
    assert settled(slots, until).running == ref


@pytest.mark.parametrize(
    ("policy", "reason"),
    [({"max_latency_ms": 1e-6}, "LatencyCeiling"), ({"memory_bytes": 1 << 20}, "MemoryCeiling")],
)
def test_a_ceiling_refuses_with_both_figures_but_not_for_ever(
    open_slots: Any, releaser: Any, models: Any, until: Any, policy: dict[str, Any], reason: str
) -> None:
    slots = open_slots()
    ref = releaser.release(1, ("only", models["fast"]))
    wish(slots, ref, **policy)
    got = settled(slots, until)
    assert (got.phase, got.reason, got.running) == (Phase.QUARANTINED, reason, None)
    assert got.measured is not None and got.measured > got.limit == next(iter(policy.values()))
    assert got.variants[0].p95_ms is not None and not got.variants[0].chosen
    assert not slots._state.quarantined()
    wish(slots, ref)
    assert settled(slots, until).phase is Phase.ACTIVE


def test_a_variant_that_does_not_load_gives_way_to_the_next(
    open_slots: Any, releaser: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    ref = releaser.release(1, ("broken", b"\x08\x08 nonsense", 0.9), ("plain", models["fast"], 0.5))
    wish(slots, ref)
    got = settled(slots, until)
    assert got.variant == "plain" and "onnxruntime" in got.variants[0].reason
    hopeless = releaser.release(2, ("broken", b"\x08\x08 nonsense"))
    wish(slots, hopeless)
    got = until(lambda: (now := report(slots)).phase is Phase.QUARANTINED and now)
    assert got.reason == "RuntimeFault" and got.running == ref
    assert list(slots._state.quarantined()) == [hopeless.digest]


def test_rows_are_joined_only_when_the_golden_rows_allow_it(
    open_slots: Any, releaser: Any, engine: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    wish(slots, releaser.release(1, ("only", models["fast"])))
    settled(slots, until)
    assert [batchable for *_, batchable in engine.opened] == [True]
    mixed = releaser.release(2, ("only", models["centred"]), outputs=ROWS - ROWS.mean(axis=0))
    wish(slots, mixed)
    until(lambda: report(slots).running == mixed)
    assert [batchable for *_, batchable in engine.opened] == [True, True, False]
    assert not slots._board.records["default"].batchable


def test_a_restart_runs_on_as_before_without_network_or_measuring(
    open_slots: Any, releaser: Any, engine: Any, models: Any, until: Any, tmp_path: Path
) -> None:
    ref = releaser.release(1, ("slow", models["slow"]), ("fast", models["fast"]))
    first = open_slots()
    wish(first, ref, threads=2)
    before = settled(first, until)
    first.stop()
    engine.opened.clear()
    releaser.offline = True
    again = open_slots(state=State(tmp_path / "state.db"))
    active = again.active("default")
    assert active is not None and active.ref == ref and active.package.variant.name == "fast"
    assert active.policy == SlotPolicy(threads=2) and doubles(again)
    ((name, policy, options, batchable),) = engine.opened
    assert (name, policy.threads, options.threads, batchable) == ("m:1", 2, 2, True)
    wish(again, ref, threads=2)
    assert report(again).phase is Phase.ACTIVE and report(again).variants == before.variants


def test_what_was_out_of_reach_is_tried_again_at_once_when_it_was_brought(
    tmp_path: Path, releaser: Any, engine: Any, setup: Setup, models: Any, until: Any
) -> None:
    """On a clock that stands still no retry comes by itself."""
    clock = ManualClock()
    slots = Slots(State(tmp_path / "s.db"), releaser, engine, RUNTIMES, clock, lambda: None, setup)
    slots.start()
    try:
        releaser.offline = True
        wish(slots, releaser.release(1, ("only", models["fast"])))
        until(lambda: (got := report(slots)).reason == "Unavailable" and got.deadline)
        assert not slots.settled()
        releaser.offline = False
        slots.retry()
        assert settled(slots, until).phase is Phase.ACTIVE and slots.settled()
        slots.retry()
        assert report(slots).phase is Phase.ACTIVE
    finally:
        slots.stop()


def test_what_was_measured_is_kept_for_the_same_circumstances(
    open_slots: Any, releaser: Any, engine: Any, models: Any, until: Any, setup: Setup, tmp_path: Path
) -> None:
    ref = releaser.release(1, ("slow", models["slow"]), ("fast", models["fast"]))
    slots = open_slots()
    wish(slots, ref)
    first = settled(slots, until)
    releaser.fetched.clear()
    wish(slots, ref, max_latency_ms=1000.0)
    until(lambda: slots.active("default").policy.max_latency_ms == 1000.0)
    assert report(slots).variants == first.variants
    assert engine.names == ["m:1 slow", "m:1 fast", "m:1", "m:1"]
    assert set(releaser.fetched) == {"fast"}, "what is known to lose is not downloaded again"
    wish(slots, ref, threads=2)
    until(lambda: slots.active("default").policy.threads == 2)
    assert engine.names[4:] == ["m:1 slow", "m:1 fast", "m:1"]
    slots.stop()
    other = open_slots(how=replace(setup, machine="another chip"), state=State(tmp_path / "state.db"))
    wish(other, ref)
    until(lambda: other.active("default").policy.threads == 1)
    assert engine.names[-3:] == ["m:1 slow", "m:1 fast", "m:1"]


def test_a_changed_policy_reloads_the_model_and_a_refused_one_leaves_it_running(
    open_slots: Any, releaser: Any, engine: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    ref = releaser.release(1, ("only", models["fast"]))
    wish(slots, ref)
    settled(slots, until)
    old = slots.active("default")
    wish(slots, ref, max_latency_ms=1e-6)
    got = until(lambda: (now := report(slots)).phase is Phase.QUARANTINED and now)
    assert got.reason == "LatencyCeiling" and got.running == ref
    assert slots.active("default") is old and doubles(slots)
    wish(slots, ref, queue=7)
    new = until(lambda: (now := slots.active("default")) is not old and now)
    assert new.policy.queue == 7 and new.ref == ref and doubles(slots)
    assert until(lambda: old.runner.pid is None), "its worker ends with it"
    record = slots._state.slots()["default"]
    assert (record.running, record.previous, record.policy.queue) == (ref, None, 7)


class Rules:
    """Provider rules whose judgement a test writes."""

    def __init__(self, verdict: Verdict | None = None) -> None:
        self.verdict = verdict or Verdict()
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def plan(self, runtime: Any, available: Any, variant: Any, policy: SlotPolicy) -> Plan:
        return Plan(("CPUExecutionProvider",))

    def judge(self, plan: Plan, used: str, policy: SlotPolicy) -> Verdict:
        assert plan.attempts == ("CPUExecutionProvider",) and used
        self.entered.set()
        assert self.go_on.wait(60)
        return self.verdict


def test_a_model_that_is_replaced_while_it_is_tested_never_acts(
    open_slots: Any, releaser: Any, engine: Any, models: Any, until: Any, setup: Setup
) -> None:
    rules = Rules()
    slots = open_slots(how=replace(setup, rules=rules))
    one = releaser.release(1, ("only", models["fast"]))
    two = releaser.release(2, ("only", models["fast"]))
    rules.go_on.clear()
    wish(slots, one)
    assert rules.entered.wait(60) and report(slots).phase is Phase.SELF_TEST
    (abandoned,) = engine._runners
    wish(slots, two)
    rules.go_on.set()
    until(lambda: report(slots).running is not None)
    assert report(slots).running == two and doubles(slots)
    assert slots._state.slots()["default"] == replace_record(slots, previous=None)
    assert abandoned.pid is None


def replace_record(slots: Slots, **changes: Any) -> SlotRecord:
    return msgspec.structs.replace(slots._board.records["default"], **changes)


def test_a_wish_that_comes_while_the_activation_is_written_down_wins(
    open_slots: Any, releaser: Any, models: Any, until: Any, tmp_path: Path
) -> None:
    class Late(State):
        def set_slot(self, name: str, record: SlotRecord) -> None:
            super().set_slot(name, record)
            if record.running == two:
                wish(made, one)

    one = releaser.release(1, ("only", models["fast"]))
    two = releaser.release(2, ("only", models["fast"]))
    made = open_slots(state=Late(tmp_path / "late.db"))
    wish(made, one)
    settled(made, until)
    running = made.active("default")
    wish(made, two)
    until(lambda: made._state.slots()["default"].running == one and report(made).phase is Phase.ACTIVE)
    assert made.active("default") is running and report(made).target == one and doubles(made)


def test_the_provider_really_used_can_refuse_a_model_or_be_told(
    open_slots: Any, releaser: Any, models: Any, until: Any, setup: Setup
) -> None:
    rules = Rules(Verdict("asked for CUDA, runs on the CPU"))
    slots = open_slots(how=replace(setup, rules=rules))
    ref = releaser.release(1, ("only", models["fast"]))
    wish(slots, ref)
    got = settled(slots, until)
    assert (got.phase, got.reason) == (Phase.QUARANTINED, "ProviderFallback")
    assert "runs on the CPU" in got.message and not slots._state.quarantined()
    assert slots.conditions() == []
    rules.verdict = Verdict(condition=Condition("ProviderFallback", "True", "NoCuda", "runs on the CPU"))
    wish(slots, ref, cpu_fallback=True)
    assert settled(slots, until).phase is Phase.ACTIVE
    (condition,) = slots.conditions()
    assert condition.type == "ProviderFallback" and condition.message == "slot default: runs on the CPU"
    assert condition.last_transition_time > 0


def test_what_was_measured_on_a_provider_that_the_policy_refuses_is_not_downloaded_again(
    open_slots: Any, releaser: Any, models: Any, until: Any, setup: Setup
) -> None:
    rules = Rules()
    slots = open_slots(how=replace(setup, rules=rules))
    ref = releaser.release(1, ("slow", models["slow"]), ("fast", models["fast"]))
    wish(slots, ref, cpu_fallback=True)
    settled(slots, until)
    releaser.fetched.clear()
    rules.verdict = Verdict("it runs on the CPU")
    wish(slots, ref)
    got = settled(slots, until)
    assert (got.reason, got.running) == ("ProviderFallback", ref)
    assert releaser.fetched == []


def test_blobs_of_variants_that_lost_are_removed_unless_a_slot_needs_them(
    open_slots: Any, releaser: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    ref = releaser.release(1, ("slow", models["slow"], 0.9), ("fast", models["fast"], 0.8))
    slow, fast = (variant.blob.digest for variant in releaser.manifests[ref.digest].variants)
    exact = SlotTarget(ref, policy=SlotPolicy())
    slots.wish({"exact": exact})
    until(lambda: slots.active("exact"))
    assert until(lambda: releaser.dropped) == {fast} - {slow}
    slots.wish({"exact": exact, "quick": SlotTarget(ref, policy=SlotPolicy(quality_tolerance=0.5))})
    until(lambda: slots.active("quick"))
    assert slots.active("quick").package.variant.name == "fast"
    slots.wish({"exact": SlotTarget(ref, policy=SlotPolicy(threads=2))})
    until(lambda: slots.active("exact").policy.threads == 2)
    slots.stop()
    assert releaser.dropped == set(), "each slot's blob is needed"


def test_blobs_that_an_agent_was_killed_over_are_removed_when_it_starts(
    open_slots: Any, releaser: Any, models: Any, until: Any, tmp_path: Path
) -> None:
    ref = releaser.release(1, ("slow", models["slow"]), ("fast", models["fast"]))
    slow, fast = (variant.blob.digest for variant in releaser.manifests[ref.digest].variants)
    state = State(tmp_path / "state.db")
    state.set_slot("default", SlotRecord(running=ref, variant="fast", blob=fast))
    slots = open_slots(state=state)
    wish(slots, ref)
    assert until(lambda: releaser.dropped) == {slow} and doubles(slots)


def test_a_disk_that_gives_errors_costs_neither_the_running_model_nor_the_next_wish(
    open_slots: Any, releaser: Any, models: Any, until: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(State):
        full = False

        def set_slot(self, name: str, record: SlotRecord) -> None:
            if self.full:
                raise sqlite3.OperationalError("database or disk is full")
            super().set_slot(name, record)

        def quarantine(self, digest: str, verdict: Verdict) -> None:
            if self.full:
                raise sqlite3.OperationalError("database or disk is full")
            super().quarantine(digest, verdict)

    def worn(kept: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(releaser, "collect", worn)
    state = Full(tmp_path / "full.db")
    slots = open_slots(state=state)
    one = releaser.release(1, ("slow", models["slow"]), ("fast", models["fast"]))
    wish(slots, one)
    assert settled(slots, until).running == one
    state.full = True
    for bad in (
        releaser.release(2, ("only", models["fast"])),
        releaser.release(3, ("only", models["fast"]), outputs=ROWS * 3),
    ):
        wish(slots, bad)
        got = until(lambda: (now := report(slots)).reason == "OperationalError" and now)
        assert (got.phase, got.running, got.target) == (Phase.PENDING, one, bad) and doubles(slots)
    state.full = False
    last = releaser.release(4, ("only", models["fast"]))
    wish(slots, last)
    until(lambda: report(slots).running == last)


@pytest.mark.parametrize("gone", [False, True])
def test_blobs_that_no_record_names_but_a_slot_needs_are_not_removed(
    open_slots: Any, releaser: Any, models: Any, until: Any, tmp_path: Path, gone: bool
) -> None:
    ref = releaser.release(1, ("slow", models["slow"], 0.9), ("fast", models["fast"], 0.8))
    state = State(tmp_path / "state.db")
    if gone:  # the runtime of the variant that it had: it runs the next best
        state.set_slot("old", SlotRecord(running=ref, variant="gone", blob="9" * 64))
    else:  # an older agent did not write down which variant it was
        state.set_slot("old", SlotRecord(running=None, previous=ref))
    slots = open_slots(state=state)
    quick = SlotPolicy(quality_tolerance=0.5)
    slots.wish({"quick": SlotTarget(ref, policy=quick)})
    until(lambda: slots.active("quick"))
    slots.stop()
    assert releaser.dropped == set()


def test_a_blob_that_is_something_else_to_another_slot_is_not_removed(
    open_slots: Any, releaser: Any, models: Any, until: Any
) -> None:
    """A package may name any digest as a variant of little quality."""
    slots = open_slots()
    one = releaser.release(1, ("slow", models["slow"], 0.9), ("fast", models["fast"], 0.1))
    slots.wish({"one": SlotTarget(one)})
    until(lambda: slots.active("one"))
    two = releaser.release(2, ("fast", models["fast"], 0.9), ("odd", models["slow"], 0.1))
    manifest = releaser.manifests[two.digest]
    golden, odd = manifest.golden.blob, manifest.variants[1]
    manifest.variants.extend(
        msgspec.structs.replace(odd, name=name, blob=msgspec.structs.replace(odd.blob, digest=digest))
        for name, digest in (("golden", golden.digest), ("manifest", one.digest), ("lost", "9" * 64))
    )
    slots.wish({"one": SlotTarget(one), "two": SlotTarget(two)})
    until(lambda: slots.active("two"))
    until(lambda: "9" * 64 in releaser.dropped)
    slots.stop()
    assert releaser.dropped == {"9" * 64}


class TensorRT(Rules):
    """A device with an accelerator that compiles, as far as anybody but onnxruntime can tell."""

    def plan(self, runtime: Any, available: Any, variant: Any, policy: SlotPolicy) -> Plan:
        return Plan(("TensorrtExecutionProvider", "CPUExecutionProvider"))

    def judge(self, plan: Plan, used: str, policy: SlotPolicy) -> Verdict:
        return Verdict()


def test_what_an_accelerator_compiles_is_built_before_the_model_may_serve(
    open_slots: Any, releaser: Any, engine: Any, models: Any, until: Any, setup: Setup, tmp_path: Path
) -> None:
    slots = open_slots(how=replace(setup, rules=TensorRT()))
    ref = releaser.release(1, ("only", models["fast"]))
    wish(slots, ref, deadline=1.0)
    assert settled(slots, until).running == ref
    assert engine.names == ["m:1 only compiles", "m:1"]
    (_, building, first, _), (_, serving, second, batchable) = engine.opened
    assert building.deadline > 60.0 and serving.deadline == 1.0 and batchable
    assert first.compiled == second.compiled != ""
    assert workers(engine) == {slots.active("default").runner.pid}
    slots.stop()
    engine.opened.clear()
    again = open_slots(how=replace(setup, rules=TensorRT()), state=State(tmp_path / "state.db"))
    assert engine.names == ["m:1 only compiles", "m:1"], "what was compiled may be damaged since"
    assert engine.opened[0][1].deadline > 60.0 and doubles(again) and engine.opened[1][3]


def test_what_is_measured_and_then_chosen_is_built_once(
    open_slots: Any, releaser: Any, engine: Any, models: Any, until: Any, setup: Setup
) -> None:
    slots = open_slots(how=replace(setup, rules=TensorRT()))
    wish(slots, releaser.release(1, ("slow", models["slow"]), ("fast", models["fast"])))
    assert settled(slots, until).variant == "fast"
    assert engine.names == ["m:1 slow compiles", "m:1 slow", "m:1 fast compiles", "m:1 fast", "m:1"]


def test_a_batch_that_the_accelerator_cannot_take_is_never_joined(
    open_slots: Any, releaser: Any, engine: Any, models: Any, until: Any, setup: Setup
) -> None:
    slots = open_slots(how=replace(setup, rules=TensorRT()))
    ref = releaser.release(1, ("only", models["narrow"]))
    wish(slots, ref, max_batch=64)
    assert settled(slots, until).running == ref and doubles(slots)
    # The second worker compiles what the first one was spoilt for.
    assert engine.names == ["m:1 only compiles", "m:1 only compiles", "m:1"]
    assert not engine.opened[-1][3] and not slots._board.records["default"].batchable
    wish(slots, ref, max_batch=16)
    until(lambda: slots.active("default").policy.max_batch == 16)
    assert engine.opened[-1][3]


class Hangs:
    """A runner that is still compiling."""

    provider, inputs, outputs, restarts, pid = "TensorrtExecutionProvider", list[Any](), list[Any](), 0, None

    def __init__(self) -> None:
        self.entered, self.stopped = threading.Event(), list[bool]()

    def submit(self, inputs: Any, done: Any) -> None:
        self.entered.set()

    def stop(self, *, at_once: bool = False) -> None:
        self.stopped.append(at_once)


def test_an_agent_that_stops_or_another_wish_does_not_wait_for_a_build_nor_blame_the_model(
    open_slots: Any, releaser: Any, engine: Any, models: Any, until: Any, setup: Setup,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    builds: list[Hangs] = []
    really = engine.open

    def opened(runtime: Any, content: bytes, name: str, *rest: Any, **more: Any) -> Any:
        if not name.endswith("compiles") or name.startswith("m:2 "):
            return really(runtime, content, name, *rest, **more)
        builds.append(Hangs())
        return builds[-1]

    monkeypatch.setattr(engine, "open", opened)
    slots = open_slots(how=replace(setup, rules=TensorRT()))
    one = releaser.release(1, ("only", models["fast"]))
    two = releaser.release(2, ("only", models["fast"]))
    wish(slots, one)
    until(lambda: builds and builds[0].entered.is_set())
    wish(slots, two)
    assert settled(slots, until).running == two
    wish(slots, one)
    until(lambda: len(builds) == 2 and builds[1].entered.is_set())
    slots.stop()
    assert not slots._thread.is_alive() and not slots._state.quarantined()
    assert [build.stopped for build in builds] == [[True], [True]]


def test_a_worker_that_ends_because_the_agent_does_says_nothing_of_its_model(
    open_slots: Any, releaser: Any, engine: Any, models: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*arguments: Any, **more: Any) -> Any:
        slots._board.stop = True
        raise RuntimeFault("its worker is gone")

    monkeypatch.setattr(engine, "open", opened)
    slots = open_slots()
    wish(slots, releaser.release(1, ("only", models["fast"])))
    until(lambda: not slots._thread.is_alive())
    assert not slots._state.quarantined()


def test_neither_a_full_disk_nor_a_failing_build_keeps_a_model_from_running_again(
    open_slots: Any, releaser: Any, engine: Any, models: Any, until: Any, setup: Setup, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ref = releaser.release(1, ("only", models["fast"]))
    first = open_slots(how=replace(setup, rules=TensorRT()))
    wish(first, ref)
    settled(first, until)
    first.stop()
    really = engine.open

    def opened(runtime: Any, content: bytes, name: str, *rest: Any, **more: Any) -> Any:
        if name.endswith("compiles"):
            raise RuntimeFault("no room on the GPU")
        return really(runtime, content, name, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "open", opened)
        again = open_slots(how=replace(setup, rules=TensorRT()), state=State(tmp_path / "state.db"))
        assert again.active("default") is not None and doubles(again)
        again.stop()
    engine.opened.clear()
    (tmp_path / "file").write_bytes(b"")
    no_room = replace(setup, rules=TensorRT(), compiled=tmp_path / "file" / "compiled")
    again = open_slots(how=no_room, state=State(tmp_path / "state.db"))
    assert again.active("default") is not None and doubles(again)
    assert engine.names == ["m:1"], "what is not kept is not compiled ahead"


def test_compiled_forms_stay_with_the_blobs_that_a_slot_may_need(
    open_slots: Any, releaser: Any, engine: Any, models: Any, until: Any, tmp_path: Path
) -> None:
    slots = open_slots()
    folder = tmp_path / "compiled"
    refs, blobs = [], []
    for version in (1, 2, 3):
        content = models["fast"] + b"\x32" + bytes([1]) + str(version).encode()  # another doc_string
        ref = releaser.release(version, ("slow", models["slow"]), ("fast", content))
        refs.append(ref)
        blobs.append(releaser.manifests[ref.digest].variants[1].blob.digest)
    for version, ref in enumerate(refs):
        wish(slots, ref)
        until(lambda ref=ref: report(slots).running == ref)
        until(
            lambda version=version: (
                {path.name for path in folder.iterdir()} == set(blobs[max(0, version - 1) : version + 1])
            )
        )
    for path in (folder, *folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert {options.compiled for *_, options, _ in engine.opened} >= {str(folder / blob) for blob in blobs}


class Shifted(SystemClock):
    """The machine's clock, some seconds on."""

    shift = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.shift


def test_a_crash_loop_degrades_the_slot_until_it_is_over(
    open_slots: Any, releaser: Any, watched: Any, models: Any, until: Any
) -> None:
    clock = Shifted()
    made: list[Slots] = []
    engine = watched(
        on_crash_loop=lambda name, losses, seconds: made[0].crash_looped(name, losses, seconds),
        on_recovered=lambda name: made[0].recovered(name),
        clock=clock,
    )
    engine.start()
    try:
        made.append(slots := open_slots(use=engine))
        ref = releaser.release(1, ("only", models["fast"]))
        # The same model in another slot has its own worker, which is well.
        slots.wish({"default": SlotTarget(ref), "other": SlotTarget(ref)})
        until(lambda: all(item.phase is Phase.ACTIVE for item in slots.report().values()))
        runner = slots.active("default").runner
        for _ in range(5):
            assert doubles(slots)
            pid = until(lambda: runner.pid)
            os.kill(pid, signal.SIGSEGV)
            until(lambda pid=pid: runner.pid not in (None, pid))
        got = until(lambda: (now := report(slots)).phase is Phase.DEGRADED and now)
        assert (got.reason, got.measured, got.limit, got.running) == ("CrashLoop", 5.0, 5.0, ref)
        assert slots.report()["other"].phase is Phase.ACTIVE
        slots.wish({"default": SlotTarget(ref), "other": SlotTarget(ref)})
        assert report(slots).phase is Phase.DEGRADED, "the same wish again does not heal it"
        next_one = releaser.release(2, ("only", models["fast"]), outputs=ROWS * 3)
        slots.wish({"default": SlotTarget(next_one), "other": SlotTarget(ref)})
        until(lambda: report(slots).phase is Phase.QUARANTINED)
        slots.wish({"default": SlotTarget(ref), "other": SlotTarget(ref)})
        assert report(slots).phase is Phase.DEGRADED, "nor does a wish that failed"
        assert doubles(slots)
        clock.shift = 61.0
        got = until(lambda: (now := report(slots)).phase is Phase.ACTIVE and now)
        assert (got.reason, got.measured) == ("Recovered", None)
    finally:
        for slots in made:
            slots.stop()
        engine.stop()


def test_records_of_an_older_agent_are_still_read(tmp_path: Path) -> None:
    state = State(tmp_path / "state.db")
    ref = ModelRef("m", 1, "1" * 64)
    with state.transaction():
        raw = msgspec.msgpack.encode({"running": ref, "previous": None})
        state._db.execute("INSERT INTO slot VALUES ('default', ?)", (raw,))
        state._db.execute("INSERT INTO measurement VALUES ('k', ?, 0)", (b"\xc1",))
    record = state.slots()["default"]
    assert record.running == ref and record.policy == SlotPolicy() and not record.batchable
    assert state.measurement("k") is None and state.measurement("none") is None


def test_agent_status_shows_what_the_choice_was_made_from(tmp_path: Path) -> None:
    app = typer.Typer()
    register(app)
    state = State(tmp_path / "state.db")
    table = [
        VariantMeasure("int8", "onnx", "CPUExecutionProvider", 1.25, 2.5, 64 << 20, 0.9, chosen=True),
        VariantMeasure("edge", "tflite", reason="runtime tflite is not installed"),
    ]
    state.set_slot("default", SlotRecord(ModelRef("m", 1, "1" * 64), variants=table))
    state.close()
    said = CliRunner().invoke(app, ["agent", "status", "--dir", str(tmp_path)]).output
    assert "* int8  CPUExecutionProvider  p50 1.25 ms, p95 2.5 ms  64 MiB  quality 0.9" in said
    assert "edge  tflite  runtime tflite is not installed" in said
    plain = CliRunner().invoke(app, ["agent", "status", "--dir", str(tmp_path), "--json"]).output
    assert json.loads(plain)["slots"]["default"]["variants"][0]["p95_ms"] == 2.5


def test_agent_status_shows_what_runs_without_acting(tmp_path: Path) -> None:
    app = typer.Typer()
    register(app)
    state = State(tmp_path / "state.db")
    state.set_slot("default", SlotRecord(ModelRef("m", 1, "1" * 64)))
    shadow = ShadowReport(
        "2" * 64, "paused", "TooHot: 90 degrees, the limit is 80", seen=10, agreed=9, failed=1, psi=0.125,
        latency_ms={"p50": 1.0, "p95": 2.5}, memory_bytes=64 << 20,
    )  # fmt: skip
    report = SlotReport(Phase.ACTIVE, shadow=shadow)
    state.set_slot_reports({"default": report})
    assert state.slot_reports() == {"default": report}
    state.close()
    said = CliRunner().invoke(app, ["agent", "status", "--dir", str(tmp_path)], env={"COLUMNS": "200"}).output
    wanted = "shadow 222222222222 paused  9 of 10 agreed  1 failed  PSI 0.125  p95 2.5 ms  64 MiB  TooHot: 90"
    assert wanted in " ".join(said.split("\n"))
    plain = json.loads(CliRunner().invoke(app, ["agent", "status", "--dir", str(tmp_path), "--json"]).output)
    assert plain["shadows"]["default"]["seen"] == 10


def test_agent_status_says_what_a_slot_waits_for_and_what_was_refused(tmp_path: Path) -> None:
    """Who stands at a device without a network has nothing else to ask."""
    app = typer.Typer()
    register(app)
    state = State(tmp_path / "state.db")
    state.set_slot("default", SlotRecord(ModelRef("m", 1, "1" * 64)))
    held = SlotReport(
        Phase.HELD, "LocalHold", "held by anna: audit", since=1.0, target=ModelRef("m", 2, "2" * 64)
    )
    state.set_slot_reports({"default": held, "press": msgspec.structs.replace(held, phase=Phase.PENDING)})
    state.quarantine("3" * 64, lifecycle.Verdict("BootLoop", 1.0, "the agent went down 3 times in a row"))
    state.close()
    said = CliRunner().invoke(app, ["agent", "status", "--dir", str(tmp_path)], env={"COLUMNS": "200"}).output
    assert "slot default: m:1" in said and "slot press: nothing:-" in said
    assert "m:2 is Held since 1970-01-0" in said and ": LocalHold: held by anna: audit" in said
    assert "refused for good: 333333333333 BootLoop: the agent went down 3 times in a row" in said


def test_agent_status_shows_the_streams_as_last_reported(tmp_path: Path) -> None:
    app = typer.Typer()
    register(app)
    state = State(tmp_path / "state.db")
    before = CliRunner().invoke(app, ["agent", "status", "--dir", str(tmp_path), "--json"]).output
    assert json.loads(before)["streams"] == {"reported_at": 0.0, "reports": []}
    blocked = StreamReport("pump", "", 0, 0, 0, 0, reason="slot default has no model")
    runs = StreamReport("fan", "1" * 64, 90, 0, 4, 0, late=2)
    state.set_stream_reports(7.0, [blocked, runs])
    state.close()
    said = CliRunner().invoke(app, ["agent", "status", "--dir", str(tmp_path)]).output
    assert "stream pump: does not run: slot default has no model\n" in said
    assert "stream fan: 90 rows, 2 late, 4 rejected in the newest report\n" in said
    plain = json.loads(CliRunner().invoke(app, ["agent", "status", "--dir", str(tmp_path), "--json"]).output)
    assert plain["streams"]["reported_at"] == 7.0 and plain["streams"]["reports"][1]["late"] == 2


def test_a_model_that_a_stream_cannot_feed_is_refused_until_the_stream_is_another(
    open_slots: Any, releaser: Any, models: Any, until: Any
) -> None:
    problems = ["stream s: input x expects [-1, 1], the stream gives one tensor [n, 3]"]
    slots = open_slots(problem=lambda slot, opened: problems[-1])
    ref = releaser.release(1, ("only", models["fast"]))
    wish(slots, ref)
    got = settled(slots, until)
    assert (got.phase, got.reason, got.message) == (Phase.QUARANTINED, "StreamMismatch", problems[0])
    assert not slots._state.quarantined() and slots.active("default") is None
    problems.append("")
    wish(slots, ref)
    assert until(lambda: report(slots).phase is Phase.ACTIVE) and doubles(slots)


def test_a_model_for_an_accelerator_that_is_not_here_is_refused_or_told(
    open_slots: Any, releaser: Any, models: Any, until: Any, setup: Setup
) -> None:
    slots = open_slots(how=replace(setup, available=("CPUExecutionProvider",), rules=ProviderRules()))
    ref = releaser.release(1, ("only", models["fast"]))
    wish(slots, ref, providers=["CUDAExecutionProvider"])
    got = settled(slots, until)
    assert got.phase is Phase.QUARANTINED and "the slot allows CUDAExecutionProvider" in got.message
    assert not slots._state.quarantined()
    wish(slots, ref, providers=["CUDAExecutionProvider"], cpu_fallback=True)
    assert settled(slots, until).phase is Phase.ACTIVE and doubles(slots)
    (condition,) = slots.conditions()
    assert (condition.type, condition.reason) == ("ProviderFallback", "AcceleratorNotUsed")


def test_a_controller_that_is_busy_is_asked_again_when_it_said(
    open_slots: Any, releaser: Any, models: Any, until: Any
) -> None:
    slots = open_slots()
    ref = releaser.release(1, ("only", models["fast"]))
    releaser.busy = 1234.0
    wish(slots, ref)
    got = until(lambda: (one := report(slots)).reason == "Unavailable" and one)
    assert (got.phase, got.message) == (Phase.PENDING, "32 downloads are running")
    assert got.deadline is not None and got.deadline - got.since == pytest.approx(1234.0, abs=60)


def test_a_turn_that_fails_again_and_again_takes_no_core_for_itself(
    open_slots: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = open_slots()
    failed, rested, wait = [], [], slots._board.lock.wait

    def broken() -> None:
        failed.append(1)
        raise ValueError("a bug")

    def rest(seconds: float) -> bool:
        rested.append(1)
        return bool(wait(0.01))

    monkeypatch.setattr(slots._board.lock, "wait", rest)
    monkeypatch.setattr(slots._care, "look_after", broken)
    with slots._board.lock:
        slots._board.untidy = True
    until(lambda: len(failed) >= 20)
    assert len(rested) >= len(failed) - 2
