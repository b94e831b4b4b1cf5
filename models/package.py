"""Build, check and read model packages: one folder with `manifest.json` and `blobs/<sha256>`.

`manifest.sha256` holds the manifest's digest, so that a damage before signing is found, too.
"""

from __future__ import annotations

import datetime
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgeward.clock import Clock
from edgeward.errors import Conflict, DigestMismatch, InvalidDocument, PackageError
from edgeward.formats import check_model_head
from edgeward.identifiers import check_name
from edgeward.storage import sha256_file, sha256_hex, write_atomic
from edgeward.wire import API_VERSION
from edgeward.wire.package import (
    GOLDEN_MEDIA_TYPE,
    Blob,
    Decision,
    FeatureBaseline,
    Golden,
    GoldenTensor,
    GoldenVectors,
    Lineage,
    Manifest,
    Runtime,
    TensorSpec,
    Variant,
    decode_manifest,
)
from edgeward.wire.tensors import pack_elements, unpack_elements

Floats = npt.NDArray[np.float32]

MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"

BASELINE_BINS = 10
GOLDEN_ATOL, GOLDEN_RTOL = 1e-4, 1e-3
GOLDEN_ROWS = 64
MEDIA_TYPES: dict[Runtime, str] = {"onnx": "application/onnx", "tflite": "application/vnd.tflite"}


@dataclass(frozen=True)
class ModelFile:
    """One executable form, before packaging."""

    name: str
    runtime: Runtime
    content: bytes
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    quality: float | None = None
    providers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Package:
    """A package folder whose every blob has the size and digest that the manifest states."""

    folder: Path
    manifest: Manifest
    manifest_bytes: bytes

    @property
    def digest(self) -> str:
        return sha256_hex(self.manifest_bytes)

    def blob(self, blob: Blob) -> Path:
        return self.folder / "blobs" / blob.digest

    def golden(self) -> GoldenVectors:
        return msgspec.msgpack.decode(self.blob(self.manifest.golden.blob).read_bytes(), type=GoldenVectors)


def baseline_of(values: Floats, features: list[str]) -> dict[str, FeatureBaseline]:
    """Decile bins per feature for the population stability index; fewer where values repeat."""
    baselines = {}
    for index, feature in enumerate(features):
        column = values[:, index].astype(np.float64)
        inner = np.linspace(0, 1, BASELINE_BINS + 1)[1:-1]
        edges = np.unique(np.quantile(column, inner))
        counts = np.bincount(np.searchsorted(edges, column, side="right"), minlength=len(edges) + 1)
        baselines[feature] = FeatureBaseline(edges.tolist(), (counts / counts.sum()).tolist())
    return baselines


def golden_tensor(name: str, values: npt.NDArray[Any], dtype: str = "") -> GoldenTensor:
    """`dtype` is the array's own, but for `bfloat16`, which comes as uint16."""
    if values.dtype.kind in "OUS":
        items = [
            item if isinstance(item, bytes) else str(item).encode() for item in values.reshape(-1).tolist()
        ]
        return GoldenTensor(name, "bytes", list(values.shape), pack_elements(items))
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"))
    return GoldenTensor(name, dtype or str(values.dtype), list(values.shape), little.tobytes())


def golden_array(tensor: GoldenTensor) -> npt.NDArray[Any]:
    """Raises PackageError when data and shape do not fit. Text comes as an array of `bytes` objects, bfloat16
    as its raw uint16."""
    try:
        if tensor.dtype == "bytes":
            array = np.empty(len(items := unpack_elements(tensor.data)), object)
            array[:] = items
            return array.reshape(tensor.shape)
        dtype = np.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype)
        return np.frombuffer(tensor.data, dtype.newbyteorder("<")).reshape(tensor.shape)
    except (TypeError, ValueError) as error:
        raise PackageError(f"golden tensor {tensor.name}: {error}") from None


def check_free(folder: Path) -> None:
    """Raises Conflict when something is in the way of a new package."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise Conflict(f"{folder} is not an empty folder", hint="choose another --out, or remove it")


def write_package(
    folder: Path,
    *,
    model: str,
    version: int,
    files: list[ModelFile],
    golden: GoldenVectors,
    tolerance: tuple[float, float],
    features: list[str],
    lineage: Lineage,
    clock: Clock,
    decision: Decision | None = None,
    baseline: dict[str, FeatureBaseline] | None = None,
    metrics: dict[str, float] | None = None,
    description: str = "",
) -> Package:
    """Write a package; `tolerance` is `(atol, rtol)` for the golden outputs.

    Raises Conflict when `folder` holds something already, PackageError for a refused file.
    """
    check_name(model, "model")
    check_free(folder)
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "blobs").mkdir(parents=True)
    try:
        for file in files:
            check_model_head(file.content[:64], file.runtime, file.name)
        variants = [
            Variant(
                file.name,
                file.runtime,
                _store(staging, file.content, MEDIA_TYPES[file.runtime]),
                file.inputs,
                file.outputs,
                providers=file.providers,
                quality=file.quality,
            )
            for file in files
        ]
        vectors = _store(staging, msgspec.msgpack.encode(golden), GOLDEN_MEDIA_TYPE)
        created = datetime.datetime.fromtimestamp(int(clock.now()), datetime.UTC)
        manifest = Manifest(
            api_version=API_VERSION,
            model=model,
            version=version,
            created_at=created.isoformat(),
            features=features,
            variants=variants,
            golden=Golden(vectors, *tolerance),
            lineage=lineage,
            metrics=metrics or {},
            baseline=baseline or {},
            decision=decision,
            description=description,
        )
        content = msgspec.json.encode(manifest, order="deterministic")
        decode_manifest(content)
        write_atomic(staging / MANIFEST, content)
        write_atomic(staging / DIGEST, f"{sha256_hex(content)}\n".encode())
        if folder.exists():
            folder.rmdir()
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Package(folder, manifest, content)


def _store(staging: Path, content: bytes, media_type: str) -> Blob:
    digest = sha256_hex(content)
    write_atomic(staging / "blobs" / digest, content)
    return Blob(digest, len(content), media_type)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidDocument(
            f"cannot read it: {error.strerror}",
            source=str(path),
            hint="expected a folder made by `edgeward train` or `edgeward package create`",
        ) from None


def load_package(folder: Path) -> Package:
    """Read a package folder and check every byte of it.

    Raises InvalidDocument for a bad manifest, DigestMismatch for a changed manifest or blob, PackageError
    for a missing one or one of a refused format.
    """
    path = folder / MANIFEST
    content, digest = _read(path), _read(folder / DIGEST)
    if digest.strip() != sha256_hex(content).encode():
        raise DigestMismatch(
            f"{path}: its SHA-256 is not the one in {folder / DIGEST}; the package was changed",
            hint="make it again, or take another copy",
        )
    package = Package(folder, decode_manifest(content, source=str(path)), content)
    for blob in package.manifest.blobs():
        file = package.blob(blob)
        if not file.is_file():
            raise PackageError(f"{file}: the blob is missing")
        if file.stat().st_size != blob.size or sha256_file(file) != blob.digest:
            raise DigestMismatch(
                f"{file}: the content is not what the manifest names; the package was changed"
            )
    for variant in package.manifest.variants:
        with package.blob(variant.blob).open("rb") as file_:
            check_model_head(file_.read(64), variant.runtime, str(package.blob(variant.blob)))
    return package
