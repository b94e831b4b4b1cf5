"""Package models that were trained elsewhere: ONNX and TFLite files, as one or several variants."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgeward.clock import Clock
from edgeward.errors import InvalidDocument, PackageError, UsageError
from edgeward.wire.package import Decision, FeatureBaseline, GoldenVectors, Lineage, Runtime, TensorSpec
from edgeward.wire.providers import check_providers
from models.datasets import load_csv
from models.inspect import Arrays, LoadedModel, from_bfloat16, largest_error, to_bfloat16
from models.package import (
    GOLDEN_ATOL,
    GOLDEN_ROWS,
    GOLDEN_RTOL,
    ModelFile,
    Package,
    baseline_of,
    check_free,
    golden_array,
    golden_tensor,
    load_package,
    write_package,
)

_SUFFIXES: dict[str, Runtime] = {".onnx": "onnx", ".tflite": "tflite"}


@dataclass(frozen=True)
class Brought:
    """A model file that becomes a variant. `providers` are those it is meant for, best first."""

    name: str
    path: Path
    runtime: Runtime
    providers: tuple[str, ...] = ()
    quality: float | None = None


@dataclass(frozen=True)
class Reference:
    """What golden vectors are made of: inputs by tensor name, or a package that has vectors already."""

    inputs: Path | None = None
    package: Path | None = None


@dataclass(frozen=True)
class _Golden:
    vectors: GoldenVectors
    tolerance: tuple[float, float]
    features: list[str]
    lineage: Lineage
    decision: Decision | None = None
    baseline: dict[str, FeatureBaseline] = field(default_factory=dict)


def parse_variant(text: str) -> Brought:
    """`NAME=FILE`; the runtime follows from the file's ending. Raises UsageError."""
    name, equals, path = text.partition("=")
    runtime = _SUFFIXES.get(Path(path).suffix.lower())
    if not equals or not name or runtime is None:
        raise UsageError(f"{text!r} is not a variant", hint="expected NAME=FILE.onnx or NAME=FILE.tflite")
    return Brought(name, Path(path), runtime)


def bring(
    variants: list[Brought],
    out: Path,
    *,
    model: str,
    version: int,
    clock: Clock,
    reference: Reference,
    threshold: float | None = None,
    check: bool = True,
    tolerance: tuple[float, float] | None = None,
) -> Package:
    """Package files from elsewhere; the first variant is the reference for the others.

    Golden inputs are the rows of a CSV for a model with one input `[rows, features]`, or the arrays of an
    `.npz` file by tensor name for any model. Golden outputs are the first variant's own answers, or those
    of the reference package; every variant must reproduce them within `tolerance` (atol, rtol) unless
    `check` is off. Raises PackageError, InvalidDocument.
    """
    check_free(out)
    for variant in variants:
        check_providers(variant.providers, f"variant {variant.name}: providers")
    loaded = [_load(variant) for variant in variants]
    for variant, other in zip(variants[1:], loaded[1:], strict=True):
        _check_same_signature(variants[0].name, loaded[0], variant.name, other)
    if reference.package is not None:
        golden = _from_package(reference.package)
    elif reference.inputs is not None:
        golden = _from_inputs(variants[0], loaded[0], reference.inputs, threshold)
    else:
        raise InvalidDocument("expected golden inputs or a package to take them from")
    limits = tolerance or golden.tolerance
    if check:
        for variant, opened in zip(variants, loaded, strict=True):
            _check_golden(opened, golden.vectors, limits, str(variant.path))
    files = [
        ModelFile(
            variant.name,
            variant.runtime,
            variant.path.read_bytes(),
            opened.inputs,
            opened.outputs,
            quality=variant.quality,
            providers=list(variant.providers),
        )
        for variant, opened in zip(variants, loaded, strict=True)
    ]
    return write_package(
        out,
        model=model,
        version=version,
        files=files,
        golden=golden.vectors,
        tolerance=limits,
        features=golden.features,
        lineage=golden.lineage,
        clock=clock,
        decision=golden.decision,
        baseline=golden.baseline,
    )


def _load(variant: Brought) -> LoadedModel:
    try:
        content = variant.path.read_bytes()
    except OSError as error:
        raise PackageError(f"{variant.path}: cannot read it: {error.strerror}") from None
    return LoadedModel(content, variant.runtime, str(variant.path))


def _check_same_signature(name: str, one: LoadedModel, other_name: str, other: LoadedModel) -> None:
    def shown(specs: list[TensorSpec]) -> str:
        return ", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in specs)

    for what, left, right in (("inputs", one.inputs, other.inputs), ("outputs", one.outputs, other.outputs)):
        if [(s.name, s.dtype, len(s.shape)) for s in left] != [
            (s.name, s.dtype, len(s.shape)) for s in right
        ]:
            raise PackageError(
                f"variant {other_name} has the {what} {shown(right)}; variant {name} has {shown(left)}",
                hint="variants of one model must be called alike",
            )


def _from_package(folder: Path) -> _Golden:
    source = load_package(folder)
    manifest = source.manifest
    return _Golden(
        source.golden(),
        (manifest.golden.atol, manifest.golden.rtol),
        manifest.features,
        manifest.lineage,
        manifest.decision,
        manifest.baseline,
    )


def _from_inputs(variant: Brought, loaded: LoadedModel, path: Path, threshold: float | None) -> _Golden:
    decision = None if threshold is None else Decision(loaded.outputs[-1].name, threshold)
    if path.suffix.lower() == ".npz":
        inputs = _arrays(loaded, path)
        rows = max((len(array) for array in inputs.values() if array.ndim), default=1)
        features: list[str] = []
        baseline: dict[str, FeatureBaseline] = {}
        lineage = Lineage("brought", {"file": variant.path.name}, path.name, "", rows, "0:1", {})
    else:
        data = load_csv(path)
        spec = _single_matrix(loaded, str(variant.path))
        if spec.shape[-1] not in (-1, len(data.features)):
            raise InvalidDocument(
                f"has {len(data.features)} feature columns, input {spec.name} expects {spec.shape[-1]}",
                source=str(path),
            )
        rows_given = data.values[:GOLDEN_ROWS]
        inputs = {
            spec.name: to_bfloat16(rows_given) if spec.dtype == "bfloat16" else rows_given.astype(spec.dtype)
        }
        features, baseline = data.features, baseline_of(data.values, data.features)
        lineage = Lineage(
            "brought", {"file": variant.path.name}, data.name, data.digest(), data.rows, "0:1", {}
        )
    outputs = loaded.run(inputs)
    vectors = GoldenVectors(
        [golden_tensor(spec.name, inputs[spec.name], _golden_type(spec)) for spec in loaded.inputs],
        [golden_tensor(spec.name, outputs[spec.name], _golden_type(spec)) for spec in loaded.outputs],
    )
    return _Golden(vectors, (GOLDEN_ATOL, GOLDEN_RTOL), features, lineage, decision, baseline)


def _golden_type(spec: TensorSpec) -> str:
    return spec.dtype if spec.dtype == "bfloat16" else ""


def _arrays(loaded: LoadedModel, path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InvalidDocument(f"cannot read it: {error}", source=str(path)) from None
    wanted = {spec.name: spec for spec in loaded.inputs}
    if set(found) != set(wanted):
        raise InvalidDocument(
            f"has the arrays {', '.join(found) or 'none'}, the model's inputs are {', '.join(wanted)}",
            source=str(path),
        )
    for name, array in found.items():
        spec = wanted[name]
        fits = len(array.shape) == len(spec.shape) and all(
            size in (-1, have) for size, have in zip(spec.shape, array.shape, strict=True)
        )
        dtype = "bytes" if array.dtype.kind in "US" else array.dtype.name
        if spec.dtype == "bfloat16" and array.dtype in (np.uint16, np.dtype("V2")):
            # Raw, or as NumPy saves an array of ml_dtypes' type.
            dtype, found[name] = "bfloat16", array.view(np.uint16)
        if dtype != spec.dtype or not fits:
            raise InvalidDocument(
                f"is {dtype} {list(array.shape)}, expected {spec.dtype} {spec.shape}",
                source=str(path),
                field=name,
            )
    return {name: np.ascontiguousarray(found[name]) for name in wanted}


def _single_matrix(loaded: LoadedModel, source: str) -> TensorSpec:
    inputs = loaded.inputs
    if len(inputs) != 1 or len(inputs[0].shape) != 2:
        shapes = ", ".join(f"{spec.name} {spec.shape}" for spec in inputs)
        raise PackageError(
            f"{source}: a CSV fits one input of shape [rows, features], it has {shapes}",
            hint="give the golden inputs as an .npz file with an array for each input",
        )
    if loaded.runtime == "onnx" and inputs[0].shape[0] != -1:
        raise PackageError(
            f"{source}: input {inputs[0].name} takes exactly {inputs[0].shape[0]} rows at a time",
            hint="export it with a free first dimension (dynamic axis), or give golden inputs as .npz",
        )
    return inputs[0]


def _check_golden(
    loaded: LoadedModel, golden: GoldenVectors, tolerance: tuple[float, float], source: str
) -> None:
    got = loaded.run({tensor.name: golden_array(tensor) for tensor in golden.inputs})
    for tensor in golden.outputs:
        if tensor.name not in got:
            raise PackageError(f"{source}: has no output {tensor.name!r}", hint=f"it has {', '.join(got)}")
        mine, want = got[tensor.name], golden_array(tensor)
        if tensor.dtype == "bfloat16":
            mine, want = from_bfloat16(mine), from_bfloat16(want)
        off, limit = largest_error(mine, want, *tolerance)
        if off > limit:
            raise PackageError(
                f"{source}: output {tensor.name} is off its golden values by {off:.3g}, limit {limit:.3g}",
                hint="widen --atol and --rtol, package it with its own golden inputs, or skip the check on purpose",
            )
