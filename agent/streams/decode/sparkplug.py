"""Sparkplug B: metrics by name or alias, reported only when they change.

A data message carries what changed, so a sample is what changed on top of what the metrics said last:
that is what report by exception means. Births name the aliases and set every value, deaths take all away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agent.streams.decode import times
from agent.streams.decode.columns import MAX_TEXT, arrival, check_count, clean_text, keep_finite
from agent.streams.samples import Samples
from edgeward.errors import InvalidDocument
from edgeward.sparkplug import NAMESPACE, SIGNED_BITS, DecodeError, Payload
from edgeward.wire.streams import Check, PayloadSource

_NUMBERED = ("NBIRTH", "NDATA", "DBIRTH", "DDATA")
_FIELDS = ("int_value", "long_value", "float_value", "double_value", "boolean_value")
_MAX_METRICS = 20_000


@dataclass(frozen=True, slots=True)
class SparkplugTopic:
    group: str
    kind: str
    node: str
    device: str = ""


def parse_topic(topic: str) -> SparkplugTopic | None:
    """None for a topic that is not `spBv1.0/group/TYPE/node[/device]`."""
    parts = topic.split("/")
    if len(parts) not in (4, 5) or parts[0] != NAMESPACE or not all(parts):
        return None
    return SparkplugTopic(*parts[1:])


@dataclass(slots=True)
class _Metric:
    name: str
    device: str
    datatype: int
    unit: str = ""


@dataclass(slots=True)
class _Node:
    """What the births of an edge node said; `seq` is the number of its last message."""

    aliases: dict[int, _Metric] = field(default_factory=dict)
    named: dict[tuple[str, str], _Metric] = field(default_factory=dict)
    held: dict[str, dict[str, float]] = field(default_factory=dict)
    seq: int | None = None


class SparkplugDecoder:
    """Keeps the state of one edge node: messages of others must not be handed in.

    Metrics of the device that `scope` names (none: the node's own, or all without a topic) become
    samples. `count` gets `sequence_gaps`, `unknown_aliases`. `birth_missing` is set when the node
    should be asked for a new birth, and cleared by one.
    """

    def __init__(
        self,
        source: PayloadSource,
        features: Sequence[str],
        quality: Mapping[str, Check],
        count: Callable[[str, int], None],
        scope: SparkplugTopic | None = None,
    ) -> None:
        self._features = tuple(features)
        self._metrics = [source.fields.get(name, name) for name in features]
        self._units = {
            source.fields.get(name, name): quality[name].unit for name in features if name in quality
        }
        self._keyed = bool(source.key)
        self._count = count
        self._scope = scope
        self._node = _Node()
        self.birth_missing = scope is not None

    def decode(self, payload: bytes, arrived: float, topic: str = "") -> list[Samples]:
        """The samples of one message, one for each time in it. Raises InvalidDocument for other bytes.

        Commands and messages without any of the features give none.
        """
        where = parse_topic(topic)
        kind = where.kind if where is not None else ""
        device = where.device if where is not None else ""
        if kind not in ("", *_NUMBERED, "NDEATH", "DDEATH"):
            return []
        message = _read(payload)
        if kind in ("NDEATH", "DDEATH"):
            self._forget(kind, device)
            return []
        if kind == "NBIRTH":
            self._node = _Node()
            self.birth_missing = False
        self._follow(message, kind)
        if kind == "DBIRTH":
            self._node.held.pop(device, None)
        changes = self._changes(message, kind, device, arrived)
        if self._scope is not None and device != self._scope.device:
            return []
        return self._samples(
            changes, f"{where.node}/{device}".rstrip("/") if where is not None else "", device
        )

    def _forget(self, kind: str, device: str) -> None:
        if kind == "NDEATH":
            self._node.held.clear()
        else:
            self._node.held.pop(device, None)

    def _follow(self, message: Any, kind: str) -> None:
        """Count a gap in the node's numbers, which run from 0 to 255 over all its messages."""
        if not message.HasField("seq"):
            return
        last, seq = self._node.seq, message.seq
        if last is not None and kind != "NBIRTH" and seq != (last + 1) % 256:
            self._count("sequence_gaps", 1)
            self.birth_missing = self._scope is not None
        self._node.seq = seq

    def _changes(
        self, message: Any, kind: str, device: str, arrived: float
    ) -> list[tuple[int, dict[str, float], str]]:
        """Per event time, in order: microseconds, the new values by metric name, and a problem."""
        sent = times.microseconds(message.timestamp, "ms") if message.HasField("timestamp") else times.NO_TIME
        by_time: dict[int, dict[str, float]] = {}
        problems: dict[int, str] = {}
        for metric in message.metrics:
            known = self._resolve(metric, device)
            if known is None or known.name not in self._metrics:
                continue
            at = times.microseconds(metric.timestamp, "ms") if metric.HasField("timestamp") else sent
            at = arrival(arrived) if at == times.NO_TIME else at
            expected = self._units.get(known.name, "")
            value = _value(metric, known.datatype)
            if expected and known.unit and known.unit != expected:
                problems.setdefault(at, f"{known.name}: unit is {known.unit!r}, expected {expected!r}")
                value = np.nan
            by_time.setdefault(at, {})[known.name] = value
        if kind.endswith("BIRTH") and by_time:
            # A birth is one state of all metrics, whenever each of them changed last.
            newest = max(by_time)
            merged = {name: value for at in sorted(by_time) for name, value in by_time[at].items()}
            return [(newest, merged, next(iter(problems.values()), ""))]
        return [(at, by_time[at], problems.get(at, "")) for at in sorted(by_time)]

    def _resolve(self, metric: Any, device: str) -> _Metric | None:
        """The metric a name or an alias stands for, with what a birth said about it; None when unknown."""
        node = self._node
        known: _Metric | None
        if metric.HasField("name"):
            name = clean_text(metric.name)
            known = node.named.get((device, name)) or _Metric(name, device, 0)
            if len(node.named) < _MAX_METRICS:
                node.named[device, name] = known
                if metric.HasField("alias"):
                    node.aliases[metric.alias] = known
        else:
            known = node.aliases.get(metric.alias)
            if known is None or known.device != device:
                self._count("unknown_aliases", 1)
                self.birth_missing = self._scope is not None
                return None
        if metric.HasField("datatype"):
            known.datatype = metric.datatype
        if metric.HasField("properties"):
            known.unit = _unit(metric.properties) or known.unit
        return known

    def _samples(
        self, changes: list[tuple[int, dict[str, float], str]], key: str, device: str
    ) -> list[Samples]:
        if not changes:
            return []
        check_count(len(changes))
        held = self._node.held.setdefault(device, {})
        values = np.full((len(changes), len(self._features)), np.nan)
        problems: dict[int, str] = {}
        for row, (_, changed, problem) in enumerate(changes):
            held.update(changed)
            values[row] = [held.get(name, np.nan) for name in self._metrics]
            if problem:
                problems[row] = problem
        keep_finite(values, self._features, problems)
        at = np.array([at for at, _, _ in changes], dtype=np.int64)
        keys = (key[:MAX_TEXT],) * len(changes) if self._keyed else ()
        return [Samples(at, values, keys, problems=problems)]


def _read(payload: bytes) -> Any:
    try:
        return Payload.FromString(payload)
    except DecodeError as error:
        raise InvalidDocument(f"not a Sparkplug B payload: {error}") from None


def _value(metric: Any, datatype: int) -> float:
    """NaN for null, for text and for a metric without a value."""
    if metric.is_null:
        return float(np.nan)
    for name in _FIELDS:
        if metric.HasField(name):
            value = getattr(metric, name)
            bits = SIGNED_BITS.get(datatype)
            if bits is not None and name in ("int_value", "long_value"):
                value &= (1 << bits) - 1
                value -= (1 << bits) if value >> (bits - 1) else 0
            return float(value)
    return float(np.nan)


def _unit(properties: Any) -> str:
    for key, value in zip(properties.keys, properties.values, strict=False):
        if key == "engUnit" and not value.is_null:
            return clean_text(value.string_value)
    return ""
