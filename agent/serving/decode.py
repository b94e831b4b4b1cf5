"""An inference request's body, JSON and the binary tensor extension, as tensors."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from agent.runtime.port import Tensor
from agent.serving.datatypes import Kind
from agent.serving.refusal import Refusal, bad
from agent.serving.signature import Field, Signature

Parameters = dict[str, str | int | float | bool]
Data = TypeVar("Data")


class InputTensor(Struct, Generic[Data]):
    name: str
    shape: tuple[int, ...]
    datatype: str
    data: Data | UnsetType = UNSET
    parameters: Parameters | None = None


class RequestedOutput(Struct):
    name: str
    parameters: Parameters | None = None


class InferRequest(Struct, Generic[Data]):
    inputs: list[InputTensor[Data]]
    id: str = ""
    outputs: list[RequestedOutput] | None = None
    parameters: Parameters | None = None


class Parsed(Struct):
    """`wanted`: output name -> whether as binary data; None: every output, as JSON."""

    tensors: list[Tensor]
    id: str = ""
    wanted: dict[str, bool] | None = None


_LIST_TYPES: dict[Kind, Any] = {"bool": list[bool], "int": list[int], "float": list[float], "text": list[str]}
#: Reads flat data of one kind in the same pass as the rest.
_FLAT = {kind: msgspec.json.Decoder(InferRequest[data]) for kind, data in _LIST_TYPES.items()}  # type: ignore[valid-type]
_ANY = msgspec.json.Decoder(InferRequest[Raw])
_LIST = {kind: msgspec.json.Decoder(data) for kind, data in _LIST_TYPES.items()}
_NESTED = msgspec.json.Decoder(list[Any])


def parse(signature: Signature, body: bytes, header_length: int | None, max_json: int) -> Parsed:
    """The tensors in the model's order, checked against its signature.

    `header_length` is the size of the JSON part when binary data follows it; 0: the body is the only
    input's data. Raises Refusal: 400 naming the tensor, 413 when the JSON part is larger than `max_json`.
    """
    if header_length is None:
        head, binary = body, memoryview(b"")
    elif header_length == 0:
        return _raw(signature, body)
    else:
        if header_length > len(body):
            raise bad(f"Inference-Header-Content-Length is {header_length}, the body has {len(body)} bytes")
        head, binary = body[:header_length], memoryview(body)[header_length:]
    if len(head) > max_json:
        raise Refusal(
            413,
            f"the JSON part has {len(head)} bytes, at most {max_json} are taken: send tensors as binary data",
        )
    if signature.kind is not None:
        try:
            request = _FLAT[signature.kind].decode(head)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            # Nested data, inputs in binary form of another kind, or a mistake: the second look says which.
            return _tensors(signature, _decode(head), binary)
        return _tensors(signature, request, binary)
    return _tensors(signature, _decode(head), binary)


def _decode(head: bytes) -> InferRequest[Any]:
    try:
        return _ANY.decode(head)
    except RecursionError:
        raise bad("the request's JSON is nested too deep") from None
    except msgspec.ValidationError as error:
        raise bad(f"not an inference request: {error}") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise bad(f"not an inference request: {error}; JSON has no NaN or Infinity") from None


def _tensors(signature: Signature, request: InferRequest[Any], binary: memoryview) -> Parsed:
    tensors, at = [], 0
    for item in request.inputs:
        field = signature.input(item.name)
        field.check_datatype(item.datatype)
        if item.parameters:
            size = _binary_size(field, item.parameters)
            if size is not None:
                if item.data is not UNSET:
                    raise bad(f"{field.label}: 'data' and 'binary_data_size' exclude one another")
                if size > len(binary) - at:
                    raise bad(
                        f"{field.label}: binary_data_size is {size}, but {len(binary) - at} bytes are left"
                    )
                data = binary[at : at + size]
                at += size
                field.check_data(item.shape, data, finite=signature.finite)
                tensors.append(Tensor(field.name, field.datatype.dtype, item.shape, data))
                continue
        tensors.append(_from_json(field, item.shape, item.data))
    if at != len(binary):
        raise bad(f"{len(binary) - at} bytes of binary data belong to no input")
    return Parsed(signature.in_order(tensors), request.id, _wanted(signature, request))


def _binary_size(field: Field, parameters: Parameters) -> int | None:
    if "shared_memory_region" in parameters:
        raise bad(f"{field.label}: shared memory is not supported, send the data in the body")
    size = parameters.get("binary_data_size")
    if size is None:
        return None
    if type(size) is not int or size < 0:
        raise bad(f"{field.label}: binary_data_size must be an integer >= 0, got {size!r}")
    return size


def _from_json(field: Field, shape: tuple[int, ...], data: Any) -> Tensor:
    datatype = field.datatype
    if data is UNSET:
        raise bad(f"{field.label}: it has neither 'data' nor 'binary_data_size'")
    kind = datatype.kind
    if kind is None:
        raise bad(
            f"{field.label}: {datatype.name} has no JSON form, send it as binary data (binary_data_size)"
        )
    if type(data) is Raw:
        data = _elements(field, kind, shape, data)
    if kind == "text":
        count = field.count(shape)
        if len(data) != count:
            raise bad(f"{field.label}: shape {list(shape)} has {count} elements, got {len(data)}")
        return Tensor(field.name, "bytes", shape, _pack_text(field, data))
    return Tensor(field.name, datatype.dtype, shape, field.pack(shape, data))


def _pack_text(field: Field, items: list[str]) -> bytes:
    parts = []
    for index, item in enumerate(items):
        try:
            data = item.encode()
        except UnicodeEncodeError:
            raise bad(f"{field.label}: element {index} is not valid Unicode") from None
        parts += [len(data).to_bytes(4, "little"), data]
    return b"".join(parts)


def _elements(field: Field, kind: Kind, shape: tuple[int, ...], raw: Raw) -> list[Any]:
    """The elements of JSON data: flat, or nested exactly as `shape` says."""
    elements: list[Any]
    try:
        elements = _LIST[kind].decode(raw)
        return elements
    except msgspec.MsgspecError as error:
        problem = str(error)
    except ValueError as error:
        raise bad(f"{field.label}: {error}") from None
    try:
        nested = _NESTED.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise bad(f"{field.label}: {problem}") from None
    got = [str(len(nested))]
    while nested and all(type(item) is list for item in nested):
        lengths = {len(item) for item in nested}
        got.append(f"{min(lengths)} to {max(lengths)}" if len(lengths) > 1 else str(lengths.pop()))
        nested = [element for item in nested for element in item]
    if len(got) == 1:
        raise bad(f"{field.label}: {problem}")
    field.count(shape)
    if got != [str(size) for size in shape]:
        raise bad(f"{field.label}: expected data of shape {list(shape)}, got [{', '.join(got[:16])}]")
    try:
        elements = msgspec.convert(nested, _LIST_TYPES[kind])
    except msgspec.ValidationError as error:
        raise bad(f"{field.label}: {error}") from None
    return elements


def _raw(signature: Signature, body: bytes) -> Parsed:
    """A request that is nothing but one tensor's bytes; its free dimensions follow from their number."""
    if len(signature.inputs) != 1:
        raise bad(
            f"a body without JSON needs a model with one input, '{signature.served.name}' has "
            f"{len(signature.inputs)}"
        )
    (field,) = signature.inputs.values()
    free = field.shape.count(-1)
    if field.datatype.size:
        fixed = field.datatype.size
        for size in field.shape:
            fixed *= size if size != -1 else 1
        fits = fixed > 0 and len(body) % fixed == 0 and (free or len(body) == fixed)
        if not fits or free > 1:
            raise bad(
                f"{field.label}: {len(body)} bytes do not determine a shape like {list(field.shape)} of "
                f"{field.datatype.name}"
            )
        shape = tuple(len(body) // fixed if size == -1 else size for size in field.shape)
        data = body
    else:
        shape = tuple(1 if size == -1 else size for size in field.shape)
        data = len(body).to_bytes(4, "little") + body
    field.check_data(shape, data, finite=signature.finite)
    tensors = [Tensor(field.name, field.datatype.dtype, shape, data)]
    return Parsed(tensors, "", dict.fromkeys(signature.outputs, True))


def _wanted(signature: Signature, request: InferRequest[Any]) -> dict[str, bool] | None:
    if not request.outputs and not request.parameters and signature.json_outputs:
        return None
    binary = _flag("the request", request.parameters or {}, "binary_data_output")
    if request.outputs:
        signature.check_wishes([wish.name for wish in request.outputs])
        wanted = {}
        for wish in request.outputs:
            label, parameters = signature.outputs[wish.name].label, wish.parameters or {}
            if "shared_memory_region" in parameters:
                raise bad(f"{label}: shared memory is not supported")
            if parameters.get("classification"):
                raise bad(f"{label}: the classification extension is not supported")
            wanted[wish.name] = _flag(label, parameters, "binary_data", binary)
    elif binary:
        return dict.fromkeys(signature.outputs, True)
    elif signature.json_outputs:
        return None
    else:
        wanted = dict.fromkeys(signature.outputs, False)
    for name, as_binary in wanted.items():
        field = signature.outputs[name]
        if not as_binary and field.datatype.kind is None:
            raise bad(
                f"{field.label}: {field.datatype.name} has no JSON form, ask for it as binary data (binary_data)"
            )
    return wanted


def _flag(label: str, parameters: Parameters, name: str, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise bad(f"{label}: {name} must be true or false, got {value!r}")
    return value
