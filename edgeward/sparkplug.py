"""The Sparkplug B payload as protobuf messages, declared from the specification's field numbers.

Only what a receiver of numbers needs: data sets, templates and metadata stay unknown fields, which
protobuf skips. Needs the extra `agent-sparkplug`, or `trends-sparkplug` beside a trend store.
"""

from __future__ import annotations

from typing import Any

try:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from google.protobuf.message import DecodeError
except ImportError as error:
    from edgeward.errors import MissingDependency

    raise MissingDependency(
        "Sparkplug payloads need protobuf",
        hint="pip install 'edgeward[agent-sparkplug]', beside a trend store 'edgeward[trends-sparkplug]'",
    ) from error

__all__ = ["METRIC_TYPES", "NAMESPACE", "REBIRTH", "DecodeError", "Payload"]

NAMESPACE = "spBv1.0"
#: The node metric by which a host application asks for new births.
REBIRTH = "Node Control/Rebirth"

_FIELD = descriptor_pb2.FieldDescriptorProto
_PACKAGE = "edgeward.sparkplug"

# name: (number, type or the name of a message, repeated)
_Fields = dict[str, tuple[int, Any, bool]]

_PROPERTY_VALUE: _Fields = {
    "type": (1, _FIELD.TYPE_UINT32, False),
    "is_null": (2, _FIELD.TYPE_BOOL, False),
    "string_value": (8, _FIELD.TYPE_STRING, False),
}
_PROPERTY_SET: _Fields = {
    "keys": (1, _FIELD.TYPE_STRING, True),
    "values": (2, "PropertyValue", True),
}
_METRIC: _Fields = {
    "name": (1, _FIELD.TYPE_STRING, False),
    "alias": (2, _FIELD.TYPE_UINT64, False),
    "timestamp": (3, _FIELD.TYPE_UINT64, False),
    "datatype": (4, _FIELD.TYPE_UINT32, False),
    "is_historical": (5, _FIELD.TYPE_BOOL, False),
    "is_transient": (6, _FIELD.TYPE_BOOL, False),
    "is_null": (7, _FIELD.TYPE_BOOL, False),
    "properties": (9, "PropertySet", False),
    "int_value": (10, _FIELD.TYPE_UINT32, False),
    "long_value": (11, _FIELD.TYPE_UINT64, False),
    "float_value": (12, _FIELD.TYPE_FLOAT, False),
    "double_value": (13, _FIELD.TYPE_DOUBLE, False),
    "boolean_value": (14, _FIELD.TYPE_BOOL, False),
    "string_value": (15, _FIELD.TYPE_STRING, False),
}
_PAYLOAD: _Fields = {
    "timestamp": (1, _FIELD.TYPE_UINT64, False),
    "metrics": (2, "Metric", True),
    "seq": (3, _FIELD.TYPE_UINT64, False),
    "uuid": (4, _FIELD.TYPE_STRING, False),
}

# Datatype codes; the signed ones travel as two's complement of their width.
SIGNED_BITS = {1: 8, 2: 16, 3: 32, 4: 64}
METRIC_TYPES = {
    "Int8": 1, "Int16": 2, "Int32": 3, "Int64": 4, "UInt8": 5, "UInt16": 6, "UInt32": 7, "UInt64": 8,
    "Float": 9, "Double": 10, "Boolean": 11, "String": 12,
}  # fmt: skip


def _declare() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="edgeward/sparkplug_b.proto", package=_PACKAGE, syntax="proto2"
    )
    messages = {
        "PropertyValue": _PROPERTY_VALUE,
        "PropertySet": _PROPERTY_SET,
        "Metric": _METRIC,
        "Payload": _PAYLOAD,
    }
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            label = _FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
            if isinstance(kind, str):
                message.field.add(
                    name=field, number=number, label=label, type=_FIELD.TYPE_MESSAGE,
                    type_name=f".{_PACKAGE}.{kind}",
                )  # fmt: skip
            else:
                message.field.add(name=field, number=number, label=label, type=kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Payload"))


Payload = _declare()
