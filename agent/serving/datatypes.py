"""The Open Inference Protocol's tensor datatypes, beside NumPy's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["bool", "int", "float", "text"]


@dataclass(frozen=True, slots=True)
class Datatype:
    """`size` bytes per element (0: each has its own length), `code` of the struct module.

    `kind` is what an element is in JSON; None: it has no JSON form and travels as binary data only.
    """

    name: str
    dtype: str
    size: int
    code: str
    kind: Kind | None
    floating: bool = False


ALL = (
    Datatype("BOOL", "bool", 1, "?", "bool"),
    Datatype("UINT8", "uint8", 1, "B", "int"),
    Datatype("UINT16", "uint16", 2, "H", "int"),
    Datatype("UINT32", "uint32", 4, "I", "int"),
    Datatype("UINT64", "uint64", 8, "Q", "int"),
    Datatype("INT8", "int8", 1, "b", "int"),
    Datatype("INT16", "int16", 2, "h", "int"),
    Datatype("INT32", "int32", 4, "i", "int"),
    Datatype("INT64", "int64", 8, "q", "int"),
    Datatype("FP16", "float16", 2, "e", None, floating=True),
    Datatype("BF16", "bfloat16", 2, "", None, floating=True),
    Datatype("FP32", "float32", 4, "f", "float", floating=True),
    Datatype("FP64", "float64", 8, "d", "float", floating=True),
    Datatype("BYTES", "bytes", 0, "", "text"),
)
BY_DTYPE = {datatype.dtype: datatype for datatype in ALL}
BY_NAME = {datatype.name: datatype for datatype in ALL}


def wire_name(dtype: str) -> str:
    """The protocol's name of a NumPy type; of one that the protocol does not know, its own in capitals."""
    known = BY_DTYPE.get(dtype)
    return known.name if known else dtype.upper()


def not_finite(datatype: Datatype, data: bytes | memoryview) -> int | None:
    """The index of the first NaN or infinity, if there is one."""
    if datatype.dtype == "bfloat16":
        wrong = np.bitwise_and(np.frombuffer(data, "<u2"), 0x7F80) == 0x7F80
    else:
        finite = np.isfinite(np.frombuffer(data, datatype.dtype))
        if finite.all():
            return None
        wrong = ~finite
    return int(wrong.argmax()) if wrong.any() else None
