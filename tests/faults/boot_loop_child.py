"""A device whose model takes the agent down with it.

python -m tests.faults.boot_loop_child FOLDER PLACE

In PLACE `test` a candidate does while it is tested, in `open` the running model while it is loaded at boot, in
`serve` it does at its first request after a boot; `none`: nothing happens. The deadly model is number 2, the one
before it harmless. Prints which version runs, why number 2 does not, and the phase of the slot.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from agent.runtime.engine import Engine
from agent.slots.slots import Slots
from agent.state import State
from edgeward.wire.desired import ModelRef, SlotTarget
from edgeward.wire.slots import SlotPolicy
from tests.agent.conftest import ROWS, wait_until
from tests.faults.rollout_child import open_slots, released

IN_PROCESS = SlotPolicy(isolation="in-process")
ISOLATED = SlotPolicy()


class Deadly(Engine):
    """Opens every model, but for one that ends the process as a bug in native code would."""

    deadly = ""

    def open(self, runtime: Any, content: bytes, name: str, *more: Any, **options: Any) -> Any:
        if name == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(runtime, content, name, *more, **options)


def follow(slots: Slots, ref: ModelRef, policy: SlotPolicy) -> str:
    """Wish for it until it has come to its end; its phase and reason."""
    slots.wish({"default": SlotTarget(ref, policy=policy)})
    wait_until(slots.settled)
    report = slots.report()["default"]
    return f"{report.phase} {report.reason}"


def main(folder: Path, place: str) -> None:
    releaser, one, two = released()
    engine = Deadly()
    engine.start()
    state = State(folder / "state.db")
    first = not state.slots()
    engine.deadly = "m:2" if place == "open" else ""
    slots = open_slots(folder, releaser, engine, state)
    slots.start()
    policy = ISOLATED if place == "isolated" else IN_PROCESS
    if first:
        follow(slots, one, policy)
        if place == "none":
            follow(slots, two, policy)
    engine.deadly = "m:2" if place == "test" else ""
    releaser.offline = place in ("open", "serve", "isolated")
    model = slots.active("default")
    if place in ("serve", "isolated") and model is not None and model.ref == two:
        os.kill(os.getpid(), signal.SIGKILL)
    ended = follow(slots, two, policy) if place != "isolated" else ""
    model = slots.active("default")
    running = model.ref.version if model is not None else 0
    if model is not None:
        assert (model.runner.infer({"x": ROWS})["y"] == ROWS * 2).all()
    verdict = state.quarantined().get(two.digest)
    slots.stop()
    engine.stop()
    state.close()
    print(running, verdict.reason if verdict else "-", ended)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
