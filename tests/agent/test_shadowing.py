"""Candidates beside a running model, with real workers: the good one enters, a bad one never does and hurts nobody."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from agent.holds import Holds, placed
from agent.slots.gate import Gate
from agent.slots.opened import Setup
from agent.slots.shadow import Tally
from agent.slots.shadows import Shadows
from agent.slots.slots import Slots
from agent.state import State
from agent.trusted_clock import Moment
from edgeward.clock import ManualClock, SystemClock
from edgeward.wire.desired import ModelRef, SlotTarget
from edgeward.wire.reports import Hold, Phase, SlotReport
from edgeward.wire.schedule import ActivationTerms
from edgeward.wire.slots import ShadowPolicy, SlotPolicy

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
#: Golden inputs end at 11: what is wrong above LIVE passes the self-test.
LIVE = 1000.0


def _model(*nodes: Any, constants: dict[str, Any] | None = None) -> bytes:
    """`x [n, 4] -> y [n, 4]`; `hot [1]` is how far the largest input lies above LIVE, 0 below."""
    values = {"live": np.array([LIVE], np.float32), **(constants or {})}
    shared = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Sub", ["largest", "live"], ["above"]),
        helper.make_node("Relu", ["above"], ["hot"]),
        helper.make_node("Add", ["x", "x"], ["twice"]),
    ]
    infos = [helper.make_tensor_value_info(item, TensorProto.FLOAT, [None, 4]) for item in "xy"]
    made = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = helper.make_graph([*shared, *nodes], "g", [infos[0]], [infos[1]], made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def good() -> bytes:
    return _model(helper.make_node("Identity", ["twice"], ["y"]))


def otherwise() -> bytes:
    return _model(helper.make_node("Add", ["twice", "hot"], ["y"]))


def gives_nan() -> bytes:
    nodes = [
        helper.make_node("Neg", ["hot"], ["negative"]),
        helper.make_node("Sqrt", ["negative"], ["bad"]),
        helper.make_node("Add", ["twice", "bad"], ["y"]),
    ]
    return _model(*nodes)


def hangs() -> bytes:
    """A Loop of as many turns as `hot` says thousand millions."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["sum", "one_b"], ["more"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]),
        ],
        [onnx.numpy_helper.from_array(np.array([0.0], np.float32), "one_b")],
    )
    nodes = [
        helper.make_node("Mul", ["hot", "many"], ["long"]),
        helper.make_node("Cast", ["long"], ["turns_1"], to=TensorProto.INT64),
        helper.make_node("Squeeze", ["turns_1"], ["turns"]),
        helper.make_node("Loop", ["turns", "yes", "zero"], ["nothing"], body=body),
        helper.make_node("Add", ["twice", "nothing"], ["y"]),
    ]
    constants = {"many": np.array([1e9], np.float32), "yes": np.array(True), "zero": np.zeros(1, np.float32)}
    return _model(*nodes, constants=constants)


def takes_memory(mebibytes: int) -> bytes:
    nodes = [
        helper.make_node("Sign", ["hot"], ["is_hot"]),
        helper.make_node("Mul", ["is_hot", "size"], ["sized"]),
        helper.make_node("Cast", ["sized"], ["count"], to=TensorProto.INT64),
        helper.make_node("ConstantOfShape", ["count"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["nothing"], keepdims=0),
        helper.make_node("Add", ["twice", "nothing"], ["y"]),
    ]
    return _model(*nodes, constants={"size": np.array([mebibytes * (1 << 18)], np.float32)})


class Traffic:
    """An application that asks whatever runs, all the time, and holds every answer to what it must be."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._stop = threading.Event()
        self.answers = 0
        self.wrong: list[str] = []
        self.versions: set[int] = set()
        self.thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        random = np.random.default_rng(1)
        while not self._stop.is_set():
            model = self._slots.active("default")
            if model is None:
                continue
            rows = random.uniform(0, LIVE + 500, (8, 4)).astype(np.float32)
            rows[:, 0] = LIVE + 500
            try:
                got = model.runner.infer({"x": rows})
            except Exception as error:  # counted
                self.wrong.append(repr(error))
                continue
            self.versions.add(model.ref.version)
            self.answers += 1
            if not np.array_equal(got["y"], rows * 2):
                self.wrong.append(f"version {model.ref.version}")
            observer = model.tap.observer
            if observer is not None:
                for at in observer.chosen(len(rows)):
                    observer.offer({"x": rows[at : at + 1]}, {"y": got["y"][at : at + 1]})

    def __enter__(self) -> Traffic:
        self.thread.start()
        return self

    def __exit__(self, *given: object) -> None:
        self._stop.set()
        self.thread.join(10)


class Rig:
    def __init__(self, folder: Path, releaser: Any, engine: Any) -> None:
        self.folder, self.releaser, self.engine = folder, releaser, engine
        self.heat: float | None = 40.0
        self.slots = self.open()

    def open(self) -> Slots:
        setup = Setup(machine="here", seconds=0.05)
        slots = Slots(
            State(self.folder / "state.db"), self.releaser, self.engine, {"onnx": "onnxruntime 1"},
            SystemClock(), lambda: None, setup, temperature=lambda: self.heat,
        )  # fmt: skip
        slots.start()
        return slots

    def wish(
        self, ref: ModelRef, beside: ModelRef | None = None, slot: dict[str, Any] | None = None, **shadow: Any
    ) -> None:
        policy = SlotPolicy(
            **(slot or {}), shadow=ShadowPolicy(**{"sample": 1.0, "inferences": 40, "cpu": 1.0, **shadow})
        )
        self.slots.wish({"default": SlotTarget(ref, beside, policy)})

    def report(self) -> SlotReport:
        return self.slots.report()["default"]

    def run(self) -> Any:
        """The one that runs without acting."""
        return next(iter(self.slots._candidates._shadows._runs.values()), None)


@pytest.fixture
def rig(tmp_path: Path, releaser: Any, engine: Any) -> Iterator[Rig]:
    made = Rig(tmp_path, releaser, engine)
    yield made
    made.slots.stop()


@pytest.fixture
def one(rig: Rig, models: Any, until: Any) -> ModelRef:
    """What runs."""
    ref: ModelRef = rig.releaser.release(1, ("only", models["fast"]))
    rig.wish(ref)
    until(lambda: rig.report().phase is Phase.ACTIVE)
    assert rig.report().shadow is None, "the first model has nothing to be compared with"
    return ref


def test_a_good_candidate_enters_after_it_has_agreed(rig: Rig, one: ModelRef, until: Any) -> None:
    two = rig.releaser.release(2, ("only", good()))
    with Traffic(rig.slots) as traffic:
        rig.wish(two, inferences=300)
        during = until(lambda: (now := rig.report()).phase is Phase.SHADOW and now)
        assert (during.running, during.target) == (one, two) and during.deadline > during.since
        worker = rig.run().shadowing._runner
        assert psutil.Process(worker.pid).nice() == 19
        got = until(lambda: (now := rig.report()).running == two and now)
    assert (got.phase, got.reason, got.measured, got.limit) == (Phase.ACTIVE, "ShadowPassed", 1.0, 0.95)
    shadow = got.shadow
    assert shadow and shadow.digest == two.digest and shadow.state == "passed"
    assert shadow.seen >= 300 and shadow.agreed == shadow.seen and shadow.failed == 0
    assert shadow.psi == pytest.approx(0.0, abs=0.02) and shadow.score_mean == shadow.incumbent_mean
    assert shadow.latency_ms["p50"] <= shadow.latency_ms["p95"] and shadow.memory_bytes
    assert traffic.wrong == [] and traffic.answers
    acting = rig.slots.active("default")
    assert (
        acting is not None and acting.tap.observer is None and psutil.Process(acting.runner.pid).nice() < 19
    )
    assert worker.pid is None, "the shadow's worker has ended"


@pytest.mark.parametrize("how", ["closed", "held"])
def test_hours_do_not_hold_up_a_run_that_switches_nothing(
    tmp_path: Path, releaser: Any, engine: Any, models: Any, until: Any, how: str
) -> None:
    """It runs ahead of its time, waits as Staged or Held, and is not run again when it may act."""
    clock, holds = ManualClock(1_790_000_000.0), Holds(tmp_path)
    slots = Slots(
        State(tmp_path / "state.db"), releaser, engine, {"onnx": "onnxruntime 1"}, SystemClock(), lambda: None,
        Setup(machine="here", seconds=0.05), gate=Gate(lambda: Moment(clock.now()), holds),
    )  # fmt: skip
    slots.start()
    policy = SlotPolicy(shadow=ShadowPolicy(sample=1.0, inferences=40, cpu=1.0))
    terms = ActivationTerms(at=clock.now() + 60) if how == "closed" else ActivationTerms()
    one = releaser.release(1, ("only", models["fast"]))
    two = releaser.release(2, ("only", good()))
    try:
        slots.wish({"default": SlotTarget(one, None, policy)})
        until(lambda: slots.report()["default"].phase is Phase.ACTIVE)
        with Traffic(slots) as traffic:
            slots.wish({"default": SlotTarget(two, None, policy, terms)})
            until(lambda: slots.report()["default"].phase is Phase.SHADOW)
            if how == "held":
                holds.change(lambda before: placed(before, Hold("", "anna", "audit", clock.now(), None)))
            waits = Phase.STAGED if how == "closed" else Phase.HELD
            got = until(lambda: (now := slots.report()["default"]).phase is waits and now)
            assert (got.running, got.target) == (one, two) and got.shadow and got.shadow.state == "passed"
            opened = len(engine.opened)
            clock.advance(60)
            holds.change(lambda before: ())
            until(lambda: slots.report()["default"].running == two)
            assert [name for name, *_ in engine.opened[opened:]] == ["m:2"], "tested, and not shadowed again"
        assert traffic.wrong == []
    finally:
        slots.stop()


def test_after_a_hold_hours_do_not_hold_it_up_either(
    tmp_path: Path, releaser: Any, engine: Any, models: Any, until: Any
) -> None:
    """Held before it has run without acting, and released outside of the hours: it runs now, and acts then."""
    clock, holds = ManualClock(1_790_000_000.0), Holds(tmp_path)
    slots = Slots(
        State(tmp_path / "state.db"), releaser, engine, {"onnx": "onnxruntime 1"}, SystemClock(), lambda: None,
        Setup(machine="here", seconds=0.05), gate=Gate(lambda: Moment(clock.now()), holds),
    )  # fmt: skip
    slots.start()
    policy = SlotPolicy(shadow=ShadowPolicy(sample=1.0, inferences=40, cpu=1.0))
    terms = ActivationTerms(at=clock.now() + 60)
    one = releaser.release(1, ("only", models["fast"]))
    two = releaser.release(2, ("only", good()))
    try:
        slots.wish({"default": SlotTarget(one, None, policy)})
        until(lambda: slots.report()["default"].phase is Phase.ACTIVE)
        holds.change(lambda before: placed(before, Hold("", "anna", "audit", clock.now(), None)))
        slots.wish({"default": SlotTarget(two, None, policy, terms)})
        until(lambda: slots.report()["default"].phase is Phase.HELD)
        holds.change(lambda before: ())
        with Traffic(slots):
            until(lambda: slots.report()["default"].phase is Phase.SHADOW)
            got = until(lambda: (now := slots.report()["default"]).phase is Phase.STAGED and now)
        assert (got.running, got.reason) == (one, "ActivationTime")
        clock.advance(60)
        until(lambda: slots.report()["default"].running == two)
    finally:
        slots.stop()


BAD: dict[str, tuple[Callable[[], bytes], dict[str, Any], dict[str, Any], str]] = {
    "disagrees": (otherwise, {}, {}, "ShadowDisagrees"),
    "nan": (gives_nan, {}, {}, "ShadowErrors"),
    "hangs": (hangs, {"deadline": 1.0}, {}, "ShadowWorkerLost"),
    "takes memory": (lambda: takes_memory(600), {}, {"memory_bytes": 200 << 20}, "ShadowMemory"),
    "holds memory": (lambda: takes_memory(110), {}, {"memory_bytes": 150 << 20}, "ShadowMemory"),
    "shifts": (otherwise, {}, {"inferences": 120, "min_agreement": None}, "ShadowScoreShift"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_candidate_never_acts_and_costs_nobody_an_answer(
    rig: Rig, one: ModelRef, until: Any, name: str
) -> None:
    make, slot, shadow, reason = BAD[name]
    two = rig.releaser.release(2, ("only", make()))
    with Traffic(rig.slots) as traffic:
        rig.wish(two, slot=slot, **shadow)
        got = until(lambda: (now := rig.report()).phase is Phase.QUARANTINED and now)
        seen = traffic.answers
        until(lambda: traffic.answers > seen + 50)
    allowed = {"takes memory": ("ShadowMemory", "ShadowWorkerLost", "ShadowErrors")}.get(name, (reason,))
    assert got.reason in allowed and got.target == two and got.running == one
    assert got.measured is not None and got.limit is not None and got.message.startswith("without acting: ")
    assert got.shadow and got.shadow.state == "refused" and got.reason in got.shadow.reason
    assert traffic.wrong == [] and traffic.versions == {1}
    assert rig.slots.active("default").tap.observer is None


def test_a_slow_candidate_is_refused_for_its_latency(
    rig: Rig, one: ModelRef, models: Any, until: Any
) -> None:
    two = rig.releaser.release(2, ("only", models["slow"]))
    with Traffic(rig.slots) as traffic:
        rig.wish(two, max_latency_ms=0.5)
        got = until(lambda: (now := rig.report()).phase is Phase.QUARANTINED and now)
    assert got.reason == "ShadowLatency" and got.measured > 0.5 == got.limit
    assert traffic.wrong == [] and traffic.versions == {1}


def test_a_candidate_that_crashes_is_quarantined_for_good(rig: Rig, one: ModelRef, until: Any) -> None:
    two = rig.releaser.release(2, ("only", good()))
    with Traffic(rig.slots) as traffic:
        rig.wish(two, inferences=1_000_000)
        until(lambda: (run := rig.run()) is not None and run.shadowing._tally.seen)
        os.kill(rig.run().shadowing._runner.pid, signal.SIGSEGV)
        got = until(lambda: (now := rig.report()).phase is Phase.QUARANTINED and now)
    assert got.reason == "ShadowWorkerLost" and "its worker crashed" in got.message
    assert list(rig.slots._state.quarantined()) == [two.digest]
    assert traffic.wrong == [] and traffic.versions == {1}


@pytest.mark.parametrize(("rule", "phase"), [("refuse", Phase.QUARANTINED), ("activate", Phase.ACTIVE)])
def test_too_few_inputs_by_the_deadline_are_decided_by_the_policy(
    rig: Rig, one: ModelRef, until: Any, rule: str, phase: Phase
) -> None:
    two = rig.releaser.release(2, ("only", good()))
    rig.wish(two, deadline=0.5, on_deadline=rule)
    got = until(lambda: (now := rig.report()).target == two and now.phase is phase and now)
    assert (got.reason, got.measured, got.limit) == ("ShadowTooFew", 0.0, 40.0)
    assert not rig.slots._state.quarantined(), "another policy may let it in"


def test_heat_pauses_and_no_sensor_says_so(rig: Rig, one: ModelRef, until: Any) -> None:
    two = rig.releaser.release(2, ("only", good()))
    rig.heat = 90.0
    with Traffic(rig.slots) as traffic:
        rig.wish(two, max_temperature=80.0, inferences=50)
        paused = until(lambda: (run := rig.run()) is not None and run.shadowing._pausing and run.shadowing)
        tally = paused._tally
        before = tally.seen
        until(lambda: tally.skipped > 500)
        assert tally.seen <= before + 1 and rig.report().phase is Phase.SHADOW
        assert paused.chosen(100) == [], "nothing is copied for nobody"
        assert "TooHot: 90 degrees, the limit is 80" in paused.report(tally).reason
        rig.heat = None
        got = until(lambda: (now := rig.report()).running == two and now)
    assert got.shadow and got.shadow.temperature is None and traffic.wrong == []


def test_a_newer_wish_ends_it_and_a_restart_repeats_it(rig: Rig, one: ModelRef, until: Any) -> None:
    two, three = (rig.releaser.release(version, ("only", good())) for version in (2, 3))
    rig.wish(two)
    until(lambda: rig.report().phase is Phase.SHADOW)
    worker = rig.run().shadowing._runner
    rig.wish(three)
    until(lambda: rig.report().phase is Phase.SHADOW and rig.report().target == three)
    assert worker.pid is None
    rig.slots.stop()
    assert rig.engine.names, "still usable"
    rig.slots = rig.open()
    rig.wish(three)
    until(lambda: rig.report().phase is Phase.SHADOW)
    assert rig.report().running == one
    with Traffic(rig.slots) as traffic:
        until(lambda: rig.report().running == three)
    assert traffic.wrong == []


def test_a_wish_between_two_looks_leaves_no_worker_behind(
    rig: Rig, one: ModelRef, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, three = (rig.releaser.release(version, ("only", good())) for version in (2, 3))
    rig.wish(two)
    first = until(lambda: rig.run()).shadowing
    monkeypatch.setattr(Shadows, "look_after", lambda self: iter(()))
    rig.wish(three)
    until(lambda: (run := rig.run()) is not None and run.shadowing is not first)
    assert first._runner.pid is None and not first._thread.is_alive()
    observer = until(lambda: rig.slots.active("default").tap.observer)
    assert observer is rig.run().shadowing


def test_one_beside_runs_for_as_long_as_it_is_wished_and_never_acts(
    rig: Rig, one: ModelRef, until: Any
) -> None:
    two = rig.releaser.release(2, ("only", otherwise()))
    with Traffic(rig.slots) as traffic:
        rig.wish(one, beside=two, inferences=10, deadline=0.5)
        run = until(lambda: rig.run())
        until(lambda: run.shadowing._tally.seen > 100)
        now = rig.report()
        assert (now.phase, now.running, now.target) == (Phase.ACTIVE, one, one)
        assert now.shadow and now.shadow.digest == two.digest and now.shadow.state == "running"
        assert run.shadowing._tally.agreed == 0 and rig.slots.settled()
        assert traffic.versions == {1}
        three = rig.releaser.release(3, ("only", good()))
        rig.wish(three, beside=two, inferences=10)
        until(lambda: rig.report().running == three)
        beside = until(lambda: (now := rig.run()) is not None and now.shadowing is not run.shadowing and now)
        until(lambda: beside.shadowing._tally.seen > 10)
        assert beside.incumbent is rig.slots.active("default") and rig.report().phase is Phase.ACTIVE
        rig.wish(three, inferences=10)
        until(lambda: rig.run() is None)
        assert rig.slots.active("default").tap.observer is None
        assert rig.report().shadow.digest == three.digest and traffic.wrong == []


def test_one_on_its_way_to_act_is_fed_first(rig: Rig, one: ModelRef, until: Any) -> None:
    two, three = (rig.releaser.release(version, ("only", good())) for version in (2, 3))
    rig.wish(three, beside=two)
    shadows = rig.slots._candidates._shadows
    until(lambda: len(shadows._runs) == 2)
    first, beside = shadows._runs["default"], shadows._runs["default@shadow"]
    for run in (beside, first, beside):
        shadows._follow(run.walk.name, run)
        assert first.incumbent.tap.observer is first.shadowing
    assert rig.report().phase is Phase.SHADOW and rig.report().shadow.digest == two.digest


def test_it_stays_beside_what_acts_when_that_gives_way(rig: Rig, one: ModelRef, until: Any) -> None:
    two, three = (rig.releaser.release(version, ("only", good())) for version in (2, 3))
    with Traffic(rig.slots) as traffic:
        rig.wish(two)
        until(lambda: rig.report().running == two)
        incumbent = rig.slots.active("default")
        rig.wish(three, inferences=1_000_000)
        run = until(lambda: rig.run())
        until(lambda: run.shadowing._tally.seen > 20)
        before = run.shadowing._tally
        incumbent.health.failed += incumbent.health.answered + 10_000
        until(lambda: rig.report().running == one and run.incumbent.ref == one)
        until(lambda: run.shadowing._tally is not before and run.shadowing._tally.seen > 20)
        assert incumbent.tap.observer is None and rig.report().phase is Phase.SHADOW
    assert traffic.wrong == []


def test_another_policy_for_what_runs_is_no_candidate(rig: Rig, one: ModelRef, until: Any) -> None:
    rig.wish(one, slot={"threads": 2})
    until(lambda: (model := rig.slots.active("default")) is not None and model.policy.threads == 2)
    assert rig.report().phase is Phase.ACTIVE and rig.report().shadow is None


def test_a_candidate_with_other_inputs_is_refused_with_words(rig: Rig, one: ModelRef, until: Any) -> None:
    from agent.slots.shadowing import fed
    from edgeward.wire.package import TensorSpec

    mine = [TensorSpec("x", "float32", [-1, 4])]
    assert fed(mine, mine) == "" and fed(mine, [TensorSpec("x", "float32", [1, 4])]) == ""
    assert "has the inputs z" in fed(mine, [TensorSpec("z", "float32", [-1, 4])])
    assert "float64" in fed(mine, [TensorSpec("x", "float64", [-1, 4])])
    assert "[-1, 5]" in fed(mine, [TensorSpec("x", "float32", [-1, 5])])


def test_the_worker_keeps_its_share_of_a_core(rig: Rig, one: ModelRef, models: Any, until: Any) -> None:
    """Of its own account: no other load may change what is measured."""
    two = rig.releaser.release(2, ("only", models["slow"]))
    rig.wish(two, cpu=0.1, inferences=1_000_000)
    shadowing = until(lambda: rig.run()).shadowing
    rows = np.ones((1, 4), np.float32)

    def fed(number: int) -> bool:
        for _ in shadowing.chosen(32):
            shadowing.offer({"x": rows}, {"y": rows * 2})
        return bool(shadowing._tally.seen >= number)

    until(lambda: fed(3))
    process = psutil.Process(shadowing._runner.pid)
    used, began = sum(process.cpu_times()[:2]), time.monotonic()
    until(lambda: fed(33))
    assert sum(process.cpu_times()[:2]) - used <= 0.15 * (time.monotonic() - began)


def test_what_runs_never_waits_for_the_queue(rig: Rig, one: ModelRef, until: Any) -> None:
    """The candidate stands still: what is offered is counted and forgotten at once."""
    two = rig.releaser.release(2, ("only", good()))
    rig.wish(two, slot={"deadline": 600.0})
    shadowing = until(lambda: (run := rig.run()) is not None and run.shadowing)
    os.kill(shadowing._runner.pid, signal.SIGSTOP)
    rows = np.ones((1, 4), np.float32)
    for _ in range(200):
        for _ in shadowing.chosen(1):
            shadowing.offer({"x": rows}, {"y": rows})
    assert len(shadowing._queue) <= 32 and shadowing._tally.skipped >= 200 - 33
    assert rig.slots.active("default").runner.infer({"x": rows})["y"].tolist() == [[2.0] * 4]
    for _ in range(40):
        shadowing.offer({"x": rows}, {"y": rows})
    assert len(shadowing._queue) <= 32, "also of one who does not ask first"
    tally = Tally()
    shadowing._compare(tally, shadowing._comparison, {"y": rows}, {}, 1, None)
    assert (tally.seen, tally.agreed) == (1, 0), "an answer that lacks an output ends nothing"
    huge = np.zeros((1 << 20, 4), np.float32)
    with shadowing._changed:
        shadowing._queue.clear()
        shadowing._bytes = 0
    before = shadowing._tally.skipped
    for _ in range(2):
        shadowing.offer({"x": huge}, {"y": rows})
    assert shadowing._tally.skipped == before + 2 and shadowing._bytes == 0
