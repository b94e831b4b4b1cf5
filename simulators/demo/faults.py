"""What goes wrong on purpose while the sensors replay."""

from __future__ import annotations

import time
from typing import Any

from edgeward.broker import EmbeddedBroker
from simulators.demo.place import Place
from simulators.demo.plant import start_agent
from simulators.processes import wait_until


def kill_broker(place: Place, broker: EmbeddedBroker, away: float) -> dict[str, Any]:
    """SIGKILL; back on the same port after `away` seconds with nothing remembered."""
    at = place.seconds
    broker.kill()
    place.say("killed the broker (SIGKILL)", style="yellow")
    time.sleep(away)
    broker.start()
    place.say("broker started again")
    return {
        "fault": "broker killed and restarted",
        "at": round(at, 2),
        "seconds": round(place.seconds - at, 2),
    }


def kill_agent(place: Place, device: str, broker: str, away: float) -> dict[str, Any]:
    """SIGKILL in the middle of its work; started again after `away` seconds on the same folder."""
    at = place.seconds
    place.processes.children[device].kill()
    place.say(f"killed the agent {device} (SIGKILL)", style="yellow")
    time.sleep(away)
    child = start_agent(place, device, broker)
    child.wait_ready("ready", 40.0)
    place.say(f"agent {device} started again")
    return {
        "fault": f"agent {device} killed and restarted",
        "at": round(at, 2),
        "seconds": round(place.seconds - at, 2),
    }


def rows_flow(place: Place, lines: int, timeout: float) -> None:
    """Until every sensor has noted some rows: the faults shall hit a plant at work."""
    folder = place.folder / "produced"

    def flowing() -> bool:
        files = list(folder.glob("*.jsonl"))
        return len(files) == 5 and all(len(file.read_bytes().splitlines()) >= lines for file in files)

    wait_until(flowing, what="the sensors to send", timeout=timeout, poll=0.1)
