"""Between arrays and tensors as bytes, and rows of several requests as one batch."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np

from agent.runtime.port import Arrays, Tensor
from edgeward.errors import RuntimeFault
from edgeward.wire.tensors import pack_elements, unpack_elements

_LENGTH = struct.Struct("<I")


def to_tensor(name: str, array: np.ndarray) -> Tensor:
    """An array as bytes; text becomes UTF-8, an array of objects `bytes`."""
    if array.dtype.kind in "OUS":
        items = array.reshape(-1).tolist()
        data = pack_elements(item if isinstance(item, bytes) else str(item).encode() for item in items)
        return Tensor(name, "bytes", array.shape, data)
    whole = np.ascontiguousarray(array)
    if whole.dtype.byteorder == ">":
        whole = whole.astype(whole.dtype.newbyteorder("<"))
    dtype = whole.dtype.name
    # The view keeps the array alive.
    return Tensor(name, dtype, array.shape, whole.reshape(-1).view(np.uint8).data if whole.size else b"")


def to_array(tensor: Tensor) -> np.ndarray:
    """The array over the tensor's own bytes, not copied. bfloat16 comes as its raw uint16.

    Raises RuntimeFault when data, type and shape do not fit.
    """
    try:
        if tensor.dtype == "bytes":
            items = unpack_elements(tensor.data)
            array = np.empty(len(items), object)
            array[:] = items
            return array.reshape(tensor.shape)
        dtype = np.uint16 if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype)
        return np.frombuffer(tensor.data, dtype).reshape(tensor.shape)
    except (TypeError, ValueError) as error:
        raise RuntimeFault(f"tensor {tensor.name}: {error}") from None


def to_tensors(arrays: Arrays, dtypes: dict[str, str] | None = None) -> list[Tensor]:
    """`dtypes` names those that NumPy cannot: `{"output": "bfloat16"}`."""
    made = [to_tensor(name, array) for name, array in arrays.items()]
    if dtypes:
        made = [Tensor(item.name, dtypes.get(item.name, item.dtype), item.shape, item.data) for item in made]
    return made


def to_arrays(tensors: Sequence[Tensor]) -> Arrays:
    return {tensor.name: to_array(tensor) for tensor in tensors}


Shapes = tuple[tuple[str, str, tuple[int, ...]], ...]


def batch_key(inputs: Sequence[Tensor]) -> Shapes | None:
    """Requests with the same key may be joined along their first dimension; None: not at all."""
    key = []
    rows = -1
    for tensor in inputs:
        shape = tensor.shape
        if not shape or (shape[0] != rows and rows >= 0):
            return None
        rows = shape[0]
        key.append((tensor.name, tensor.dtype, shape[1:]))
    return tuple(key) or None


def join(requests: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Requests of the same key as one: their rows one after the other."""
    first = requests[0]
    if len(requests) == 1:
        return list(first)
    rows = sum(request[0].shape[0] for request in requests)
    return [
        Tensor(
            tensor.name,
            tensor.dtype,
            (rows, *tensor.shape[1:]),
            b"".join([request[index].data for request in requests]),
        )
        for index, tensor in enumerate(first)
    ]


def split(outputs: Sequence[Tensor], rows: Sequence[int]) -> list[list[Tensor]] | None:
    """The outputs of each request; None when an output does not have one row per input row."""
    total = sum(rows)
    if any(not tensor.shape or tensor.shape[0] != total for tensor in outputs):
        return None
    parts: list[list[Tensor]] = [[] for _ in rows]
    for tensor in outputs:
        inner = tensor.shape[1:]
        if tensor.dtype == "bytes":
            ends = _element_ends(tensor.data)
            per_row = math.prod(inner)
            cuts = [0, *(ends[count * per_row - 1] if count * per_row else 0 for count in _sums(rows))]
        else:
            size = len(tensor.data) // total if total else 0
            cuts = [0, *(count * size for count in _sums(rows))]
        for index, count in enumerate(rows):
            data = tensor.data[cuts[index] : cuts[index + 1]]
            parts[index].append(Tensor(tensor.name, tensor.dtype, (count, *inner), data))
    return parts


def _sums(rows: Sequence[int]) -> list[int]:
    sums, total = [], 0
    for count in rows:
        total += count
        sums.append(total)
    return sums


def _element_ends(data: bytes | memoryview) -> list[int]:
    ends, at = [], 0
    while at < len(data):
        at += 4 + _LENGTH.unpack_from(data, at)[0]
        ends.append(at)
    return ends
