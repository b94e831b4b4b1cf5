"""Train, package, publish and roll out, by the command line alone."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from edgeward.errors import EdgewardError
from simulators.demo.place import Place
from simulators.demo.plan import ANOMALY, DATASET, HELD_OUT, V1, V2, V3_PACKAGE, Training

#: TUF targets metadata has one version after the other: one publisher at a time.
_publishing = threading.Lock()


def manifest(package: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((package / "manifest.json").read_bytes())
    return found


def train(place: Place, training: Training) -> Path:
    """A package from a recipe, evaluated on the held-out rows."""
    package = place.package(training.package)
    place.run(
        "train", training.recipe, "--dataset", DATASET, "--model", training.model,
        "--version", str(training.version), "--train", training.rows, "--holdout", HELD_OUT, "--out", package,
    )  # fmt: skip
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in manifest(package).get("metrics", {}).items())
    place.say(f"trained {training.model}:{training.version} on rows {training.rows} ({metrics[:90]})")
    return package


def export_held_out(place: Place) -> Path:
    data = place.folder / "held-out.csv"
    place.run("dataset", "export", DATASET, "--rows", HELD_OUT, "--out", data)
    return data


def make_broken(place: Place) -> Path:
    """Version 3: the file of version 1 with the golden vectors of version 2. Its signature will be valid."""
    old, good = place.package(V1.package), place.package(V2.package)
    wrong = old / "blobs" / manifest(old)["variants"][0]["blob"]["digest"]
    package = place.package(V3_PACKAGE)
    place.run(
        "package", "create", "--onnx", wrong, "--model", ANOMALY, "--version", "3",
        "--golden-from", good, "--out", package, "--skip-golden-check",
    )  # fmt: skip
    return package


def publish(place: Place, package: Path) -> None:
    with _publishing:
        place.run("publish", package, "--keys", place.folder / "release-keys")
    place.say(f"signed and published {package.name}")


def roll_out(place: Place, name: str, timeout: float = 60.0) -> None:
    """Apply a rollout and show it live until it ends."""
    place.run("apply", "-f", place.configs / "demo-rollouts" / f"{name}.yaml")
    child = place.start(f"rollout-{name}", "rollout", "status", name, "-w", "--timeout", str(timeout))
    shown = 0
    while True:
        running = child.running
        lines = child.said().splitlines(keepends=True)
        for line in lines[shown:]:
            if line.endswith("\n") or not running:
                place.say(f"  {name} | {line.strip()}")
                shown += 1
        if not running:
            break
        threading.Event().wait(0.1)
    # 0: complete, 1: halted (or failed, which the summary's judgement sees).
    if child.wait(1) not in (0, 1):
        raise EdgewardError(f"`edgeward rollout status {name} -w` failed: {child.said().strip()[-500:]}")
