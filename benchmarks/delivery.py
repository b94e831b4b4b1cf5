"""How fast does a model get from the controller to a device, and what does a running stream notice of it?

python -m benchmarks.delivery [--quick] [--json FILE]

Bandwidth: one `edgeward up` process against nginx (one worker, sendfile) with the same file, several clients,
everything on loopback, runs interleaved; beside it what the server's process spent. Then a device with a 1 MB
model: from the call of publish until the controller knows that the new version is active; and a sensor that goes
on sending 1,000 samples/s meanwhile.
"""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks import models, swap
from benchmarks.peers import free_port
from benchmarks.plant import DEVICE, SITE, Agent, SlotModel, plant
from benchmarks.report import Row, arguments, finish, median, spread
from edgeward.client.transport import Transport
from edgeward.clock import SystemClock
from edgeward.wire import API_VERSION
from edgeward.wire.resources import parse_resource
from models.package import load_package
from models.release import publish
from simulators.processes import wait_until

MODEL = "dense"
CLIENTS = 4


@dataclass(frozen=True)
class _Server:
    port: int
    path: str
    process: psutil.Process
    tokens: list[str]


@dataclass(frozen=True)
class Run:
    """`bandwidth` in MB/s of wall-clock time, `cost` in the server's CPU seconds per GB."""

    bandwidth: float
    cost: float


def _download(server: _Server, client: int, size: int) -> None:
    """Raises RuntimeError unless exactly `size` bytes come."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    headers = {"Authorization": f"Bearer {server.tokens[client]}"} if server.tokens else {}
    connection.request("GET", server.path, headers=headers)
    response = connection.getresponse()
    buffer, got = bytearray(1 << 20), 0
    while count := response.readinto(buffer):
        got += count
    connection.close()
    if (response.status, got) != (200, size):
        raise RuntimeError(f"{server.path}: {response.status} and {got} of {size} bytes")


def measure(server: _Server, size: int) -> Run:
    """All clients at once, one download each."""
    failed: list[BaseException] = []

    def one(client: int) -> None:
        try:
            _download(server, client, size)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(client,)) for client in range(CLIENTS)]
    cpu, began = sum(server.process.cpu_times()[:2]), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall, spent = time.perf_counter() - began, sum(server.process.cpu_times()[:2]) - cpu
    if failed:
        raise failed[0]
    return Run(CLIENTS * size / wall / 1e6, spent / (CLIENTS * size / 1e9))


@contextmanager
def nginx(folder: Path, root: Path, path: str) -> Iterator[_Server | None]:
    """One worker with sendfile over `root`; None where nginx is not installed."""
    binary = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if binary is None:
        yield None
        return
    folder.mkdir()
    port = free_port()
    temporary = "".join(
        f"{kind}_temp_path t;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"{'user root;' if os.geteuid() == 0 else ''} worker_processes 1; daemon off; pid nginx.pid;"
        f" error_log error.log; events {{}} http {{ access_log off; sendfile on; tcp_nopush on; {temporary}"
        f" server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n"
    )
    process = subprocess.Popen([binary, "-p", str(folder), "-c", str(folder / "nginx.conf")])
    try:
        master = psutil.Process(process.pid)
        wait_until(lambda: bool(master.children()), what="nginx to start", timeout=20)
        yield _Server(port, path, master.children()[0], [])
    finally:
        process.terminate()
        process.wait()


def bandwidth(agent: Agent, size: int, rounds: int) -> list[Row]:
    place, path = agent.place, agent.place.folder / "large"
    path.write_bytes(os.urandom(size))
    with place.client() as client:
        digest = client.upload_artifact(path)
    admin = Transport(place.url, credential=lambda: place.token_file.read_text().strip())
    tokens = [
        admin.request("POST", "/api/v1/apitokens", json={"name": f"bench-{number}", "role": "viewer"}).json()[
            "token"
        ]
        for number in range(CLIENTS)
    ]
    admin.close()
    controller = psutil.Process(place.processes.children["controller"].pid)
    ours = _Server(int(place.url.rpartition(":")[2]), f"/artifacts/{digest}", controller, tokens)
    root = place.folder / "controller" / "artifacts"
    with nginx(place.folder / "nginx", root, f"/{digest[:2]}/{digest}") as theirs:
        servers = [("ours", ours), *([("nginx", theirs)] if theirs else [])]
        runs: dict[str, list[Run]] = {name: [] for name, _ in servers}
        for number in range(rounds + 1):
            for name, server in servers:
                run = measure(server, size)
                if number:  # the first warms up
                    runs[name].append(run)
    mine, peer = runs["ours"], runs.get("nginx", [])
    work = f"artifact of {size >> 20} MiB, {CLIENTS} clients"

    def row(
        work: str,
        unit: str,
        value: Callable[[Run], float],
        target: str,
        holds: Callable[[float, float], bool],
    ) -> Row:
        here = [value(run) for run in mine]
        there = median([value(run) for run in peer]) if peer else None
        verdict = holds(median(here), there) if there is not None else None
        return Row(work, unit, median(here), None, there, "nginx", target, spread(here), verdict)

    return [
        row(work, "MB/s", lambda run: run.bandwidth, ">= 0.6 of nginx", lambda a, b: a >= 0.6 * b),
        row(
            "the same, the server",
            "CPU s/GB",
            lambda run: run.cost,
            "<= nginx / 0.6",
            lambda a, b: a <= b / 0.6,
        ),
    ]


# from publish to active


def prepare(agent: Agent, version: int) -> None:
    """The package of a version with weights of its own."""
    place = agent.place
    file, golden = place.folder / f"v{version}.onnx", place.folder / f"{MODEL}.npz"
    file.write_bytes(models.dense(version))
    place.run(
        "package", "create", "--onnx", file, "--golden-inputs", golden, "--model", MODEL,
        "--version", str(version), "--out", place.package(f"v{version}"),
    )  # fmt: skip


def roll_out(agent: Agent, version: int) -> float:
    """Publish a prepared version and roll it out; seconds until the controller knows that it is active."""
    place = agent.place
    package = load_package(place.package(f"v{version}"))
    spec = {"fleet": SITE, "model": MODEL, "version": version}
    metadata = {"name": f"{MODEL}-v{version}"}
    rollout = parse_resource(
        {"apiVersion": API_VERSION, "kind": "Rollout", "metadata": metadata, "spec": spec}
    )
    with place.client() as client:

        def active() -> bool:
            slot = client.get("Device", DEVICE)["status"]["slots"]["default"]
            running = slot.get("running") or {}
            if slot["phase"] == "Quarantined":
                raise RuntimeError(f"version {version} was refused: {slot['message']}")
            return slot["phase"] == "Active" and running.get("version") == version

        began = time.perf_counter()
        publish(package, place.folder / "keys", client, SystemClock())
        client.apply([rollout])
        wait_until(active, what=f"version {version} to be active", timeout=60, poll=0.01)
        spent = time.perf_counter() - began
        done = lambda: client.get("Rollout", f"{MODEL}-v{version}")["status"]["phase"] == "Complete"  # noqa: E731
        wait_until(done, what="the rollout's end", timeout=60)
    return spent


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    size, rounds, versions, swaps = (64 << 20, 3, 3, 1) if options.quick else (256 << 20, 7, 7, 3)
    notes = []
    with tempfile.TemporaryDirectory() as name:
        rows_in = np.random.default_rng(7).random((64, 9), np.float32)
        slot = SlotModel("default", MODEL, models.dense(1), {"input": rows_in})
        with plant(Path(name) / "plant", [slot], [swap.STREAM]) as agent:
            rows = bandwidth(agent, size, rounds)
            for version in range(2, 2 + versions + swaps):
                prepare(agent, version)
            spent = [roll_out(agent, version) for version in range(2, 2 + versions)]
            rows.append(
                Row(
                    "1 MB model, publish to active on one device", "s", median(spent), None, None, "", "<= 2",
                    spread(spent), median(spent) <= 2,
                )
            )  # fmt: skip
            seen = [
                swap.during(agent, lambda version=version: roll_out(agent, version), version)  # type: ignore[misc]
                for version in range(2 + versions, 2 + versions + swaps)
            ]
    rows += swap.rows(seen)
    if rows[0].peer is None:
        notes.append(
            "nginx is not on PATH: the first two rows have no peer (Debian: apt-get install nginx-light)"
        )
    finish("Delivery: from the controller to an active model", rows, options.json, notes)


if __name__ == "__main__":
    main()
