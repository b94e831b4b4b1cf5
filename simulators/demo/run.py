"""The demo's order of events. Two chains run side by side, since a fresh machine has two cores."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from edgeward.broker import EmbeddedBroker, accepts, free_port
from edgeward.errors import EdgewardError
from edgeward.identifiers import DeviceName
from simulators.demo import evidence, faults, plant, releases, summary
from simulators.demo.hostile import HostileClient
from simulators.demo.place import Background, Place, find_configs, prepared
from simulators.demo.plan import DEVICES, TINY_V1, V1, V2, VICTIM
from simulators.processes import Processes, interrupted_by_sigterm, wait_until

STEP = 90.0
BROKER_AWAY = 1.5
AGENT_AWAY = 1.0


def run(folder: Path, *, summary: Path | None, serve: bool, port: int, configs: Path | None) -> bool:
    """Run it all; True when everything was as it should be. Raises EdgewardError when a step fails."""
    configs = find_configs(configs)
    port = port or free_port()
    if accepts("127.0.0.1", port):
        raise EdgewardError(f"port {port} is taken", hint="choose another --port, or 0 for a free one")
    folder = folder.resolve()
    url = f"http://127.0.0.1:{port}"
    environment = {"EDGEWARD_URL": url, "EDGEWARD_TOKEN_FILE": str(folder / "controller" / "admin.token")}
    with (
        prepared(folder),
        interrupted_by_sigterm(),
        EmbeddedBroker(folder / "broker") as broker,
        Processes(folder / "logs", environment) as processes,
    ):
        place = Place(folder, configs, processes, url, Console())
        place.say(f"demo in {folder}; broker at {broker.url}")
        return _Demo(place, broker, port).run(summary, serve)


class _Demo:
    def __init__(self, place: Place, broker: EmbeddedBroker, port: int) -> None:
        self.place = place
        self.broker = broker
        self.port = port
        self.trained: dict[str, threading.Event] = {}
        self.faults: list[dict[str, Any]] = []

    def run(self, summary_file: Path | None, serve: bool) -> bool:
        place, broker = self.place, self.broker
        packages = Packages(place)
        plant.start_controller(place, self.port, broker.url)
        release = Background("release init", lambda: plant.init_release(place))
        place.run("apply", "-f", place.configs / "demo")
        release.result(STEP)
        plant.enroll_all(place)
        store = plant.start_store(place, broker.url)
        for device in DEVICES:
            plant.start_agent(place, device.name, broker.url)
        self._first_versions(packages)
        store.wait_ready("ready", STEP)

        listener = evidence.AlarmListener(broker.url)
        names = [DeviceName(device.site, device.name) for device in DEVICES]
        hostile = HostileClient(broker.url, names)
        listener.start()
        hostile.start()
        try:
            self._replay(packages)
        finally:
            hostile.stop()
            listener.stop()
        found = self._evidence(packages.held_out.result(STEP), hostile, listener)
        reasons = summary.judge(found)
        summary.show(place.console, found, reasons)
        if summary_file is not None:
            summary.write(found, reasons, summary_file)
        if serve:
            self._serve()
        return not reasons

    def _first_versions(self, packages: Packages) -> None:
        place = self.place
        releases.publish(place, packages.v1.result(STEP))
        plant.wait_online(place, [device.name for device in DEVICES])
        place.say(f"{len(DEVICES)} agents online")
        v1 = Background("rollout shuttle-v1", lambda: releases.roll_out(place, "shuttle-v1"))
        releases.publish(place, packages.tiny.result(STEP))
        releases.roll_out(place, "tiny-v1")
        v1.result(STEP)

    def _replay(self, packages: Packages) -> None:
        place, broker = self.place, self.broker
        data = packages.held_out.result(STEP)
        rows = len(data.read_bytes().splitlines()) - 1
        sensors = plant.start_sensors(place, data, broker.url, rows)
        faults.rows_flow(place, 40, STEP)
        place.say(f"sensors replay {rows} held-out rows; a hostile client is on the broker")
        self.faults.append(faults.kill_broker(place, broker, BROKER_AWAY))
        self.faults.append(faults.kill_agent(place, VICTIM, broker.url, AGENT_AWAY))
        releases.publish(place, packages.v2.result(STEP))
        releases.roll_out(place, "shuttle-v2")
        releases.publish(place, packages.v3.result(STEP))
        releases.roll_out(place, "shuttle-v3")
        plant.wait_sensors(place, sensors, STEP)
        place.say("the agents have every row of every sensor durably")
        plant.wait_drained(place, STEP)
        place.say("the trend store has acknowledged every row")

    def _evidence(
        self, held_out: Path, hostile: HostileClient, listener: evidence.AlarmListener
    ) -> dict[str, Any]:
        place = self.place
        self._settle()
        state = evidence.fleet_state(place)
        if place.processes.children["store"].stop(30.0) != 0:
            raise EdgewardError(
                "the trend store did not end cleanly", hint=f"see {place.processes.log('store')}"
            )
        with ThreadPoolExecutor(4) as pool:
            verdict = pool.submit(evidence.verify, place)
            counts = pool.submit(evidence.counts, place)
            detected = pool.submit(evidence.detected, place, held_out)
            query = pool.submit(evidence.trend_query, place)
        count = counts.result()
        received = listener.by_device
        return {
            **verdict.result(),
            "detection": detected.result(),
            **state,
            "faults": self.faults,
            "hostile": {"sent": dict(hostile.sent), "rows": count["forged"]},
            "alarms": {
                "received": sum(received.values()),
                "devices": dict(received),
                "stored": count["alarms"],
            },
            "query": query.result(),
            "seconds": round(place.seconds, 1),
        }

    def _settle(self) -> None:
        """Until no device is on its way to another version: a roll-back needs a moment to be reported."""
        with self.place.client() as client:
            wait_until(
                lambda: all(item["status"].get("state") != "Updating" for item in client.find("Device")),
                what="every device to have settled",
                timeout=30.0,
                log=self.place.processes.log("controller"),
                poll=0.3,
            )

    def _serve(self) -> None:
        place = self.place
        plant.start_store(place, self.broker.url)
        place.console.print(f"\nThe controller and its page run at {place.url}", highlight=False)
        place.console.print(f"Sign in with the token in {place.token_file}", highlight=False, soft_wrap=True)
        place.console.print("Ctrl-C ends everything.", highlight=False)
        try:
            while True:
                time.sleep(1.0)
        except KeyboardInterrupt:
            place.console.print("ending")


class Packages:
    """The chain of trainings; each is ready as early as it can be. `result` of each is a path."""

    def __init__(self, place: Place) -> None:
        self.held_out = Background("export of the held-out rows", lambda: releases.export_held_out(place))
        self.v1 = Background("training of version 1", lambda: releases.train(place, V1))
        self.tiny = Background("training of the TFLite model", lambda: self._tiny(place))
        self.v2 = Background("training of version 2", lambda: self._v2(place))
        self.v3 = Background("making of the broken version 3", lambda: self._v3(place))

    def _tiny(self, place: Place) -> Path:
        self.v1.result(STEP)
        return releases.train(place, TINY_V1)

    def _v2(self, place: Place) -> Path:
        self.tiny.result(2 * STEP)
        return releases.train(place, V2)

    def _v3(self, place: Place) -> Path:
        self.v2.result(3 * STEP)
        return releases.make_broken(place)
