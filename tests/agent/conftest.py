"""What slots are tested with: small ONNX models, packages of them, and a releaser that needs no network."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from agent.runtime.engine import Engine
from agent.runtime.port import LoadOptions, Runner
from agent.verify import _KEY, VerifiedPackage
from edgeward.errors import DigestMismatch, Unavailable
from edgeward.storage import sha256_hex
from edgeward.wire import API_VERSION
from edgeward.wire.desired import ModelRef
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
from edgeward.wire.slots import SlotPolicy

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Poll until `condition` holds; its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not reached within {seconds} s"
        time.sleep(0.01)
    return value


def _finish(nodes: list[Any], name: str = "x") -> bytes:
    infos = [helper.make_tensor_value_info(item, TensorProto.FLOAT, [None, 4]) for item in (name, "y")]
    graph = helper.make_graph(nodes, "g", [infos[0]], [infos[1]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def doubler() -> bytes:
    """`y = 2 x`, at once."""
    return _finish([helper.make_node("Add", ["x", "x"], ["y"])])


def slow_doubler(width: int = 1500) -> bytes:
    """`y = 2 x`, after multiplications with large matrices of zeros."""

    def zeros(name: str, rows: int, columns: int) -> list[Any]:
        shape = helper.make_tensor(f"{name}_shape", TensorProto.INT64, [2], [rows, columns])
        return [
            helper.make_node("Constant", [], [f"{name}_s"], value=shape),
            helper.make_node("ConstantOfShape", [f"{name}_s"], [name]),
        ]

    nodes = [
        *zeros("first", 4, width),
        *zeros("last", width, 4),
        helper.make_node("MatMul", ["x", "first"], ["h0"]),
    ]
    for index in range(3):
        nodes += zeros(f"w{index}", width, width)
        nodes.append(helper.make_node("MatMul", [f"h{index}", f"w{index}"], [f"h{index + 1}"]))
    nodes += [
        helper.make_node("MatMul", ["h3", "last"], ["nothing"]),
        helper.make_node("Add", ["x", "x"], ["twice"]),
        helper.make_node("Add", ["twice", "nothing"], ["y"]),
    ]
    return _finish(nodes)


def narrow(rows: int = 16) -> bytes:
    """`y = 2 x`, of so many rows at most."""
    most = helper.make_tensor("most_v", TensorProto.FLOAT, [rows, 1], [0.0] * rows)
    numbers = [
        (name, helper.make_tensor(f"{name}_v", TensorProto.INT64, [], [at]))
        for name, at in (("o", 0), ("i", 1))
    ]
    return _finish(
        [
            helper.make_node("Constant", [], ["most"], value=most),
            *(helper.make_node("Constant", [], [name], value=value) for name, value in numbers),
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Gather", ["shape", "o"], ["n"]),
            helper.make_node("Range", ["o", "n", "i"], ["rows"]),
            helper.make_node("Gather", ["most", "rows"], ["nothing"]),
            helper.make_node("Add", ["x", "x"], ["twice"]),
            helper.make_node("Add", ["twice", "nothing"], ["y"]),
        ]
    )


def centred() -> bytes:
    """`y = x - mean of the rows`: what a row gives depends on the others."""
    return _finish(
        [
            helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["x", "mean"], ["y"]),
        ]
    )


def _tensor(name: str, values: np.ndarray) -> GoldenTensor:
    return GoldenTensor(name, values.dtype.name, list(values.shape), values.tobytes())


class Releaser:
    """Stands where the Verifier does. `offline` refuses what needs a network, `busy` for so many seconds."""

    def __init__(self) -> None:
        self.manifests: dict[str, Manifest] = {}
        self.blobs: dict[str, bytes] = {}
        self.golden: dict[str, GoldenVectors] = {}
        self.fetched: list[str] = []
        self.dropped: set[str] = set()
        #: The models that each version was to be made of.
        self.bases: dict[int, list[ModelRef]] = {}
        self.offline = False
        self.kept: set[int] = set()
        self.busy = 0.0

    def release(
        self,
        version: int,
        *variants: tuple[str, bytes] | tuple[str, bytes, float] | tuple[str, bytes, float, str],
        outputs: np.ndarray = ROWS * 2,
        inputs: np.ndarray = ROWS,
    ) -> ModelRef:
        """Variants as (name, content, quality, runtime)."""
        made = []
        for name, content, *more in variants:
            digest = sha256_hex(content)
            self.blobs[digest] = content
            spec = [TensorSpec("x", "float32", [-1, 4])], [TensorSpec("y", "float32", [-1, 4])]
            quality = float(more[0]) if more else None
            runtime = str(more[1]) if len(more) > 1 else "onnx"
            made.append(
                Variant(name, runtime, Blob(digest, len(content)), *spec, quality=quality)  # type: ignore[arg-type]
            )
        manifest = Manifest(
            API_VERSION,
            "m",
            version,
            "2026-11-24T00:00:00Z",
            [],
            made,
            Golden(Blob("0" * 64, 1), 1e-5, 1e-4),
            Lineage("test", {}, "none", "0" * 64, 1, "all", {}),
        )
        ref = ModelRef("m", version, sha256_hex(repr((version, made)).encode()))
        self.manifests[ref.digest] = manifest
        self.golden[ref.digest] = GoldenVectors([_tensor("x", inputs)], [_tensor("y", outputs)])
        return ref

    def fetch_manifest(self, ref: ModelRef) -> Manifest:
        if self.offline:
            raise Unavailable("no network")
        return self.manifests[ref.digest]

    def collect(self, kept: Mapping[ModelRef, Collection[str] | None]) -> int:
        self.kept = {ref.version for ref in kept}
        known = {digest: {blob.digest for blob in made.blobs()} for digest, made in self.manifests.items()}
        keep = {ref.digest for ref in kept}
        for ref, blobs in kept.items():
            keep |= known[ref.digest] if blobs is None else {"0" * 64, *blobs}
        self.dropped = {digest for blobs in known.values() for digest in blobs} - keep
        return 0

    def reopen_manifest(self, ref: ModelRef) -> Manifest:
        return self.manifests[ref.digest]

    def fetch_blobs(self, manifest: Manifest, variant: Variant, earlier: Sequence[ModelRef] = ()) -> None:
        if self.offline:
            raise Unavailable("no network")
        if self.busy:
            raise Unavailable("32 downloads are running", retry_after=self.busy)
        self.fetched.append(variant.name)
        self.dropped.discard(variant.blob.digest)
        if earlier:
            self.bases[manifest.version] = list(earlier)

    def open(self, ref: ModelRef, manifest: Manifest, variant: Variant) -> VerifiedPackage:
        assert variant.blob.digest not in self.dropped, "it is not on the disk any more"
        content = self.blobs[variant.blob.digest]
        if sha256_hex(content) != variant.blob.digest:
            raise DigestMismatch("damaged")
        return VerifiedPackage(_KEY, ref, manifest, variant, content, self.golden[ref.digest])


class Watched(Engine):
    """A real engine that remembers what it was asked to open."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.opened: list[tuple[str, SlotPolicy, LoadOptions, bool]] = []

    def open(self, runtime: Any, content: bytes, name: str, policy: Any = None, options: Any = None,
             *, batchable: bool = False) -> Runner:  # fmt: skip
        self.opened.append((name, policy, options, batchable))
        return super().open(runtime, content, name, policy, options, batchable=batchable)

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.opened]


@pytest.fixture
def releaser() -> Releaser:
    return Releaser()


@pytest.fixture
def engine() -> Iterator[Watched]:
    made = Watched()
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def models() -> dict[str, bytes]:
    return {"fast": doubler(), "slow": slow_doubler(), "centred": centred(), "narrow": narrow()}


@pytest.fixture
def until() -> Callable[..., Any]:
    return wait_until


@pytest.fixture
def watched() -> type[Watched]:
    """For tests that make an engine themselves."""
    return Watched
