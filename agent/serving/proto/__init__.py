"""The gRPC messages, made at import from the compiled `inference.proto`.

They live in a pool of their own: a process that also imports `tritonclient`, which registers the same
names in protobuf's default pool, must still work. Read as a descriptor, the file does not tie the agent
to one protobuf release as generated modules do.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"

_pool = descriptor_pool.DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(
    resources.files(__name__).joinpath("inference.binpb").read_bytes()
).file:
    _pool.Add(_file)


def message(name: str) -> Any:
    """The class of a message of the protocol. Raises KeyError."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"inference.{name}"))


def methods() -> list[tuple[str, bool, Any, Any]]:
    """Of the service: name, whether both sides stream, request and response class."""
    service = _pool.FindServiceByName(SERVICE)
    return [
        (
            method.name,
            method.server_streaming,
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
        )
        for method in service.methods
    ]
