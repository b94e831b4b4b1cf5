"""A whole agent on a machine whose clock is wrong, against a whole controller: the model becomes Active."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from agent.daemon import Daemon
from agent.identity import enroll
from edgeward.storage import sha256_hex
from edgeward.wire import API_VERSION
from edgeward.wire.package import (
    Blob,
    Golden,
    GoldenTensor,
    GoldenVectors,
    Lineage,
    Manifest,
    TensorSpec,
    Variant,
)
from edgeward.wire.reports import Phase

YEAR = 365 * 86400.0


class WrongClock:
    """The machine's clocks, the wall clock `off` seconds wrong from the start."""

    def __init__(self, off: float) -> None:
        self._off = off

    def now(self) -> float:
        return time.time() + self._off

    def monotonic(self) -> float:
        return time.monotonic()

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()


def publish(plant: Any) -> str:
    """`y = 2 x`, version 1 of model m; its digest."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", [infos[0]], [infos[1]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    rows = np.arange(3, dtype=np.float32).reshape(3, 1)
    tensors = [
        GoldenTensor(name, "float32", [3, 1], values.tobytes())
        for name, values in (("x", rows), ("y", rows * 2))
    ]
    blobs = []
    for data in (
        model.SerializeToString(),
        msgspec.msgpack.encode(GoldenVectors([tensors[0]], [tensors[1]])),
    ):
        path = plant.folder / sha256_hex(data)
        path.write_bytes(data)
        plant.client.upload_artifact(path)
        blobs.append(Blob(path.name, len(data)))
    manifest = msgspec.json.encode(
        Manifest(
            API_VERSION,
            "m",
            1,
            "2026-11-24T00:00:00Z",
            ["a"],
            [
                Variant(
                    "fp32",
                    "onnx",
                    blobs[0],
                    [TensorSpec("x", "float32", [-1, 1])],
                    [TensorSpec("y", "float32", [-1, 1])],
                )
            ],
            Golden(blobs[1], 1e-5, 1e-4),
            Lineage("test", {}, "none", "0" * 64, 1, "all", {}),
        ),
        order="deterministic",
    )
    digest: str = plant.client.publish_release(plant.releases.add(manifest, "m", 1), manifest)["digest"]
    return digest


@pytest.mark.parametrize("wall", ["1970", "ten years ahead", "ten years behind"])
def test_a_model_becomes_active_whatever_the_clock_says(
    plant_with_broker: Any, tmp_path: Path, rollout: Any, until: Any, wall: str
) -> None:
    plant = plant_with_broker
    plant.begin()
    digest = publish(plant)
    folder = tmp_path / "agent"
    enroll(folder, plant.url, plant.client.create_enrollment_token(["north"]), "d1", {})
    off = {"1970": -time.time(), "ten years ahead": 10 * YEAR, "ten years behind": -10 * YEAR}[wall]
    daemon, stop = Daemon(folder, WrongClock(off)), threading.Event()
    thread = threading.Thread(target=daemon.run, args=(stop,))
    thread.start()
    try:
        until(lambda: plant.device("d1")["status"].get("connection") == "Online")
        plant.client.apply([rollout("r1", 1)])

        def runs() -> bool:
            slot = plant.device("d1")["status"]["slots"].get("default", {})
            return slot.get("phase") == Phase.ACTIVE and slot["running"]["digest"] == digest

        until(runs, 120.0)
        assert not daemon.state.quarantined()
        assert abs(daemon._clock.now() - time.time()) < 60
    finally:
        stop.set()
        thread.join()
