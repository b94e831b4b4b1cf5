"""A running agent whose disk has no room for what is carried to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.bundle import import_bundle
from agent.imports import Imports
from edgeward.clock import SystemClock
from tests.controller.bundles.carrying import Offline, agent, runs
from tests.faults.disk.harness import compiled, environment


@pytest.mark.e2e
def test_an_agent_takes_what_came_while_its_disk_was_full(
    tmp_path: Path, start: Any, until: Any, make: Any
) -> None:
    with start(tmp_path) as plant:
        plant.releases.init(plant.client)
        plant.client.apply(
            [make("Site", "north"), make("Fleet", "line", matchLabels={"site": "north"}, streams=[])]
        )
        made, bundles = Offline(plant, tmp_path, until), []
        made.release(1)
        device = made.device("d1")
        for version in (1, 2):
            if version == 2:
                made.release(2)
            made.roll_out(version)
            bundles.append(made.export("d1"))
    import_bundle(bundles[0], device, SystemClock())
    full = tmp_path / "full"
    env = environment(compiled(tmp_path), device) | {"DISK_FULL": str(full)}
    with agent(device, env=env) as slot:
        until(runs(slot, 1), 60)
        full.touch()
        # This process has room: it is the agent's own writes that have none.
        import_bundle(bundles[1], device, SystemClock())
        until(lambda: slot() and device.with_suffix(".log").read_text().count("is not accepted yet") >= 1, 60)
        assert runs(slot, 1)() and Imports(device).newest() is not None
        full.unlink()
        until(runs(slot, 2), 60)
        until(lambda: Imports(device).newest() is None, 60)
