"""A releaser on a loopback socket, and the part of an agent that keeps things on a disk: all of it real."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec

from agent.fetch import BlobStore
from agent.imports import Imports
from agent.runtime.engine import Engine
from agent.slots.opened import Setup
from agent.slots.slots import Slots
from agent.state import State
from agent.trusted_clock import TrustedClock
from agent.verify import Verifier
from controller.artifacts import FolderArtifacts
from controller.releases import Releases
from edgeward.client.transport import Transport
from edgeward.clock import Clock, SystemClock
from edgeward.storage import sha256_hex
from edgeward.wire import API_VERSION
from edgeward.wire.desired import ModelRef, SlotTarget
from edgeward.wire.package import Blob, Golden, GoldenVectors, Lineage, Manifest, TensorSpec, Variant
from edgeward.wire.slots import GuardPolicy, SlotPolicy
from tests.controller.bundles.carrying import ROWS, multiplier, tensor
from tests.controller.conftest import ReleaseTool

POLICY = SlotPolicy(isolation="in-process", guard=GuardPolicy(minimum=10))


class Releaser:
    """Publishes versions of one model, and serves them and their metadata. `down` answers nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.down = False
        self._artifacts = FolderArtifacts(folder / "artifacts")
        self._releases = Releases(folder / "tuf", folder / "keys", self._artifacts, SystemClock())
        self._tool = ReleaseTool()
        self.root = self._tool.root(self._releases.online_keys())
        self._releases.install_root(self.root, self._tool.signed_targets())
        (folder / "root.json").write_bytes(self.root)
        releaser = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                content = releaser.file(self.path)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def file(self, path: str) -> bytes | None:
        kind, _, name = path.strip("/").partition("/")
        if self.down or kind not in ("tuf", "artifacts"):
            return None
        found = self.folder / "tuf" / name
        if kind == "artifacts":
            return self._artifacts.path(name).read_bytes() if self._artifacts.has(name) else None
        return found.read_bytes() if found.is_file() else None

    def metadata(self, name: str) -> bytes | None:
        """As Imports' files: also while this is down."""
        found = self.folder / "tuf" / name
        return found.read_bytes() if found.is_file() else None

    def publish(self, version: int) -> ModelRef:
        """`y = version * x`."""
        content = multiplier(version)
        golden = msgspec.msgpack.encode(
            GoldenVectors([tensor("x", ROWS)], [tensor("y", ROWS * ROWS.dtype.type(version))])
        )
        blobs = [Blob(self._artifacts.add(data), len(data)) for data in (content, golden)]
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
        self._releases.publish(self._tool.add(manifest, "m", version), manifest)
        return ModelRef("m", version, sha256_hex(manifest))

    def carry(self, ref: ModelRef, part: Path) -> None:
        """Put everything of a release into the folder of an import."""
        (part / "tuf").mkdir()
        (part / "blobs").mkdir()
        for source in (self.folder / "tuf").glob("*.json"):
            (part / "tuf" / source.name).write_bytes(source.read_bytes())
        manifest = self._artifacts.path(ref.digest).read_bytes()
        found = msgspec.json.decode(manifest, type=Manifest)
        for digest in (ref.digest, *(blob.digest for blob in found.blobs())):
            (part / "blobs" / digest).write_bytes(self._artifacts.path(digest).read_bytes())
        (part / "desired.json").write_bytes(b"{}")


class Device:
    """What of an agent writes to its folder while models come and go; made and `start`ed as the daemon does."""

    def __init__(
        self,
        folder: Path,
        url: str,
        root: bytes,
        engine: Engine,
        clock: Clock,
        changed: Callable[[], None] = lambda: None,
        told: Callable[..., None] = lambda **facts: None,
    ) -> None:
        self.state = State(folder / "state.db")
        trusted = TrustedClock(clock, self.state)
        self.boot = self.state.next_boot()
        self.blobs = BlobStore(folder / "blobs", reserve=0)
        self.imports = Imports(folder)
        self.imports.sweep()
        self._transport = Transport(url)
        self.verifier = _Telling(folder / "tuf", root, self.blobs, self._transport, trusted, self.imports)
        self.verifier.told = told
        setup = Setup(machine="here", compiled=folder / "compiled", seconds=0.1)
        self.slots = Slots(
            self.state, self.verifier, engine, {"onnx": "onnxruntime 1"}, trusted, changed, setup
        )

    def start(self) -> None:
        self.slots.start()

    def wish(self, generation: int, ref: ModelRef) -> None:
        self.state.accept_desired(generation, b"%d" % generation)
        self.slots.wish({"default": SlotTarget(ref, policy=POLICY)})

    def running(self) -> int | None:
        model = self.slots.active("default")
        return None if model is None else model.ref.version

    def answer(self) -> float:
        """What the model makes of 1."""
        model = self.slots.active("default")
        assert model is not None, "no model runs"
        return float(model.runner.infer({"x": ROWS * 0 + 1})["y"][0][0])

    def close(self) -> None:
        self.slots.stop()
        self._transport.close()
        self.state.close()


class _Telling(Verifier):
    """Says which release metadata it has accepted, once it goes by it."""

    told: Callable[..., None]

    def target_length(self, ref: ModelRef) -> int:
        length = super().target_length(ref)
        versions = {}
        for role in ("timestamp", "snapshot", "targets"):
            document = msgspec.json.decode((self._metadata / f"{role}.json").read_bytes())
            versions[role] = int(document["signed"]["version"])
        self.told(tuf=versions)
        return length


def mark(text: bytes) -> None:
    """Write a fact into the recorder's log; nothing without a recorder."""
    recorder = ctypes.CDLL(None)
    if hasattr(recorder, "disk_mark"):
        recorder.disk_mark(text)
