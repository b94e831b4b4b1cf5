"""Do these arrays fit a model's inputs? Said before a runtime says it worse, or crashes. Pure."""

from __future__ import annotations

import numpy as np

from agent.runtime.port import Arrays
from edgeward.errors import RuntimeFault
from edgeward.wire.package import TensorSpec


def check_inputs(inputs: Arrays, specs: list[TensorSpec]) -> None:
    """Raises RuntimeFault naming the tensor, what was expected and what came."""
    for spec in specs:
        array = inputs.get(spec.name)
        if array is None:
            raise RuntimeFault(f"input {spec.name} is missing, expected {spec.dtype} {spec.shape}")
        if array.dtype.byteorder == ">":
            raise RuntimeFault(f"input {spec.name} is big-endian, which a runtime would misread")
        dtype = _dtype(array)
        expected = "uint16" if spec.dtype == "bfloat16" else spec.dtype
        if dtype != expected:
            raise RuntimeFault(f"input {spec.name} is {dtype}, expected {spec.dtype}")
        fits = len(array.shape) == len(spec.shape) and all(
            want in (-1, got) for want, got in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            raise RuntimeFault(f"input {spec.name} has shape {list(array.shape)}, expected {spec.shape}")
    if len(inputs) != len(specs):
        names = [spec.name for spec in specs]
        unknown = next(name for name in inputs if name not in names)
        raise RuntimeFault(f"unknown input {unknown}, the model takes {', '.join(names)}")


def _dtype(array: np.ndarray) -> str:
    return "bytes" if array.dtype.kind in "OSU" else array.dtype.name
