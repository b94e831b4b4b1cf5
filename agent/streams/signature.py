"""Does a stream fit a model? And how its examples become the model's tensors. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeward.conditions import compile_condition
from edgeward.errors import InvalidDocument, PackageError
from edgeward.wire.package import Decision, TensorSpec
from edgeward.wire.stream_checks import RESERVED
from edgeward.wire.streams import CameraSource, FilesSource, StreamSpec

Array = npt.NDArray[Any]
#: `rows`: `[n, features]`; `columns`: one `[n, 1]` input per feature; `stack`: `[n, count, features]`;
#: `nhwc` and `nchw`: images.
Layout = Literal["rows", "columns", "stack", "nhwc", "nchw"]


def _shown(specs: list[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in specs)


@dataclass(frozen=True)
class Signature:
    """How a stream's examples go into the model. `single`: one example at a time."""

    layout: Layout
    inputs: list[TensorSpec]
    single: bool

    def feed(self, examples: Array, features: list[str]) -> dict[str, Array]:
        """`examples` `[n, ...]` as the model's input tensors.

        Images are uint8; for a floating-point input they are divided by 255.
        """
        if self.layout == "columns":
            return {
                spec.name: np.ascontiguousarray(examples[:, [features.index(spec.name)]], dtype=spec.dtype)
                for spec in self.inputs
            }
        (spec,) = self.inputs
        if self.layout == "nchw":
            examples = examples.transpose(0, 3, 1, 2)
        dtype = np.dtype(spec.dtype)
        if self.layout in ("nchw", "nhwc") and dtype.kind == "f":
            return {spec.name: np.ascontiguousarray(examples, dtype=dtype) / dtype.type(255)}
        return {spec.name: np.ascontiguousarray(examples, dtype=dtype)}

    def misfits(self, examples: Array, features: list[str]) -> dict[int, tuple[str, str]]:
        """Which of `examples` `[n, ...]` the model's types cannot hold: the feature, and what is wrong.

        To convert them all the same would show the model, and conditions, other numbers than the sensor's.
        """
        if self.layout in ("nchw", "nhwc"):
            return {}
        found: dict[int, tuple[str, str]] = {}
        if self.layout == "columns":
            columns = [(features.index(spec.name), spec.dtype) for spec in self.inputs]
            for column, dtype in columns:
                _find_misfits(examples[:, [column]], [features[column]], dtype, found)
        else:
            _find_misfits(examples, features, self.inputs[0].dtype, found)
        return found


def _find_misfits(values: Array, features: list[str], name: str, found: dict[int, tuple[str, str]]) -> None:
    """`values` is `[n, ..., len(features)]`."""
    dtype = np.dtype(name)
    if dtype.kind == "f":
        bad = np.abs(values) > np.finfo(dtype).max
    elif dtype.kind == "b":
        bad = (values != 0) & (values != 1)
    else:
        limits = np.iinfo(dtype)
        # The largest 64-bit integers are no doubles: the next double is one too many already.
        bad = (values < limits.min) | (values >= float(limits.max) + 1) | (values != np.floor(values))
    if not bad.any():
        return
    for place in np.argwhere(bad).tolist():
        feature = features[place[-1]]
        text = f"{feature}: {float(values[tuple(place)])!r} is not a number of the model's type {name}"
        found.setdefault(place[0], (feature, text))


def match(
    spec: StreamSpec,
    inputs: list[TensorSpec],
    outputs: list[TensorSpec],
    decision: Decision | None,
    made_from: Sequence[str] = (),
) -> Signature:
    """How `spec` feeds a model of this signature; `made_from` are the features its package names, in order.

    Raises PackageError naming the tensor and what the stream gives, InvalidDocument for a condition that
    names neither an output nor a feature.
    """
    source = spec.source.one()
    if isinstance(source, CameraSource) or (isinstance(source, FilesSource) and source.format == "image"):
        found = _images(inputs, source.height, source.width)
    elif spec.window.aggregate == "stack":
        found = _matrix(inputs, "stack", [spec.window.count, len(spec.features)])
    elif len(inputs) > 1 and {item.name for item in inputs} == set(spec.features):
        found = _columns(inputs)
    else:
        found = _matrix(inputs, "rows", [len(spec.features)])
    if found.layout in ("rows", "stack") and made_from and list(made_from) != spec.features:
        order = "in another order" if sorted(made_from) == sorted(spec.features) else "other ones"
        raise PackageError(
            f"the model was made from the features {', '.join(made_from)}, the stream gives {order}: "
            f"{', '.join(spec.features)}",
            hint="name them like the model does; source.fields says where each of them lies in a message",
        )
    for item in outputs:
        if item.dtype == "bytes":
            raise PackageError(f"output {item.name} is text, which a stream cannot store")
    if decision is not None and decision.output not in {item.name for item in outputs}:
        raise PackageError(f"the decision names output {decision.output!r}, the model has {_shown(outputs)}")
    _check_conditions(spec, outputs)
    return found


def _numeric(spec: TensorSpec) -> None:
    if spec.dtype in ("bytes", "bfloat16"):
        raise PackageError(f"input {spec.name} has type {spec.dtype}, which a stream cannot give")


def _matrix(inputs: list[TensorSpec], layout: Layout, inner: list[int]) -> Signature:
    given = f"the stream gives one tensor [n, {', '.join(map(str, inner))}]"
    if len(inputs) != 1:
        raise PackageError(f"{given}, the model has the inputs {_shown(inputs)}")
    (spec,) = inputs
    _numeric(spec)
    fits = len(spec.shape) == len(inner) + 1 and all(
        want in (-1, have) for want, have in zip(spec.shape[1:], inner, strict=True)
    )
    if not fits or spec.shape[0] not in (-1, 1):
        raise PackageError(f"input {spec.name} expects {spec.shape}, {given}")
    return Signature(layout, inputs, spec.shape[0] == 1)


def _columns(inputs: list[TensorSpec]) -> Signature:
    for spec in inputs:
        _numeric(spec)
        if len(spec.shape) != 2 or spec.shape[1] not in (-1, 1) or spec.shape[0] not in (-1, 1):
            raise PackageError(f"input {spec.name} expects {spec.shape}, the stream gives [n, 1]")
    return Signature("columns", inputs, any(spec.shape[0] == 1 for spec in inputs))


def _images(inputs: list[TensorSpec], height: int, width: int) -> Signature:
    size = f"{height or 'any'} x {width or 'any'}"
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].shape[0] not in (-1, 1):
        raise PackageError(f"the stream gives images [n, height, width, 3], the model has {_shown(inputs)}")
    (spec,) = inputs
    _numeric(spec)
    layout: Layout = "nchw" if spec.shape[1] == 3 and spec.shape[3] != 3 else "nhwc"
    want = spec.shape[2:4] if layout == "nchw" else spec.shape[1:3]
    channels = spec.shape[1] if layout == "nchw" else spec.shape[3]
    if channels not in (-1, 3):
        raise PackageError(f"input {spec.name} expects {channels} channels, the stream gives 3")
    for name, expected, have in (("height", want[0], height), ("width", want[1], width)):
        if expected != -1 and expected != have:
            raise PackageError(
                f"input {spec.name} expects {name} {expected}, the stream gives {size}",
                hint=f"set {name}: {expected} in the stream's source",
            )
    return Signature(layout, inputs, spec.shape[0] == 1)


def columns_of(spec: TensorSpec) -> int:
    """How many columns an output has per example; 1 when that is free."""
    width = 1
    for size in spec.shape[1:]:
        width *= max(size, 1)
    return width


def _check_conditions(spec: StreamSpec, outputs: list[TensorSpec]) -> None:
    names = {item.name for item in outputs} | set(spec.features) | RESERVED
    for item in outputs:
        names |= {f"{item.name}[{index}]" for index in range(columns_of(item))}
    for index, action in enumerate(spec.actions):
        unknown = sorted(compile_condition(action.when).names - names)
        if unknown:
            raise InvalidDocument(
                f"{unknown[0]!r} is neither an output of the model nor a feature",
                field=f"spec.actions[{index}].when",
                hint=f"one of {', '.join(sorted(names))}",
            )
