"""A controller with a released model, agent folders enrolled with it, and bundles changed by hand."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from onnx import TensorProto, helper
from tuf.api.metadata import Metadata, Timestamp

from agent.identity import enroll
from agent.imports import Imports
from agent.state import State
from edgeward.bundle import FORMAT_NAME, Source, open_bundle, write_bundle
from edgeward.client.bundle import Exported, export
from edgeward.errors import Conflict
from edgeward.storage import sha256_hex
from edgeward.trust import dsse
from edgeward.wire import API_VERSION
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState, ModelRef
from edgeward.wire.desired import encode as encode_desired
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
from edgeward.wire.resources import parse_resource

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


def multiplier(version: int) -> bytes:
    """`y = version * x` as ONNX."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 4]) for name in ("x", "y")]
    factor = helper.make_tensor("f", TensorProto.FLOAT, [1], [float(version)])
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "f"], ["y"])], "g", infos[:1], infos[1:], [factor]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def tensor(name: str, values: np.ndarray) -> GoldenTensor:
    return GoldenTensor(name, values.dtype.name, list(values.shape), values.tobytes())


@dataclass
class Offline:
    """A controller with a released model, and agent folders enrolled with it."""

    plant: Any
    folder: Path
    until: Any
    names: list[str] = field(default_factory=list)

    def release(self, version: int) -> ModelRef:
        content = multiplier(version)
        golden = msgspec.msgpack.encode(
            GoldenVectors([tensor("x", ROWS)], [tensor("y", ROWS * np.float32(version))])
        )
        blobs = []
        for data in (content, golden):
            path = self.folder / sha256_hex(data)
            path.write_bytes(data)
            self.plant.client.upload_artifact(path)
            blobs.append(Blob(path.name, len(data)))
        spec = [TensorSpec("x", "float32", [-1, 4])], [TensorSpec("y", "float32", [-1, 4])]
        manifest = msgspec.json.encode(
            Manifest(
                API_VERSION, "m", version, "2026-11-24T00:00:00Z", [],
                [Variant("onnx-fp32", "onnx", blobs[0], *spec)],
                Golden(blobs[1], 1e-5, 1e-4),
                Lineage("test", {}, "none", "0" * 64, 1, "all", {}),
            ),
            order="deterministic",
        )  # fmt: skip
        answer = self.plant.client.publish_release(self.plant.releases.add(manifest, "m", version), manifest)
        return ModelRef("m", version, answer["digest"])

    def device(self, name: str) -> Path:
        folder = self.folder / name
        enroll(folder, self.plant.url, self.plant.client.create_enrollment_token(["north"]), name, {})
        self.names.append(name)
        return folder

    def roll_out(self, version: int) -> None:
        """To every device at once, and wait until each is wished to run it."""
        spec = {"fleet": "line", "model": "m", "version": version, "waves": [{"share": 1.0}]}
        document = {"apiVersion": API_VERSION, "kind": "Rollout", "metadata": {"name": f"r{version}"}}
        self.plant.client.apply([parse_resource({**document, "spec": spec})])
        for name in self.names:
            self.until(lambda name=name: self.wished(name) == version)

    def wished(self, name: str) -> int | None:
        try:
            raw = self.plant.client.desired(name)
        except Conflict:
            return None
        keys = self.plant.controller.desired_keys
        slots = dsse.verify(raw, PAYLOAD_TYPE, keys, DesiredState).slots
        return slots["default"].active.version if slots else None

    def export(self, *names: str) -> Path:
        return self.exported(*names)[0]

    def exported(self, *names: str) -> tuple[Path, Exported]:
        path = self.folder / f"{'-'.join(names)}-{time.monotonic_ns()}.edgeward-bundle"
        return path, export(self.plant.client, list(names), path)


def contents(path: Path) -> dict[str, bytes]:
    with open_bundle(path) as bundle:
        return {name: bundle.read(name, 1 << 30) for name in bundle.names if name != FORMAT_NAME}


def written(path: Path, members: dict[str, bytes]) -> Path:
    write_bundle(path, [Source(name, len(data), [data]) for name, data in members.items()])
    return path


def footprint(folder: Path) -> dict[str, bytes]:
    """Every file of an agent's folder that an import could touch; the database's own files apart."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("state.db") and path.name != "lock"
    }


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = footprint(folder)
    yield
    assert footprint(folder) == before
    assert Imports(folder).newest() is None or "imports" in "".join(before)


@contextmanager
def agent(
    folder: Path,
    end: signal.Signals = signal.SIGTERM,
    options: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> Iterator[Callable[[], dict[str, Any]]]:
    """A real agent process; what it calls gives its slot's durable record."""
    log = folder.with_suffix(".log").open("ab")
    command = [sys.executable, "-m", "edgeward.cli.main", "agent", "run", "--dir", str(folder), *options]
    process = subprocess.Popen(command, stdout=log, stderr=log, env=env)

    def slot() -> dict[str, Any]:
        assert process.poll() is None, folder.with_suffix(".log").read_text()
        if not (folder / "state.db").exists():
            return {}
        try:
            state = State(folder / "state.db", read_only=True)
        except (sqlite3.Error, TypeError):
            return {}  # it is just being made
        try:
            record = state.slots().get("default")
            return msgspec.to_builtins(record) if record else {}
        finally:
            state.close()

    try:
        yield slot
    finally:
        process.send_signal(end)
        process.wait()
        log.close()


def runs(slot: Callable[[], dict[str, Any]], version: int) -> Callable[[], bool]:
    return lambda: ((slot().get("running") or {}).get("version")) == version


def signed(offline: Offline, key: Any = None, **changes: Any) -> bytes:
    """The desired state of d1 with something changed, signed by the controller's key or another."""
    controller = offline.plant.controller
    raw = offline.plant.client.desired("d1")
    state = dsse.verify(raw, PAYLOAD_TYPE, controller.desired_keys, DesiredState)
    changed = msgspec.structs.replace(state, **changes)
    return dsse.sign(encode_desired(changed), PAYLOAD_TYPE, key or controller._desired_key)


def resigned(
    offline: Offline, members: dict[str, bytes], *, expires: datetime, ahead: int = 0
) -> dict[str, bytes]:
    """The bundle with its timestamp signed anew by the controller's key."""
    timestamp = Metadata[Timestamp].from_bytes(members["tuf/timestamp.json"])
    timestamp.signed.expires = expires
    timestamp.signed.version += ahead
    timestamp.sign(offline.plant.controller.releases._signer)
    return {**members, "tuf/timestamp.json": timestamp.to_bytes()}


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
