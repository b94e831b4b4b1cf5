"""A whole agent under its site's hours and a person's hold, against a whole controller."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from agent.daemon import Daemon
from agent.identity import enroll
from tests.controller.test_device_time_end_to_end import WrongClock, publish

ALWAYS = {"windows": [{"from": "00:00", "to": "24:00"}], "zone": "Europe/Berlin"}


def cli(*arguments: str) -> str:
    code = "from edgeward.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "agent", *arguments], capture_output=True, text=True, check=True
    ).stdout


def test_a_rollout_waits_for_the_time_and_for_the_person_and_then_goes_on(
    plant_with_broker: Any, tmp_path: Path, make: Any, rollout: Any, until: Any
) -> None:
    """The machine's clock stands in 1970: the controller's answer opens the windows."""
    plant = plant_with_broker
    plant.begin()
    plant.client.apply(
        [make("Site", "north", delivery={"rate": 1 << 20, "schedule": ALWAYS}, maintenance=ALWAYS)]
    )
    digest = publish(plant)
    folder = tmp_path / "agent"
    enroll(folder, plant.url, plant.client.create_enrollment_token(["north"]), "d1", {})
    daemon, stop = Daemon(folder, WrongClock(-time.time())), threading.Event()
    thread = threading.Thread(target=daemon.run, args=(stop,))
    thread.start()

    def slot() -> dict[str, Any]:
        found: dict[str, Any] = plant.device("d1")["status"].get("slots", {}).get("default", {})
        return found

    def why() -> str:
        return str(plant.client.get("Rollout", "r1")["status"].get("reason"))

    try:
        until(lambda: plant.device("d1")["status"].get("connection") == "Online")
        plant.client.apply([rollout("r1", 1, activateAt="2099-01-01T00:00:00Z")])
        until(lambda: slot().get("reason") == "ActivationTime", 120.0)
        assert slot()["phase"] == "Staged" and slot()["deadline"] == 4070908800.0
        until(lambda: why() == "ActivationTime")

        cli("hold", "--dir", str(folder), "--reason", "audit")
        until(lambda: [one["reason"] for one in plant.device("d1")["status"].get("holds", [])] == ["audit"])
        until(lambda: slot()["phase"] == "Held" and why() == "LocalHold")
        plant.client.apply([rollout("r1", 1)])
        until(lambda: daemon.state.generation() == plant.device("d1")["status"]["desiredGeneration"])
        assert slot()["phase"] == "Held", "nobody lifts it from afar"

        cli("release-hold", "--dir", str(folder))
        until(lambda: slot().get("phase") == "Active" and slot()["running"]["digest"] == digest, 120.0)
        until(lambda: plant.client.get("Rollout", "r1")["status"]["phase"] == "Complete")
        assert plant.device("d1")["status"]["holds"] == []
    finally:
        stop.set()
        thread.join()
