"""A controller, a broker and one enrolled agent with models in its slots, made by the commands a user has."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import yaml
from rich.console import Console

from benchmarks.peers import free_port
from edgeward.broker import EmbeddedBroker
from edgeward.wire import API_VERSION
from simulators.demo.place import Place
from simulators.processes import Child, Processes, wait_until

SITE, DEVICE = "bench", "bench-1"


@dataclass(frozen=True)
class SlotModel:
    """A model for a slot of its own; `inputs` are its golden inputs by tensor name."""

    slot: str
    model: str
    content: bytes
    inputs: dict[str, np.ndarray]
    policy: dict[str, object] = field(default_factory=dict)


@dataclass
class Agent:
    """The enrolled agent. `start` runs it; it loads its models from its own folder."""

    place: Place
    broker: str

    def start(self, *options: str) -> Child:
        return self.place.start(
            DEVICE, "agent", "run", "--dir", self.place.agent(DEVICE), "--broker", self.broker, *options
        )

    def stop(self) -> None:
        self.place.processes.children[DEVICE].stop()

    def pss_bytes(self) -> int:
        """Proportional set size of the agent and all its workers."""
        root = psutil.Process(self.place.processes.children[DEVICE].pid)
        return sum(process.memory_full_info().pss for process in (root, *root.children(recursive=True)))


@contextmanager
def plant(
    folder: Path, models: Sequence[SlotModel], streams: Sequence[dict[str, object]] = ()
) -> Iterator[Agent]:
    """Everything is rolled out when the block begins; the agent runs without options then."""
    folder.mkdir(parents=True)
    quiet = Console(quiet=True)
    with EmbeddedBroker(folder / "broker") as broker, Processes(folder / "logs") as processes:
        port = free_port()
        place = Place(folder, folder, processes, f"http://127.0.0.1:{port}", quiet)
        processes.environment |= {"EDGEWARD_URL": place.url, "EDGEWARD_TOKEN_FILE": str(place.token_file)}
        child = place.start(
            "controller", "up", "--data", folder / "controller", "--port", str(port), "--broker", broker.url
        )
        child.wait_ready("edgeward controller ready at", 60)
        place.run("release", "init", "--keys", folder / "keys")
        documents: list[dict[str, object]] = [_resource("Site", SITE, {})]
        documents += [_resource("Model", item.model, {}) for item in models]
        documents += list(streams)
        names = [str(stream["metadata"]["name"]) for stream in streams]  # type: ignore[index]  # a resource
        policies = {item.slot: item.policy for item in models if item.policy}
        fleet = {"matchLabels": {"site": SITE}, "streams": names, "slots": policies}
        documents.append(_resource("Fleet", SITE, fleet))
        _apply(place, "fleet", documents)
        for item in models:
            _publish(place, item)
        token = folder / "token"
        with place.client() as client:
            token.write_text(client.create_enrollment_token([SITE]))
        place.run(
            "agent", "enroll", "--url", place.url, "--token-file", token, "--name", DEVICE,
            "--dir", place.agent(DEVICE),
        )  # fmt: skip
        agent = Agent(place, broker.url)
        agent.start().wait_ready("ready in", 60)
        _apply(
            place,
            "rollouts",
            [
                _resource(
                    "Rollout",
                    item.model,
                    {"fleet": SITE, "model": item.model, "version": 1, "slot": item.slot},
                )
                for item in models
            ],
        )
        for item in models:
            place.run("rollout", "status", item.model, "-w", "--timeout", "90", timeout=100)
        yield agent


def start_serving(agent: Agent, port: int) -> float:
    """Start the agent with its HTTP server; seconds until all its models are ready."""
    began = time.monotonic()
    agent.start("--serve", f"127.0.0.1:{port}")
    url = f"http://127.0.0.1:{port}/v2/health/ready"
    log = agent.place.processes.log(DEVICE)
    wait_until(lambda: _answers(url), what=f"{url} to be ready", timeout=60, log=log, poll=0.01)
    return time.monotonic() - began


def _answers(url: str) -> bool:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _publish(place: Place, item: SlotModel) -> None:
    file, golden = place.folder / f"{item.model}.onnx", place.folder / f"{item.model}.npz"
    file.write_bytes(item.content)
    np.savez(golden, **item.inputs)  # type: ignore[arg-type]  # arrays by name
    place.run(
        "package", "create", "--onnx", file, "--golden-inputs", golden, "--model", item.model,
        "--version", "1", "--out", place.package(item.model),
    )  # fmt: skip
    place.run("publish", place.package(item.model), "--keys", place.folder / "keys")


def _resource(kind: str, name: str, spec: Mapping[str, object]) -> dict[str, object]:
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}


def _apply(place: Place, name: str, documents: list[dict[str, object]]) -> None:
    file = place.folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump_all(documents))
    place.run("apply", "-f", file)
