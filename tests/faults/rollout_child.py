"""A device in the middle of a rollout or a roll-back, which kills itself at its n-th step.

python -m tests.faults.rollout_child FOLDER SCENARIO N

A step is an edge of the slot's state, or the moment before or after a transaction. Prints `done STEPS` when N
is beyond the last.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from agent.runtime.engine import Engine
from agent.slots.opened import Setup
from agent.slots.slots import Slots
from agent.state import State
from edgeward.clock import SystemClock
from edgeward.wire.desired import ModelRef, SlotTarget
from edgeward.wire.slots import GuardPolicy, SlotPolicy
from tests.agent.conftest import Releaser, doubler, slow_doubler, wait_until

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
POLICY = SlotPolicy(guard=GuardPolicy(minimum=10))


def released() -> tuple[Releaser, ModelRef, ModelRef]:
    """The same two versions in every process."""
    releaser = Releaser()
    return releaser, releaser.release(1, ("only", doubler())), releaser.release(2, ("only", slow_doubler()))


class Steps:
    """Counts, and ends the process by SIGKILL at the chosen one."""

    def __init__(self, last: int) -> None:
        self.count = 0
        self._last = last
        self.armed = False

    def take(self) -> None:
        if self.armed:
            self.count += 1
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)


class Counted(State):
    def __init__(self, path: Path, steps: Steps) -> None:
        self._steps = steps
        super().__init__(path)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with super().transaction():
            yield
            self._steps.take()
        self._steps.take()


def open_slots(
    folder: Path, releaser: Any, engine: Engine, state: State, changed: Any = lambda: None
) -> Slots:
    setup = Setup(machine="here", compiled=folder / "compiled", seconds=0.1)
    return Slots(state, releaser, engine, {"onnx": "onnxruntime 1"}, SystemClock(), changed, setup)


def main(folder: Path, scenario: str, last: int) -> None:
    steps = Steps(last)
    releaser, one, two = released()
    engine = Engine()
    engine.start()
    slots = open_slots(folder, releaser, engine, Counted(folder / "state.db", steps), steps.take)
    slots.start()

    def running(ref: ModelRef) -> Any:
        return wait_until(
            lambda: (model := slots.active("default")) is not None and model.ref == ref and model
        )

    for ref in (one,) if scenario == "rollout" else (one, two):
        slots.wish({"default": SlotTarget(ref, policy=POLICY)})
        model = running(ref)
    steps.armed = True
    if scenario == "rollout":
        slots.wish({"default": SlotTarget(two, policy=POLICY)})
        running(two)
    else:
        model.health.failed += 50
        running(one)
    slots.stop()
    engine.stop()
    print("done", steps.count)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
