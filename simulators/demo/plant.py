"""The long-running parts: controller, trend store, agents and sensors, each a process of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgeward.errors import EdgewardError, Unavailable
from edgeward.storage import write_atomic
from simulators.demo.place import Place, answer_json
from simulators.demo.plan import DEVICES, PERIOD, REPLAY_SECONDS, SITES, STORE, DevicePlan, split
from simulators.processes import Child, wait_until

READY_TIMEOUT = 40.0


def start_controller(place: Place, port: int, broker: str) -> None:
    child = place.start(
        "controller", "up", "--data", place.folder / "controller", "--port", str(port), "--broker", broker
    )
    child.wait_ready("edgeward controller ready at", READY_TIMEOUT)
    place.say(f"controller ready at {place.url}")


def init_release(place: Place) -> None:
    place.run("release", "init", "--keys", place.folder / "release-keys")
    place.say("release keys made; root of trust installed")


def enroll_all(place: Place) -> None:
    """Six identities: token -> key pair -> CSR -> certificate; two at a time, as there are cores."""
    tokens = place.folder / "tokens"
    tokens.mkdir(mode=0o700)
    with place.client() as client:
        secrets = {STORE: client.create_enrollment_token(list(SITES), role="store")}
        for device in DEVICES:
            secrets[device.name] = client.create_enrollment_token([device.site], labels={"role": device.role})
    for name, secret in secrets.items():
        write_atomic(tokens / name, secret.encode(), mode=0o600)

    def enroll(name: str) -> None:
        what = "trends" if name == STORE else "agent"
        folder = place.store if name == STORE else place.agent(name)
        place.run(
            what, "enroll", "--url", place.url, "--token-file", tokens / name, "--name", name, "--dir", folder
        )
        (tokens / name).unlink()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(enroll, secrets))
    place.say(f"enrolled {len(DEVICES)} agents on {len(SITES)} sites and the trend store {STORE}")


def start_store(place: Place, broker: str) -> Child:
    return place.start("store", "trends", "serve", "--dir", place.store, "--broker", broker)


def start_agent(place: Place, device: str, broker: str) -> Child:
    return place.start(device, "agent", "run", "--dir", place.agent(device), "--broker", broker)


def wait_online(place: Place, names: list[str], timeout: float = READY_TIMEOUT) -> None:
    """Until the controller has seen every one of them online."""
    with place.client() as client:

        def online() -> bool:
            for name in names:
                place.processes.children[name].check_running()
            try:
                found = {item["metadata"]["name"]: item["status"] for item in client.find("Device")}
            except Unavailable:
                return False
            return all(found.get(name, {}).get("connection") == "Online" for name in names)

        log = place.processes.log(names[0])
        wait_until(online, what=f"{', '.join(names)} to be online", timeout=timeout, log=log, poll=0.25)


def start_sensors(place: Place, data: Path, broker: str, rows: int) -> list[Child]:
    """Every device's sensor replays its part of the held-out rows within REPLAY_SECONDS."""
    (place.folder / "produced").mkdir(exist_ok=True)
    children = []
    for device in DEVICES:
        begin, end = split(rows)[device.name]
        rate = (end - begin) / REPLAY_SECONDS
        children.append(
            place.start(f"sensor-{device.name}", *_sensor(place, device, data, broker, (begin, end), rate))
        )
    return children


def _sensor(
    place: Place, device: DevicePlan, data: Path, broker: str, rows: tuple[int, int], rate: float
) -> list[str | Path]:
    return [
        "simulate", "sensors", "--data", data, "--broker", broker, "--topic", device.topic,
        "--device", device.name, "--stream", device.stream, "--rows", f"{rows[0]}:{rows[1]}",
        "--rate", f"{rate:.3f}", "--speed", f"{PERIOD * rate:.3f}",
        "--produced", place.produced(device.name),
    ]  # fmt: skip


def wait_sensors(place: Place, sensors: list[Child], timeout: float) -> None:
    """Until the agents have every row durably. Raises EdgewardError when a sensor fails."""
    wait_until(
        lambda: all(not child.running for child in sensors),
        what="the sensors to have every row acknowledged by their agents",
        timeout=timeout,
        log=next((child.log for child in sensors if child.running), None),
    )
    for child in sensors:
        if child.wait(1) != 0:
            raise EdgewardError(f"{child.name} failed: {child.said().strip()[-500:]}")


def wait_drained(place: Place, timeout: float) -> None:
    """Until the trend store has acknowledged every row of every outbox."""

    def open_lanes(device: str) -> list[str]:
        status = answer_json(
            place.run("agent", "status", "--dir", place.agent(device), "--json"), "edgeward agent status"
        )
        # Trends of the newest bucket may follow at any time; what was produced are results and alarms.
        return [
            f"{device}/{lane}"
            for lane, state in status["outbox"].items()
            if lane in ("result", "alarm") and state["acked"] + 1 < state["next_seq"]
        ]

    waiting = [device.name for device in DEVICES]

    def drained() -> bool:
        with ThreadPoolExecutor(3) as pool:
            found = dict(zip(waiting, pool.map(open_lanes, waiting), strict=True))
        waiting[:] = [device for device, lanes in found.items() if lanes]
        return not waiting

    wait_until(
        drained, what="every outbox to be acknowledged", timeout=timeout, log=place.processes.log("store")
    )
