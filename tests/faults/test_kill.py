"""SIGKILL at every edge of a slot's state and around every transaction: one verified model runs, never none."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agent.runtime.engine import Engine
from agent.state import State
from edgeward.wire.desired import SlotTarget
from tests.agent.conftest import wait_until
from tests.faults.rollout_child import POLICY, ROWS, open_slots, released

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[Engine]:
    engine = Engine()
    engine.start()
    yield engine
    engine.stop()


def killed(folder: Path, scenario: str, step: int) -> int | None:
    """Run a device that is killed at that step; the number of its steps when there are fewer."""
    folder.mkdir()
    child = subprocess.run(
        [sys.executable, "-m", "tests.faults.rollout_child", str(folder), scenario, str(step)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if child.returncode == -signal.SIGKILL:
        return None
    assert child.returncode == 0, child.stderr
    return int(child.stdout.split()[-1])


@pytest.mark.parametrize("scenario", ["rollout", "rollback"])
def test_a_kill_at_any_step_leaves_the_old_model_or_the_new_one(
    tmp_path: Path, shared_engine: Engine, scenario: str
) -> None:
    releaser, one, two = released()
    seen: set[int] = set()
    step, steps = 0, None
    while steps is None:
        step += 1
        folder = tmp_path / f"{scenario}-{step}"
        steps = killed(folder, scenario, step)
        state = State(folder / "state.db")
        releaser.offline = True
        slots = open_slots(folder, releaser, shared_engine, state)
        slots.start()
        try:
            model = slots.active("default")
            assert model is not None, f"killed at step {step}: no model runs"
            assert np.array_equal(model.runner.infer({"x": ROWS})["y"], ROWS * 2)
            seen.add(model.ref.version)
            condemned = two.digest in state.quarantined()
            if scenario == "rollback":
                assert condemned == (model.ref == one), f"killed at step {step}: half a roll-back"
            else:
                assert not condemned
                releaser.offline = False
                slots.wish({"default": SlotTarget(two, policy=POLICY)})
                wait_until(lambda slots=slots: slots.active("default").ref == two)
        finally:
            slots.stop()
            state.close()
    assert seen == {1, 2} and steps >= 4, "kills on both sides of the change"
