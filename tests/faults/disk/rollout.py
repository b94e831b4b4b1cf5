"""A device through all that it does with models, for the recorder: python -m tests.faults.disk.rollout FOLDER SIDE

FOLDER is the device's, SIDE keeps what the test needs to know: the releaser's folder, copies of its metadata.
Whatever somebody outside has been told becomes a mark in the log, as JSON.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec

from agent.runtime.engine import Engine
from edgeward.clock import SystemClock
from tests.agent.conftest import wait_until
from tests.faults.disk.device import Device, Releaser, mark


def told(**facts: Any) -> None:
    mark(msgspec.json.encode(facts))


def main(folder: Path, side: Path) -> None:
    releaser = Releaser(side)
    engine = Engine()
    engine.start()
    devices: list[Device] = []

    def start() -> Device:
        devices.append(Device(folder, releaser.url, releaser.root, engine, SystemClock(), changed, told))
        device = devices[-1]
        device.start()
        told(boot=device.boot, floor=device.state.time_floor())
        return device

    def changed() -> None:
        """As the agent's: it reports to the controller, which goes by it from then on."""
        device = devices[-1]
        told(
            running=device.running(),
            generation=device.state.generation(),
            quarantined=sorted(device.state.quarantined()),
        )

    def until(device: Device, version: int) -> None:
        wait_until(lambda: device.running() == version and device.slots.settled())
        changed()

    device = start()
    one, two = releaser.publish(1), releaser.publish(2)
    device.wish(1, one)
    until(device, 1)
    device.wish(2, two)
    until(device, 2)
    model = device.slots.active("default")
    assert model is not None
    model.health.failed += 50
    until(device, 1)
    shutil.copytree(side / "tuf", side / "old")
    device.wish(3, releaser.publish(3))
    until(device, 3)
    device.close()

    releaser.down = True
    device = start()
    four = releaser.publish(4)
    with device.imports.receiving() as part:
        releaser.carry(four, part)
    told(imported=True)
    device.wish(4, four)
    until(device, 4)
    told(imported=False)
    device.imports.drop(1)
    device.close()
    start().close()
    engine.stop()
    releaser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
