"""Rows as Sparkplug B, by the Sparkplug 3.0 specification (https://sparkplug.eclipse.org/specification/). Pure.

The bridge is one edge node, each Edgeward device one of its devices, each output a metric. Sparkplug tells
states: a value whose time lies before what was told is marked historical and changes no state.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from edgeward.errors import InvalidDocument, UsageError
from edgeward.sparkplug import METRIC_TYPES, NAMESPACE, REBIRTH, DecodeError, Payload

#: What one device can have; rows of more names lose those.
MAX_METRICS = 20_000
MAX_PER_MESSAGE = 1_000

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_FIELDS = {
    "Double": "double_value",
    "Int64": "long_value",
    "Boolean": "boolean_value",
    "String": "string_value",
}
Value = float | int | bool | str


@dataclass(frozen=True)
class Outgoing:
    """QoS 0 and not retained, as the specification wants all of an edge node's messages but its will."""

    topic: str
    payload: bytes


@dataclass(frozen=True)
class Reading:
    """A value of a metric of type `kind` (a name of METRIC_TYPES); `at` is in milliseconds since 1970."""

    name: str
    kind: str
    value: Value
    at: int


def check_id(name: str, option: str) -> str:
    """A group or node id. Raises UsageError for one that no topic can hold."""
    if not name or len(name) > 128 or not name.isprintable() or set(name) & set("+/#"):
        raise UsageError(f"{option}: {name!r} is not a Sparkplug id", hint="expected a name without + / #")
    return name


def readings(table: str, row: Mapping[str, Any]) -> Iterator[Reading]:
    """What a row says, metric by metric."""
    at = (row["bucket" if table == "trends" else "event_time"] - _EPOCH) // datetime.timedelta(milliseconds=1)
    stream = row["stream"]
    match table:
        case "results":
            for name, value in row["outputs"]:
                yield Reading(f"{stream}/outputs/{name}", "Double", value, at)
            yield Reading(f"{stream}/alarm", "Boolean", row["alarm"], at)
            yield Reading(f"{stream}/model", "String", row["digest"], at)
        case "alarms":
            for name in ("value", "threshold"):
                yield Reading(f"{stream}/alarms/{name}", "Double", row[name], at)
        case "samples":
            for name, value in row["values"]:
                yield Reading(f"{stream}/values/{name}", "Double", value, at)
        case "trends":
            base = f"{stream}/trends/{row['series']}/{row['variant']}"
            yield Reading(f"{base}/count", "Int64", row["count"], at)
            for name in ("mean", "minimum", "maximum"):
                yield Reading(f"{base}/{name}", "Double", row[name], at)


@dataclass
class _Metric:
    alias: int
    last: Reading


class EdgeNode:
    """What one edge node has told its hosts. Every method that returns messages counts `seq` on: all must be
    published, in this order, before those of the next call."""

    def __init__(self, group: str, node: str) -> None:
        self._group, self._node = group, node
        self._devices: dict[str, dict[str, _Metric]] = {}
        self._aliases = 0
        self._seq = 0
        self.bdseq = 0
        self.ignored = 0
        """Readings of metrics beyond MAX_METRICS."""

    def topic(self, kind: str, device: str = "") -> str:
        return "/".join(filter(None, (NAMESPACE, self._group, kind, self._node, device)))

    def death(self, now_ms: int) -> Outgoing:
        """The NDEATH: the will of the next connection (QoS 1), and what is said when leaving."""
        payload = Payload(timestamp=now_ms, metrics=[self._bdseq(now_ms)])
        return Outgoing(self.topic("NDEATH"), payload.SerializeToString())

    def births(self, now_ms: int) -> list[Outgoing]:
        """After each connect, and when a host asks for them."""
        self._seq = 0
        rebirth = {
            "name": REBIRTH,
            "timestamp": now_ms,
            "datatype": METRIC_TYPES["Boolean"],
            "boolean_value": False,
        }
        metrics = [self._bdseq(now_ms), rebirth]
        return [
            self._numbered("NBIRTH", "", metrics, now_ms),
            *(self._device_birth(device, now_ms) for device in self._devices),
        ]

    def data(self, table: str, rows: pa.Table, now_ms: int) -> Iterator[Outgoing]:
        """Births of what is new, and the values, of consecutive rows of one device together."""
        run: list[Reading] = []
        device = ""
        for batch in rows.to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                if row["device"] != device or len(run) >= MAX_PER_MESSAGE:
                    yield from self._of_device(device, run, now_ms)
                    device, run = row["device"], []
                run += readings(table, row)
        yield from self._of_device(device, run, now_ms)

    def _of_device(self, device: str, run: Sequence[Reading], now_ms: int) -> Iterator[Outgoing]:
        if not run:
            return
        known = self._devices.setdefault(device, {})
        rest: list[Reading] = []
        born = False
        for reading in run:
            if reading.name in known:
                rest.append(reading)
            elif len(known) < MAX_METRICS:
                self._aliases += 1
                known[reading.name] = _Metric(self._aliases, reading)
                born = True
            else:
                self.ignored += 1
        if born:
            # A birth names every metric that will ever be told: with a new one, it is said again.
            yield self._device_birth(device, now_ms)
        metrics = [told for reading in rest if (told := self._told(known[reading.name], reading)) is not None]
        for at in range(0, len(metrics), MAX_PER_MESSAGE):
            yield self._numbered("DDATA", device, metrics[at : at + MAX_PER_MESSAGE], now_ms)

    def _told(self, metric: _Metric, reading: Reading) -> dict[str, Any] | None:
        """By alias alone, as the specification wants it of data; None for a text that is as it was."""
        if reading.kind == "String" and reading.value == metric.last.value:
            return None
        told = {"alias": metric.alias, **_fields(reading)}
        if reading.at < metric.last.at:
            told["is_historical"] = True
        else:
            metric.last = reading
        return told

    def _device_birth(self, device: str, now_ms: int) -> Outgoing:
        metrics = [
            {"name": name, "alias": metric.alias, **_fields(metric.last)}
            for name, metric in self._devices[device].items()
        ]
        return self._numbered("DBIRTH", device, metrics, now_ms)

    def _numbered(self, kind: str, device: str, metrics: list[dict[str, Any]], now_ms: int) -> Outgoing:
        payload = Payload(timestamp=now_ms, metrics=metrics, seq=self._seq)
        self._seq = (self._seq + 1) % 256
        return Outgoing(self.topic(kind, device), payload.SerializeToString())

    def _bdseq(self, now_ms: int) -> dict[str, Any]:
        return {
            "name": "bdSeq",
            "timestamp": now_ms,
            "datatype": METRIC_TYPES["Int64"],
            "long_value": self.bdseq,
        }


def _fields(reading: Reading) -> dict[str, Any]:
    value = reading.value
    return {
        "timestamp": reading.at,
        "datatype": METRIC_TYPES[reading.kind],
        # Negative numbers travel as two's complement.
        _FIELDS[reading.kind]: value & (1 << 64) - 1
        if reading.kind == "Int64" and isinstance(value, int)
        else value,
    }


def wants_rebirth(command: bytes) -> bool:
    """Whether an NCMD asks for births; other commands are none for this node. Raises InvalidDocument."""
    try:
        message = Payload.FromString(command)
    except DecodeError as error:
        raise InvalidDocument(f"not a Sparkplug B command: {error}") from None
    return any(metric.name == REBIRTH and metric.boolean_value for metric in message.metrics)
