"""Inputs checked before a runtime sees them: native code answers wrong ones late, vaguely, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from agent.runtime.port import Arrays, BadInput
from edgeward.errors import RuntimeFault
from edgeward.wire.package import TensorSpec

#: What a tensor of this type is as an array here, where NumPy has no type of that name.
_CARRIERS = {"bfloat16": "uint16"}


def _shape_text(shape: Sequence[int]) -> str:
    return "[" + ", ".join("?" if size < 0 else str(size) for size in shape) + "]"


def _is_text(array: np.ndarray[Any, Any]) -> bool:
    return array.dtype.kind in "OSU"


class Signature:
    """A model's inputs, and whether given ones fit them.

    With `scalars_are_open` a shape `[]` says nothing: onnxruntime states it for tensors of unknown rank, too.
    """

    def __init__(self, specs: Sequence[TensorSpec], *, scalars_are_open: bool = False) -> None:
        """Raises RuntimeFault for a type that cannot be fed."""
        self.specs = list(specs)
        self._specs = {spec.name: spec for spec in specs}
        self._dtypes: dict[str, np.dtype[Any] | None] = {}
        for spec in specs:
            try:
                carrier = _CARRIERS.get(spec.dtype, spec.dtype)
                self._dtypes[spec.name] = None if spec.dtype == "bytes" else np.dtype(carrier)
            except TypeError:
                raise RuntimeFault(f"input {spec.name}: type {spec.dtype} is not supported") from None
        self._open = {spec.name for spec in specs if scalars_are_open and not spec.shape}

    def check(self, inputs: Arrays) -> Arrays:
        """The inputs as a runtime can take them: C-ordered, in this machine's byte order.

        Raises BadInput naming the tensor, what was expected and what came.
        """
        checked: Arrays = {}
        for name, spec in self._specs.items():
            value: Any = inputs.get(name)
            if value is None:
                raise BadInput(f"input {name}: missing; expected {spec.dtype} {_shape_text(spec.shape)}")
            if not isinstance(value, np.ndarray):
                raise BadInput(f"input {name}: expected an array, got {type(value).__name__}")
            dtype = self._dtypes[name]
            if not (_is_text(value) if dtype is None else value.dtype == dtype):
                value = self._swapped(spec, dtype, value)
            shape = value.shape
            if name not in self._open and (
                len(shape) != len(spec.shape)
                or any(want not in (-1, size) for want, size in zip(spec.shape, shape, strict=True))
            ):
                raise BadInput(
                    f"input {name}: expected shape {_shape_text(spec.shape)}, got {_shape_text(shape)}"
                )
            checked[name] = value if value.flags.c_contiguous else np.ascontiguousarray(value)
        if len(checked) != len(inputs):
            name = next(name for name in inputs if name not in self._specs)
            raise BadInput(f"input {name}: unknown; the model has {', '.join(self._specs) or 'none'}")
        return checked

    @staticmethod
    def _swapped(
        spec: TensorSpec, dtype: np.dtype[Any] | None, value: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """In this machine's byte order: runtimes read a foreign one as if it were their own."""
        if dtype is not None and value.dtype.newbyteorder("=") == dtype:
            return value.astype(dtype)
        got = "bytes" if _is_text(value) else value.dtype.name
        as_what = f" (as {_CARRIERS[spec.dtype]})" if spec.dtype in _CARRIERS else ""
        raise BadInput(f"input {spec.name}: expected {spec.dtype}{as_what}, got {got}")


def disagreement(specs: Sequence[TensorSpec], feed: Arrays) -> str:
    """Which inputs with a free number of rows have different ones; empty when none do.

    Whether a model minds only its run shows: shapes may be broadcast, or have nothing to do with one another.
    """
    rows = {
        spec.name: feed[spec.name].shape[0]
        for spec in specs
        if spec.shape and spec.shape[0] == -1 and feed[spec.name].shape
    }
    if len(set(rows.values())) < 2:
        return ""
    return "inputs differ in their first dimension: " + ", ".join(
        f"{name} has {count}" for name, count in rows.items()
    )


def text(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Elements as str objects. Raises BadInput for bytes that are no UTF-8 and for anything else."""
    made = np.empty(array.shape, object)
    flat = made.reshape(-1)
    for index, item in enumerate(array.reshape(-1).tolist()):
        if isinstance(item, bytes):
            try:
                item = item.decode()
            except UnicodeDecodeError:
                raise BadInput(f"input {name}: element {index} is not UTF-8") from None
        elif not isinstance(item, str):
            raise BadInput(f"input {name}: element {index}: expected text, got {type(item).__name__}")
        flat[index] = item
    return made


def encoded(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Elements as bytes objects, as they come back from a worker, too."""
    made = np.empty(array.shape, object)
    made.reshape(-1)[:] = [
        item if isinstance(item, bytes) else str(item).encode() for item in array.reshape(-1).tolist()
    ]
    return made
