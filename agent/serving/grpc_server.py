"""The Open Inference Protocol v2 over gRPC: the same models, checks and counters as over HTTP.

Imported only when gRPC is wanted; needs the extra `agent-grpc`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from agent.runtime.port import Tensor
from agent.serving import describe
from agent.serving.datatypes import Datatype
from agent.serving.encode import check_finite
from agent.serving.inference import Inference
from agent.serving.refusal import Refusal, bad
from agent.serving.signature import Field, Signature
from agent.serving.statistics import Statistics
from edgeward.errors import MissingDependency, Unavailable
from edgeward.wire.tensors import pack_elements

if TYPE_CHECKING:
    from agent.serving.api import Api

try:
    import grpc
    from google.protobuf.message import DecodeError

    from agent.serving.proto import SERVICE, message, methods
except ImportError as _error:
    raise MissingDependency(
        f"gRPC needs {_error.name}", hint="pip install 'edgeward[agent,agent-grpc]', or leave gRPC off"
    ) from None

log = logging.getLogger(__name__)

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}

#: Datatype -> the field of InferTensorContents that carries it. FP16 and BF16 have none.
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}

ModelInferRequest = message("ModelInferRequest")
ModelInferResponse = message("ModelInferResponse")
ModelStreamInferResponse = message("ModelStreamInferResponse")


class GrpcServer:
    """`start` and `stop` run on the engine's loop, where the calls are answered too."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._models = api.models
        self.port = 0
        self._server: Any = None
        # A message's size is known only when it is complete: so many of the largest may be on their way.
        settings = api.settings
        self._receiving = asyncio.Semaphore(max(1, settings.max_held_bytes // settings.max_body_bytes))

    async def start(self) -> None:
        """Raises Unavailable when the address is taken."""
        settings = self._api.settings
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", settings.max_body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=settings.max_connections,
        )
        handlers = {name: self._handler(name, *rest) for name, *rest in methods()}
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
        address = f"{settings.host}:{settings.grpc_port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise Unavailable(f"cannot listen on {address} for gRPC: {error}") from None
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(self._api.settings.drain_seconds)

    def _handler(self, name: str, streams: bool, request: Any, response: Any) -> Any:
        if streams:
            return grpc.stream_stream_rpc_method_handler(self._stream, None, response.SerializeToString)
        if name == "ModelInfer":
            # One message on the wire either way; read as a stream, it is taken only when there is room for it.
            return grpc.stream_unary_rpc_method_handler(self._infer, None, response.SerializeToString)
        answer = getattr(self, f"_{name}")

        async def call(message: Any, context: Any) -> Any:
            try:
                return response(**answer(message))
            except Refusal as refusal:
                return await _abort(context, refusal)

        return grpc.unary_unary_rpc_method_handler(call, request.FromString, response.SerializeToString)

    # what the server says; each method is named as its call

    def _ServerLive(self, request: Any) -> dict[str, Any]:
        return {"live": True}

    def _ServerReady(self, request: Any) -> dict[str, Any]:
        return {"ready": self._api.ready()}

    def _ModelReady(self, request: Any) -> dict[str, Any]:
        return {"ready": self._models.find(request.name, request.version).ready}

    def _ServerMetadata(self, request: Any) -> dict[str, Any]:
        return describe.server()

    def _ModelMetadata(self, request: Any) -> dict[str, Any]:
        return describe.model(self._models.find(request.name, request.version))

    def _ModelConfig(self, request: Any) -> dict[str, Any]:
        return {"config": describe.config(self._models.find(request.name, request.version))}

    def _ModelStatistics(self, request: Any) -> dict[str, Any]:
        if request.name:
            self._models.find(request.name, request.version)
        return {"model_stats": self._api.statistics_of(request.name, request.version)}

    def _RepositoryIndex(self, request: Any) -> dict[str, Any]:
        return {"models": describe.index(self._models.catalog.all(), ready_only=request.ready)}

    def _RepositoryModelLoad(self, request: Any) -> dict[str, Any]:
        raise Refusal(403, f"model '{request.model_name[:100]}': {describe.READ_ONLY}")

    _RepositoryModelUnload = _RepositoryModelLoad

    # inference

    async def _infer(self, requests: AsyncIterator[bytes], context: Any) -> Any:
        try:
            return await self._run(await self._receive(context))
        except Refusal as refusal:
            return await _abort(context, refusal)

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
        """One after the other, in order; a refused request does not end the stream."""
        while (message := await context.read()) is not grpc.aio.EOF:
            answer = ModelInferResponse()
            try:
                taken = self._take(message)
                del message
                answer.model_name, answer.id = taken.request.model_name, taken.request.id
                yield ModelStreamInferResponse(infer_response=await self._run(taken))
            except Refusal as refusal:
                yield ModelStreamInferResponse(error_message=str(refusal), infer_response=answer)

    async def _receive(self, context: Any) -> _Taken:
        """The one message of a call. Raises Refusal."""
        settings = self._api.settings
        async with self._receiving:
            try:
                async with asyncio.timeout(settings.request_seconds):
                    message = await context.read()
            except TimeoutError:
                raise Refusal(
                    408, f"the request was not complete within {settings.request_seconds:g} s"
                ) from None
            if message is grpc.aio.EOF:
                raise bad("the call ended without a request")
            return self._take(message)

    def _take(self, message: bytes) -> _Taken:
        """Count a message as held. Raises Refusal when too many bytes are, or when it cannot be read."""
        statistics, size = self._api.statistics, len(message)
        if statistics.held_bytes + size > self._api.settings.max_held_bytes:
            raise Refusal(429, "too many large requests at once", retry_after=1)
        try:
            request = ModelInferRequest.FromString(message)
        except DecodeError as error:
            raise bad(f"not a ModelInferRequest: {error}") from None
        return _Taken(request, size, statistics)

    async def _run(self, taken: _Taken) -> Any:
        """Raises Refusal."""
        try:
            answered = self._submit(taken)
        except BaseException:
            taken.release()
            raise
        return await answered

    def _submit(self, taken: _Taken) -> asyncio.Future[Any]:
        began = self._api.clock.monotonic()
        request = taken.request
        signature = self._models.ready(request.model_name, request.model_version)
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        wishes, identifier = [wish.name for wish in request.outputs], request.id

        # The bytes count until the engine is done with them, whether or not the client still waits.
        def finish(answering: Signature, outputs: dict[str, Tensor]) -> None:
            made = _response(answering, outputs, wishes, identifier)
            taken.release()
            if not answered.done():
                answered.set_result(made)

        def fail(refusal: Refusal) -> None:
            taken.release()
            if not answered.done():
                answered.set_exception(refusal)

        version = request.model_version
        inference = Inference(self._models, signature, version, self._api.clock, began, finish, fail)
        try:
            tensors = _tensors(signature, request)
            signature.check_wishes(wishes)
        except Refusal as refusal:
            inference.refuse(refusal)
        else:
            # The tensors have their own bytes: those of the message are not needed any more.
            del request
            taken.forget()
            inference.submit(tensors, sum(len(tensor.data) for tensor in tensors))
        return answered


class _Taken:
    """A request whose `size` bytes count as held until `release`."""

    __slots__ = ("_size", "_statistics", "request")

    def __init__(self, request: Any, size: int, statistics: Statistics) -> None:
        self.request = request
        self._size = size
        self._statistics = statistics
        statistics.held_bytes += size

    def forget(self) -> None:
        """Drop the message; its bytes still count."""
        self.request = None

    def release(self) -> None:
        self._statistics.held_bytes -= self._size
        self._size = 0


async def _abort(context: Any, refusal: Refusal) -> Any:
    trailing: tuple[tuple[str, str], ...] = ()
    if refusal.retry_after is not None:
        trailing = (("retry-after", str(refusal.retry_after)),)
    await context.abort(_CODES.get(refusal.status, grpc.StatusCode.INTERNAL), str(refusal), trailing)


def _tensors(signature: Signature, request: Any) -> list[Tensor]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise bad(f"{len(request.inputs)} inputs, but {len(raw)} raw_input_contents")
    tensors = []
    for index, item in enumerate(request.inputs):
        field = signature.input(item.name)
        field.check_datatype(item.datatype)
        if "shared_memory_region" in item.parameters:
            raise bad(f"{field.label}: shared memory is not supported, send the data in the request")
        shape = tuple(item.shape)
        if raw:
            if item.HasField("contents"):
                raise bad(f"{field.label}: 'contents' and raw_input_contents exclude one another")
            data = raw[index]
        else:
            data = _typed(field, shape, item.contents)
        field.check_data(shape, data, finite=signature.finite)
        tensors.append(Tensor(field.name, field.datatype.dtype, shape, data))
    return signature.in_order(tensors)


def _typed(field: Field, shape: tuple[int, ...], contents: Any) -> bytes:
    datatype: Datatype = field.datatype
    name = _CONTENTS.get(datatype.name)
    if name is None:
        raise bad(f"{field.label}: {datatype.name} has no typed contents, use raw_input_contents")
    for other, _ in contents.ListFields():
        if other.name != name:
            raise bad(f"{field.label}: {datatype.name} is expected in {name}, not in {other.name}")
    values = getattr(contents, name)
    if datatype.kind == "text":
        return pack_elements(values)
    return field.pack(shape, values)


def _response(signature: Signature, outputs: dict[str, Tensor], wishes: list[str], identifier: str) -> Any:
    """Raises Refusal when an output is not finite."""
    served = signature.served
    made = ModelInferResponse(model_name=served.name, model_version=served.version, id=identifier)
    for name in wishes or signature.outputs:
        field, tensor = signature.outputs[name], outputs[name]
        check_finite(signature, field, tensor)
        made.outputs.add(name=name, datatype=field.datatype.name, shape=tensor.shape)
        made.raw_output_contents.append(bytes(tensor.data))
    return made
