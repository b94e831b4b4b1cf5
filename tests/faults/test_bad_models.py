"""Models that crash, hang, leak, give NaN or are slow: at load, in the self-test, or on live data only.

The workers are real processes under the agent's own supervision, requests come over HTTP, there is no network
after the release was fetched. What is bad before it acts never becomes Active; what is bad on live data has
given way to its predecessor within the guard's window. With the defence taken away it stays, or comes in.
"""

from __future__ import annotations

import http.client
import os
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.runtime import worker
from agent.serving.server import Server
from agent.serving.settings import Settings
from agent.slots import candidate, selftest
from agent.slots.care import Care
from agent.slots.catalog import SlotCatalog
from agent.slots.opened import Setup
from agent.slots.slots import Slots
from agent.state import State
from edgeward.clock import ManualClock, SystemClock
from edgeward.errors import PackageError
from edgeward.wire.desired import ModelRef, SlotTarget
from edgeward.wire.reports import Phase, SlotReport
from edgeward.wire.slots import GuardPolicy, SlotPolicy
from tests.agent.conftest import Releaser, doubler
from tests.faults.bad_child import LIVE
from tests.faults.bad_models import ask, bad, let_them

WINDOW = 30.0
MINIMUM = 5
OFF = GuardPolicy(error_rate=None, nan_rate=None, crash_loop=False)
MEMORY = 500 << 20


class Creeping(ManualClock):
    """Moves by itself only as much as a loop that waits for an end needs."""

    def monotonic(self) -> float:
        self._monotonic += 0.002
        return super().monotonic()


class Plant:
    """Slots whose turns the test takes, on a clock that it moves; workers and server run on the machine's."""

    def __init__(self, folder: Path, engine: Any) -> None:
        self.releaser = Releaser()
        self.clock = Creeping()
        self.engine = engine
        self.state = State(folder / "state.db")
        setup = Setup(machine="here", compiled=folder / "compiled", seconds=0.05)
        self.slots = Slots(
            self.state, self.releaser, engine, {"onnx": "onnxruntime 1"}, self.clock,  # type: ignore[arg-type]
            lambda: self.catalog.refresh(), setup,
        )  # fmt: skip
        engine._events = worker.Events(self.slots.crash_looped, self.slots.recovered)
        self.catalog = SlotCatalog(self.slots)
        self.slots.open()
        self.catalog.settle()
        self.server = Server(self.catalog, Settings(port=0), SystemClock())
        engine.call(self.server.start())
        self._connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=120)

    def stop(self) -> None:
        self._connection.close()
        self.engine.call(self.server.stop())
        self.slots.stop()
        self.state.close()

    def wish(self, ref: ModelRef, **policy: Any) -> SlotReport:
        self.slots.wish({"default": SlotTarget(ref, policy=SlotPolicy(**policy))})
        while self.slots.turn():
            pass
        return self.report()

    def report(self) -> SlotReport:
        return self.slots.report()["default"]

    def ask(self, value: float = 1.0) -> int:
        return ask(self._connection, value)[0]


@pytest.fixture
def plant(tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    let_them(monkeypatch, tmp_path)
    made = Plant(tmp_path, engine)
    yield made
    made.stop()


@pytest.fixture
def good(plant: Plant) -> ModelRef:
    ref = plant.releaser.release(1, ("only", doubler()))
    assert plant.wish(ref).phase is Phase.ACTIVE
    return ref


EARLY: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("crash", "load"): ("RuntimeFault", {}),
    ("hang", "load"): ("RuntimeFault", {"deadline": 0.5}),
    ("leak", "load"): ("MemoryCeiling", {"memory_bytes": MEMORY}),
    ("crash", "golden"): ("RuntimeFault", {}),
    ("hang", "golden"): ("DeadlineExceeded", {"deadline": 0.5}),
    ("leak", "golden"): ("", {"memory_bytes": MEMORY}),
    ("nan", "golden"): ("SelfTestFailed", {}),
    ("slow", "golden"): ("LatencyCeiling", {"max_latency_ms": 20.0}),
}


@pytest.mark.parametrize(("what", "place"), list(EARLY))
def test_what_is_bad_before_it_acts_never_becomes_active(
    plant: Plant, good: ModelRef, what: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "hang":  # for the others it says nothing how long a busy machine takes
        monkeypatch.setattr(worker, "START_DEADLINE", 5.0)
    reason, policy = EARLY[(what, place)]
    ref = plant.releaser.release(2, ("only", bad(what, place)))
    got = plant.wish(ref, **policy)
    assert (got.phase, got.running) == (Phase.QUARANTINED, good) and reason in ("", got.reason)
    assert plant.ask() == 200
    assert plant.state.slots()["default"].running == good and not plant.state.attempts()


@pytest.mark.parametrize("what", ["nan", "slow", "leak"])
def test_without_the_self_test_or_its_ceilings_it_would(
    plant: Plant, good: ModelRef, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of those whose worker answers; one that does not has nothing to become active with."""
    monkeypatch.setattr(selftest, "judge", lambda *_: selftest.Verdict(True, "", 0.0, 1.0))
    place = "load" if what == "leak" else "golden"
    ref = plant.releaser.release(2, ("only", bad(what, place)))
    assert plant.wish(ref).running == ref


LIVE_FAULTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # the reason, the guard's limits, the rest of the policy
    "crash": ("CrashLoop", {"error_rate": None}, {}),
    "hang": ("GuardErrorRate", {"crash_loop": False}, {"deadline": 0.3}),
    "leak": ("", {}, {"memory_bytes": MEMORY}),
    "nan": ("GuardNanRate", {}, {}),
    "slow": ("GuardLatency", {"latency_ms": 20.0}, {}),
}


@pytest.mark.parametrize("what", list(LIVE_FAULTS))
@pytest.mark.parametrize("guarded", [True, False])
def test_what_is_bad_on_live_data_only_gives_way_within_its_guards_window_offline(
    plant: Plant, good: ModelRef, what: str, guarded: bool
) -> None:
    reason, limits, policy = LIVE_FAULTS[what]
    guard = GuardPolicy(**{"window": WINDOW, "minimum": MINIMUM, **limits}) if guarded else OFF
    ref = plant.releaser.release(2, ("only", bad(what, "live")))
    assert plant.wish(ref, guard=guard, **policy).phase is Phase.ACTIVE, "golden vectors are fine"
    plant.releaser.offline = True
    model = plant.slots.active("default")
    assert model is not None
    for _ in range(20):  # a long healthy life before
        assert plant.ask() == 200
    for _ in range(4):
        plant.clock.advance(WINDOW)
        plant.slots.turn()
    struck = plant.clock.now()
    for _ in range(30):
        plant.ask(LIVE)
        plant.clock.advance(0.3)
        plant.slots.turn()
        if plant.report().running == good or (not guarded and model.runner.restarts >= 5):
            break
    got = plant.report()
    if not guarded:
        assert (got.phase, got.running) in ((Phase.ACTIVE, ref), (Phase.DEGRADED, ref))
        return
    assert got.running == good and got.phase is Phase.QUARANTINED and reason in ("", got.reason)
    assert plant.clock.now() - struck <= WINDOW
    assert plant.ask(LIVE) == 200, "the predecessor takes what the other could not"
    assert ref.digest in plant.state.quarantined()
    assert plant.wish(ref).running == good, "never again"


def test_a_worker_killed_from_outside_is_not_held_against_a_model_that_recovers(
    plant: Plant, good: ModelRef, until: Any
) -> None:
    """The kernel's memory killer, once: the model answers again and stays."""
    model = plant.slots.active("default")
    assert model is not None
    runner: Any = model.runner
    os.kill(runner.pid, signal.SIGKILL)
    until(lambda: plant.ask() == 200)
    plant.slots.turn()
    assert plant.report().phase is Phase.ACTIVE and runner.restarts == 1


@pytest.mark.parametrize(
    "error", [AttributeError("a bug"), PackageError("damaged"), sqlite3.OperationalError("full")]
)
def test_an_error_that_nobody_expected_costs_no_other_slot_its_care(
    plant: Plant, good: ModelRef, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise error

    other = plant.releaser.release(3, ("only", doubler()))
    with monkeypatch.context() as patch:
        patch.setattr(candidate.Candidates, "_activate", broken)
        got = plant.wish(other)
        assert got.running == good and got.phase in (Phase.PENDING, Phase.QUARANTINED)
    looked = []

    def breach(self: Care, name: str, *_: Any) -> None:
        looked.append(name)
        if name == "default":
            raise error

    plant.slots.wish({"default": SlotTarget(good), "second": SlotTarget(good)})
    while plant.slots.turn():
        pass
    monkeypatch.setattr(Care, "_breach", breach)
    looked.clear()
    plant.slots.turn()
    assert looked == ["default", "second"] and plant.ask() == 200
