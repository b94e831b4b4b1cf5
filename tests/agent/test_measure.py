"""Measuring: bounded, stoppable, and kept under what it depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.runtime.engine import Engine
from agent.slots import measure
from agent.slots.measure import key, machine_key, trial_policy
from agent.state import MEASUREMENTS_KEPT, Measurement, State
from edgeward.clock import SystemClock
from edgeward.errors import RuntimeFault
from edgeward.wire.reports import Accelerator, Inventory
from edgeward.wire.slots import SlotPolicy

GOLDEN = {"x": np.arange(12, dtype=np.float32).reshape(3, 4)}


class Counted:
    """Counts the runs of a real model."""

    def __init__(self, stop_after: int = 0) -> None:
        self.count = 0
        self._stop_after = stop_after

    def __call__(self) -> None:
        if self._stop_after and self.count == self._stop_after:
            raise InterruptedError
        self.count += 1


def test_figures_of_one_example(engine: Engine, models: Any) -> None:
    runner = engine.open("onnx", models["fast"], "m", trial_policy(SlotPolicy()))
    counted = Counted()
    got = measure.measure(engine, runner, GOLDEN, None, SystemClock(), counted, 60.0)
    assert counted.count == measure.WARM_UP + measure.MOST_RUNS, "a fast model is done before its time is up"
    assert 0 < got.p50_ms <= got.p95_ms and got.provider == runner.provider
    assert got.memory_bytes > 1 << 20


def test_time_memory_and_the_caller_can_end_it(engine: Engine, models: Any) -> None:
    runner = engine.open("onnx", models["fast"], "m", trial_policy(SlotPolicy()))

    def runs(limit: int | None, seconds: float) -> int:
        counted = Counted()
        got = measure.measure(engine, runner, GOLDEN, limit, SystemClock(), counted, seconds)
        assert got.p50_ms > 0
        return counted.count

    assert runs(None, 0.0) == 1, "no time: one run is a figure at least"
    assert runs(1, 60.0) == 1, "too large already: the device needs its memory"
    with pytest.raises(InterruptedError):
        measure.measure(engine, runner, GOLDEN, None, SystemClock(), Counted(stop_after=2), 60.0)


def test_a_trial_runs_in_a_worker_that_may_outgrow_the_ceiling() -> None:
    asked = SlotPolicy(threads=3, isolation="in-process", memory_bytes=1 << 20)
    assert trial_policy(asked) == SlotPolicy(threads=3)


def test_what_the_model_refuses_is_raised(engine: Engine, models: Any) -> None:
    runner = engine.open("onnx", models["fast"], "m")
    with pytest.raises(RuntimeFault):
        measure.measure(engine, runner, {"z": GOLDEN["x"]}, None, SystemClock(), lambda: None, 1.0)


def test_a_measurement_holds_for_its_circumstances_only() -> None:
    policy = SlotPolicy()
    base = key("blob", "machine", "onnxruntime 1", policy, ("CPU",))
    assert base == key("blob", "machine", "onnxruntime 1", SlotPolicy(max_latency_ms=1.0), ("CPU",))
    others = {
        key("other", "machine", "onnxruntime 1", policy, ("CPU",)),
        key("blob", "other", "onnxruntime 1", policy, ("CPU",)),
        key("blob", "machine", "onnxruntime 2", policy, ("CPU",)),
        key("blob", "machine", "onnxruntime 1", SlotPolicy(threads=2), ("CPU",)),
        key("blob", "machine", "onnxruntime 1", policy, ("CUDA", "CPU")),
    }
    assert len(others | {base}) == 6


def test_a_machine_is_its_chip_and_drivers_not_its_name() -> None:
    one = Inventory("x86_64", 4, 8 << 30, {"onnx": "1"}, ["CPU"], node={"name": "a"})
    same = Inventory("x86_64", 4, 7 << 30, {"onnx": "2"}, ["CPU"], node={"name": "b"})
    assert machine_key(one) == machine_key(same)
    other = Inventory("x86_64", 4, 8 << 30, {"onnx": "1"}, ["CPU"], [Accelerator("gpu", "T4")])
    assert machine_key(other) != machine_key(one)


def test_measurements_survive_and_the_oldest_are_forgotten(tmp_path: Path) -> None:
    state = State(tmp_path / "state.db")
    made = Measurement("CPU", 1.0, 2.0, 3)
    for index in range(MEASUREMENTS_KEPT + 2):
        state.set_measurement(f"k{index}", made, float(index))
    state.close()
    again = State(tmp_path / "state.db")
    assert again.measurement("k0") is None and again.measurement("k1") is None
    assert again.measurement("k2") == made == again.measurement(f"k{MEASUREMENTS_KEPT + 1}")
