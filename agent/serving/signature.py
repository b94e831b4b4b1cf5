"""A served model's tensors, prepared once so that each request is checked against them quickly."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

from agent.runtime.port import Tensor
from agent.serving.catalog import Served
from agent.serving.datatypes import BY_DTYPE, Datatype, Kind, not_finite, wire_name
from agent.serving.refusal import Refusal, bad
from agent.serving.statistics import ModelStatistics
from edgeward.wire.package import TensorSpec

_REMEMBERED_SHAPES = 64


class Field:
    """One input or output of a model. `label` is how errors name it."""

    __slots__ = ("_packers", "datatype", "label", "name", "shape")

    def __init__(self, role: str, spec: TensorSpec, datatype: Datatype) -> None:
        self.name = spec.name
        self.label = f"{role} '{spec.name}'"
        self.shape = tuple(spec.shape)
        self.datatype = datatype
        self._packers: dict[tuple[int, ...], struct.Struct] = {}

    def count(self, shape: tuple[int, ...]) -> int:
        """How many elements a request of this shape has. Raises Refusal when the model cannot take it."""
        expected = self.shape
        if (
            len(shape) != len(expected)
            or any(want not in (-1, got) for want, got in zip(expected, shape, strict=True))
            or any(size < 1 for size in shape)
        ):
            raise bad(f"{self.label}: expected shape {_show(expected)}, got {_show(shape)}")
        return prod(shape)

    def packer(self, shape: tuple[int, ...]) -> struct.Struct:
        """Packs and unpacks all elements of this shape. Raises Refusal as `count` does."""
        packer = self._packers.get(shape)
        if packer is None:
            count = self.count(shape)
            try:
                packer = struct.Struct(f"<{count}{self.datatype.code}")
            except struct.error:
                raise bad(f"{self.label}: shape {_show(shape)} has more elements than any request") from None
            if len(self._packers) < _REMEMBERED_SHAPES:
                self._packers[shape] = packer
        return packer

    def pack(self, shape: tuple[int, ...], values: Sequence[Any]) -> bytes:
        """Numbers or booleans as bytes. Raises Refusal when their number or one of them does not fit."""
        packer = self.packer(shape)
        try:
            return packer.pack(*values)
        except (struct.error, OverflowError):
            count = self.count(shape)
            if len(values) != count:
                raise bad(
                    f"{self.label}: shape {_show(shape)} has {count} elements, got {len(values)}"
                ) from None
            raise bad(f"{self.label}: {self._out_of_range(values)}") from None

    def _out_of_range(self, values: Sequence[Any]) -> str:
        one = struct.Struct("<" + self.datatype.code)
        for index, value in enumerate(values):
            try:
                one.pack(value)
            except (struct.error, OverflowError):
                return f"element {index} is out of the range of {self.datatype.name}"
        return f"an element is not {self.datatype.name}"

    def check_datatype(self, name: str) -> None:
        if name != self.datatype.name:
            raise bad(f"{self.label}: expected datatype {self.datatype.name}, got {name[:40]!r}")

    def check_data(self, shape: tuple[int, ...], data: bytes | memoryview, *, finite: bool) -> None:
        """Whether raw bytes are what datatype and shape promise. Raises Refusal."""
        count = self.count(shape)
        datatype = self.datatype
        if datatype.dtype == "bytes":
            problem = text_problem(data, count)
            if problem:
                raise bad(f"{self.label}: shape {_show(shape)} has {count} elements, {problem}")
            return
        if len(data) != count * datatype.size:
            raise bad(
                f"{self.label}: {datatype.name} of shape {_show(shape)} takes {count * datatype.size} bytes, "
                f"got {len(data)}"
            )
        if datatype.dtype == "bool" and bytes(data).translate(None, b"\x00\x01"):
            raise bad(f"{self.label}: a BOOL element is neither 0 nor 1")
        if finite and datatype.floating:
            self.check_finite(data)

    def check_result(self, tensor: Tensor) -> None:
        """Whether what the model gave is of its datatype and shape. Raises Refusal (500)."""
        datatype, count = self.datatype, prod(tensor.shape)
        if tensor.dtype != datatype.dtype:
            raise Refusal(
                500, f"{self.label}: expected {datatype.name}, the model gave {wire_name(tensor.dtype)}"
            )
        if datatype.size and len(tensor.data) != count * datatype.size:
            raise Refusal(
                500,
                f"{self.label}: {datatype.name} of shape {_show(tensor.shape)} takes "
                f"{count * datatype.size} bytes, the model gave {len(tensor.data)}",
            )
        if not datatype.size and (problem := text_problem(tensor.data, count)):
            raise Refusal(500, f"{self.label}: shape {_show(tensor.shape)}, {problem}")

    def check_finite(self, data: bytes | memoryview) -> None:
        index = not_finite(self.datatype, data)
        if index is not None:
            raise bad(f"{self.label}: element {index} is NaN or infinite, which this model does not accept")


class Signature:
    """A Served with its fields by name.

    `by_rows`: every input has a free first dimension. `kind` is the one JSON kind of all inputs, if they
    have only one; `json_outputs`: every output has one.
    """

    __slots__ = ("by_rows", "finite", "inputs", "json_outputs", "kind", "outputs", "served", "stats")

    def __init__(self, served: Served, stats: ModelStatistics) -> None:
        """Raises Refusal when a tensor has a type that the protocol has no name for."""
        self.served = served
        self.stats = stats
        self.finite = served.nan == "reject"
        self.inputs = _fields("input", served, served.inputs)
        self.outputs = _fields("output", served, served.outputs)
        self.by_rows = all(field.shape[:1] == (-1,) for field in self.inputs.values())
        self.json_outputs = all(field.datatype.kind for field in self.outputs.values())
        kinds: set[Kind | None] = {field.datatype.kind for field in self.inputs.values()}
        self.kind: Kind | None = kinds.pop() if len(kinds) == 1 else None

    def input(self, name: str) -> Field:
        field = self.inputs.get(name)
        if field is None:
            raise bad(
                f"unexpected input '{name[:100]}': model '{self.served.name}' takes {_names(self.inputs)}"
            )
        return field

    def in_order(self, tensors: list[Tensor]) -> list[Tensor]:
        """The inputs in the model's own order, each exactly once. Raises Refusal.

        Requests with the same order can run as one batch.
        """
        if len(tensors) == 1 == len(self.inputs):
            return tensors
        by_name = {tensor.name: tensor for tensor in tensors}
        if len(by_name) != len(tensors):
            names = [tensor.name for tensor in tensors]
            twice = next(name for name in names if names.count(name) > 1)
            raise bad(f"input '{twice}' is given more than once")
        missing = [name for name in self.inputs if name not in by_name]
        if missing:
            raise bad(
                f"missing input {_names(missing)}: model '{self.served.name}' takes {_names(self.inputs)}"
            )
        return [by_name[name] for name in self.inputs]

    def check_wishes(self, names: Sequence[str]) -> None:
        """Whether the model has the outputs a request asks for. Raises Refusal."""
        for index, name in enumerate(names):
            if name not in self.outputs:
                raise bad(
                    f"unexpected output '{name[:100]}': model '{self.served.name}' has {_names(self.outputs)}"
                )
            if name in names[:index]:
                raise bad(f"output '{name}' is asked for more than once")

    def check_outputs(self, outputs: list[Tensor]) -> dict[str, Tensor]:
        """The model's answer by name. Raises Refusal (500) when it is not what its signature states."""
        found = {tensor.name: tensor for tensor in outputs}
        if len(outputs) != len(self.outputs) or found.keys() != self.outputs.keys():
            raise Refusal(
                500,
                f"model '{self.served.name}' returned {len(outputs)} outputs "
                f"({_names(tensor.name for tensor in outputs)}), expected {_names(self.outputs)}",
            )
        for tensor in outputs:
            field = self.outputs[tensor.name]
            datatype = field.datatype
            if tensor.dtype != datatype.dtype or len(tensor.data) != prod(tensor.shape) * datatype.size:
                field.check_result(tensor)
        return found


def text_problem(data: bytes | memoryview, count: int) -> str:
    """What is wrong with a BYTES tensor: each element lies behind its length, 4 bytes little-endian."""
    at, end, found = 0, len(data), 0
    while at < end:
        if at + 4 > end:
            return f"the length of element {found} is cut off"
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4 + size
        if at > end:
            return f"element {found} of {size} bytes reaches {at - end} bytes beyond the end"
        found += 1
    return "" if found == count else f"got {found}"


def _fields(role: str, served: Served, specs: Sequence[TensorSpec]) -> dict[str, Field]:
    fields = {}
    for spec in specs:
        datatype = BY_DTYPE.get(spec.dtype)
        if datatype is None:
            raise Refusal(
                500,
                f"model '{served.name}' cannot be served: {role} '{spec.name}' is of type {spec.dtype}, "
                "which the protocol does not know",
            )
        fields[spec.name] = Field(role, spec, datatype)
    return fields


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


def _show(shape: Sequence[int]) -> str:
    return str(list(shape[:16]))
