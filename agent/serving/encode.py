"""An inference answer: output tensors as JSON and as the binary tensor extension."""

from __future__ import annotations

import struct
from math import isfinite
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from agent.runtime.port import Tensor
from agent.serving.messages import BINARY, JSON, Response
from agent.serving.refusal import NotFinite, Refusal, bad
from agent.serving.signature import Field, Signature
from edgeward.wire.tensors import unpack_elements


class OutputTensor(Struct):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Any = UNSET
    parameters: dict[str, int] | UnsetType = UNSET


class InferResponse(Struct):
    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str | UnsetType = UNSET


_encode = msgspec.json.Encoder().encode


def response(
    signature: Signature, outputs: dict[str, Tensor], wanted: dict[str, bool] | None, request_id: str
) -> Response:
    """Raises Refusal when an output is not finite or cannot be written as asked."""
    described: list[OutputTensor] = []
    binary: list[bytes | memoryview] = []
    for name in signature.outputs if wanted is None else wanted:
        field, tensor = signature.outputs[name], outputs[name]
        if wanted is not None and wanted[name]:
            check_finite(signature, field, tensor)
            binary.append(tensor.data)
            size = {"binary_data_size": len(tensor.data)}
            described.append(OutputTensor(name, field.datatype.name, tensor.shape, UNSET, size))
        else:
            data = _values(signature, field, tensor)
            described.append(OutputTensor(name, field.datatype.name, tensor.shape, data))
    served = signature.served
    head = _encode(InferResponse(served.name, served.version, described, request_id or UNSET))
    if wanted is None or True not in wanted.values():
        return Response(200, [head], JSON)
    length = (b"inference-header-content-length", b"%d" % len(head))
    return Response(200, [head, *binary], BINARY, (length,))


def check_finite(signature: Signature, field: Field, tensor: Tensor) -> None:
    """Raises Refusal (500) when the model gave NaN or infinity and its policy is to refuse that."""
    if signature.finite and field.datatype.floating:
        try:
            field.check_finite(tensor.data)
        except Refusal as refusal:
            raise _not_finite(signature, str(refusal)) from None


def _values(signature: Signature, field: Field, tensor: Tensor) -> Any:
    datatype = field.datatype
    if datatype.kind == "text":
        try:
            return [item.decode() for item in unpack_elements(tensor.data)]
        except UnicodeDecodeError:
            raise bad(f"{field.label}: it is not UTF-8, ask for it as binary data (binary_data)") from None
    values = struct.unpack(f"<{len(tensor.data) // datatype.size}{datatype.code}", tensor.data)
    # The sum of finite doubles may still overflow, so a bad sum is only a hint.
    if datatype.floating and not isfinite(sum(values)):
        for index, value in enumerate(values):
            if not isfinite(value):
                raise _not_finite(signature, f"{field.label}: element {index} is {value}")
    return values


def _not_finite(signature: Signature, problem: str) -> Refusal:
    if signature.finite:
        return NotFinite(500, f"{problem}: the model's result is refused")
    return bad(f"{problem}, which JSON cannot carry: ask for the output as binary data (binary_data)")
