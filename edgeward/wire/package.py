"""The model package: one signed manifest and the blobs it names by digest.

The manifest is canonical JSON (OLPC canonical JSON as used by TUF). Its SHA-256 is the digest of the
ModelVersion. It is a TUF target at `{model}/{version}/manifest.json`; blobs are content-addressed.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec
from msgspec import Struct

from edgeward.errors import InvalidDocument
from edgeward.fields import explain, split_error
from edgeward.identifiers import check_digest, check_name

Runtime = Literal["onnx", "tflite"]

MAX_MANIFEST_BYTES = 4 << 20
GOLDEN_MEDIA_TYPE = "application/vnd.edgeward.golden.v1+msgpack"

_TARGET = re.compile(r"([a-z0-9-]+)/([1-9][0-9]{0,8})/manifest\.json")


def target_path(model: str, version: int) -> str:
    """The TUF target path of a model version's manifest."""
    return f"{model}/{version}/manifest.json"


def parse_target_path(path: str) -> tuple[str, int]:
    """The model name and version of a target path. Raises InvalidDocument for any other path."""
    match = _TARGET.fullmatch(path)
    if match is None:
        raise InvalidDocument("not a manifest's target path", source=path[:200])
    return match[1], int(match[2])


class Blob(Struct, frozen=True, forbid_unknown_fields=True):
    """A content-addressed file. `size` in bytes; it caps the download."""

    digest: str
    size: int
    media_type: str = "application/octet-stream"


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A model input or output. `dtype` is a NumPy name; -1 in `shape` is a free dimension."""

    name: str
    dtype: str
    shape: list[int]


class Variant(Struct, frozen=True, forbid_unknown_fields=True):
    """One executable form of the model. `quality` is the recipe's main metric for this form."""

    name: str
    runtime: Runtime
    blob: Blob
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    providers: list[str] = []
    quality: float | None = None


class FeatureBaseline(Struct, frozen=True, forbid_unknown_fields=True):
    """A feature's distribution in training: `edges` (n-1 inner bin edges, ascending) and `proportions` (n bins)."""

    edges: list[float]
    proportions: list[float]


class Golden(Struct, frozen=True, forbid_unknown_fields=True):
    """Reference inputs and outputs (a `GoldenVectors` blob) and how far outputs may be off.

    An output passes when `|got - want| <= atol + rtol * |want|` for every element.
    """

    blob: Blob
    atol: float
    rtol: float


class Decision(Struct, frozen=True, forbid_unknown_fields=True):
    """How the model's output becomes a verdict: the named output against a threshold.

    `output` names a model output; of a multi-column output, the last column counts.
    """

    output: str
    threshold: float
    direction: Literal["above", "below"] = "above"


class Lineage(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the model comes from: enough to train it again and to audit it."""

    recipe: str
    parameters: dict[str, Any]
    dataset: str
    dataset_digest: str
    rows: int
    split: str
    libraries: dict[str, str]
    code: str = ""


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    api_version: str
    model: str
    version: int
    created_at: str
    features: list[str]
    variants: list[Variant]
    golden: Golden
    lineage: Lineage
    metrics: dict[str, float] = {}
    baseline: dict[str, FeatureBaseline] = {}
    decision: Decision | None = None
    description: str = ""

    def blobs(self) -> list[Blob]:
        return [variant.blob for variant in self.variants] + [self.golden.blob]


class GoldenTensor(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    dtype: str
    shape: list[int]
    data: bytes


class GoldenVectors(Struct, frozen=True, forbid_unknown_fields=True):
    """Little-endian, C-ordered tensors. MessagePack, never pickle."""

    inputs: list[GoldenTensor]
    outputs: list[GoldenTensor]


def decode_manifest(data: bytes, *, source: str = "manifest") -> Manifest:
    """Parse and check a manifest. Raises InvalidDocument naming the field that is wrong."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise InvalidDocument(f"larger than {MAX_MANIFEST_BYTES} bytes", source=source)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.ValidationError as error:
        text, field = split_error(error)
        raise InvalidDocument(explain(text, Manifest, field), source=source, field=field) from None
    except msgspec.DecodeError as error:
        raise InvalidDocument(str(error), source=source) from None
    check_name(manifest.model, "model", source)
    if manifest.version < 1:
        raise InvalidDocument("expected a version >= 1", source=source, field="version")
    if not manifest.variants:
        raise InvalidDocument("expected at least one variant", source=source, field="variants")
    names = [variant.name for variant in manifest.variants]
    for name in names:
        check_name(name, "variants.name", source)
    if len(set(names)) != len(names):
        raise InvalidDocument("variant names repeat", source=source, field="variants")
    for blob in manifest.blobs():
        check_digest(blob.digest, "blob.digest")
        if blob.size <= 0:
            raise InvalidDocument("expected a size > 0", source=source, field="blob.size")
    for feature, baseline in manifest.baseline.items():
        if len(baseline.proportions) != len(baseline.edges) + 1:
            raise InvalidDocument(
                "expected one proportion more than edges", source=source, field=f"baseline.{feature}"
            )
    return manifest
