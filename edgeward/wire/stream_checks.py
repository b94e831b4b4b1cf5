"""What of a Stream's spec types alone cannot say, checked where it is applied and not on the device at night."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Collection
from pathlib import PurePosixPath
from string import Formatter

from edgeward.conditions import compile_condition
from edgeward.errors import InvalidDocument
from edgeward.identifiers import check_name
from edgeward.paths import parse_path
from edgeward.wire.streams import (
    Action,
    CameraSource,
    FilesSource,
    HttpSource,
    ModbusSource,
    MqttSource,
    OpcuaSource,
    PayloadSource,
    StreamSpec,
    Window,
)
from edgeward.wire.topics import matches

MAX_OVERLAP = 1000

#: What a condition may name besides outputs and features.
RESERVED = frozenset({"alarm", "threshold"})

_PLACEHOLDERS = frozenset({"site", "device"})


def check_stream(spec: StreamSpec) -> None:
    """Raises InvalidDocument naming the field."""
    check_name(spec.slot, "spec.slot")
    source = spec.source.one()
    images = isinstance(source, CameraSource) or (
        isinstance(source, FilesSource) and source.format == "image"
    )
    _check_features(spec, images=images)
    match source:
        case MqttSource():
            _check_topic(source.topic, "spec.source.mqtt.topic", wildcards=not source.sequence)
            _check_payload(source, spec.features, "spec.source.mqtt")
        case HttpSource():
            if source.format == "sparkplug":
                raise InvalidDocument("Sparkplug B comes over MQTT only", field="spec.source.http.format")
            _check_payload(source, spec.features, "spec.source.http")
        case OpcuaSource():
            _check_covers(source.nodes, spec.features, "spec.source.opcua.nodes")
        case ModbusSource():
            _check_covers(source.registers, spec.features, "spec.source.modbus.registers")
    _check_window(spec.window, images=images)
    for index, action in enumerate(spec.actions):
        _check_action(action, f"spec.actions[{index}]")
        if isinstance(source, MqttSource) and action.publish and matches(source.topic, action.publish):
            raise InvalidDocument(
                "the stream would take its own alarms for samples", field=f"spec.actions[{index}].publish"
            )
    names = [action.name for action in spec.actions]
    if len(set(names)) != len(names):
        raise InvalidDocument("action names repeat", field="spec.actions")


def _check_features(spec: StreamSpec, *, images: bool) -> None:
    if images and spec.features:
        raise InvalidDocument("images are one tensor without features", field="spec.features")
    if not images and not spec.features:
        raise InvalidDocument("expected at least one feature", field="spec.features")
    if len(set(spec.features)) != len(spec.features):
        raise InvalidDocument("feature names repeat", field="spec.features")
    for index, feature in enumerate(spec.features):
        if feature in RESERVED:
            raise InvalidDocument(
                f"{feature!r} means something else in conditions", field=f"spec.features[{index}]"
            )
    for feature, check in spec.quality.items():
        field = f"spec.quality.{feature}"
        if feature not in spec.features:
            raise InvalidDocument("not one of the features", field=field)
        if check.minimum is not None and check.maximum is not None and check.minimum > check.maximum:
            raise InvalidDocument("above the maximum: no reading would pass", field=f"{field}.minimum")


def _check_topic(topic: str, field: str, *, wildcards: bool) -> None:
    for _, name, _, _ in _fields(topic, field):
        if name is not None and name not in _PLACEHOLDERS:
            raise InvalidDocument(f"{{{name}}} is not filled in", field=field, hint="{site} and {device} are")
    levels = topic.split("/")
    wild = [level for level in levels if "+" in level or "#" in level]
    if not wild:
        return
    if not wildcards:
        raise InvalidDocument("a numbering sensor has a topic of its own, without + and #", field=field)
    if any(level not in ("+", "#") for level in wild) or "#" in levels[:-1]:
        raise InvalidDocument(
            "+ and # stand for whole levels, # for the last one",
            field=field,
            hint="plant/+/vibration, plant/#",
        )


def _fields(topic: str, field: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(Formatter().parse(topic))
    except ValueError:
        raise InvalidDocument("a brace is left open", field=field, hint="{site} or {device}") from None


def _check_payload(source: PayloadSource, features: list[str], field: str) -> None:
    if source.sequence and source.format not in ("json", "msgpack"):
        raise InvalidDocument(f"{source.format} carries no sequence numbers", field=f"{field}.sequence")
    for name, path in source.fields.items():
        if name not in features:
            raise InvalidDocument("not one of the features", field=f"{field}.fields.{name}")
        if not parse_path(path, f"{field}.fields.{name}"):
            raise InvalidDocument("leads to the whole sample", field=f"{field}.fields.{name}")
    if source.format in ("json", "msgpack"):
        for name in ("time", "key", "values"):
            parse_path(getattr(source, name), f"{field}.{name}")
    if source.format == "csv" and source.columns:
        wanted = [*(source.fields.get(name, name) for name in features), source.time, source.key]
        for name in filter(None, wanted):
            if name not in source.columns:
                raise InvalidDocument(f"{name!r} is not one of them", field=f"{field}.columns")


def _check_covers(given: Collection[str], features: list[str], field: str) -> None:
    for feature in features:
        if feature not in given:
            raise InvalidDocument(f"feature {feature!r} is not there", field=field)
    for name in sorted(set(given) - set(features)):
        raise InvalidDocument("not one of the features", field=f"{field}.{name}")


def _check_window(window: Window, *, images: bool) -> None:
    by_time = window.size is not None
    if by_time and window.count != 1:
        raise InvalidDocument("a window is by count or by event time, not both", field="spec.window.count")
    if by_time and window.aggregate == "stack":
        raise InvalidDocument(
            "a window by event time has no fixed number of samples to stack", field="spec.window.aggregate"
        )
    if not by_time and window.lateness:
        raise InvalidDocument("windows by count know no late samples", field="spec.window.lateness")
    if images and window.aggregate != "none":
        raise InvalidDocument("images have no such statistic", field="spec.window.aggregate")
    if window.slide is None:
        return
    length = window.size if window.size is not None else float(window.count)
    if window.slide > length:
        raise InvalidDocument("longer than the window would skip samples", field="spec.window.slide")
    if length / window.slide > MAX_OVERLAP and by_time:
        raise InvalidDocument(
            f"more than {MAX_OVERLAP} windows would overlap at any time", field="spec.window.slide"
        )
    if not by_time and window.slide != int(window.slide):
        raise InvalidDocument("expected a whole number of samples", field="spec.window.slide")
    if window.aggregate == "none" and window.slide < length:
        raise InvalidDocument(
            "windows that overlap need an aggregate, or samples would be inferred twice",
            field="spec.window.aggregate",
        )


def _check_action(action: Action, field: str) -> None:
    check_name(action.name, f"{field}.name")
    compile_condition(action.when, field=f"{field}.when")
    if sum(target is not None for target in (action.publish, action.webhook, action.file)) != 1:
        raise InvalidDocument("expected exactly one of publish, webhook and file", field=field)
    if action.publish is not None:
        _check_topic(action.publish, f"{field}.publish", wildcards=False)
    if action.webhook is not None:
        _check_address(action.webhook, f"{field}.webhook")
    if action.file is not None:
        path = PurePosixPath(action.file)
        if path.is_absolute() or ".." in path.parts:
            raise InvalidDocument(
                f"{action.file!r} leaves the folder for action files",
                field=f"{field}.file",
                hint="alarms.jsonl",
            )


def _check_address(address: str, field: str) -> None:
    try:
        parts = urllib.parse.urlsplit(address)
        good = bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", address)
    except ValueError:
        good = False
    if not good:
        raise InvalidDocument(f"{address!r} names no host", field=field, hint="http://127.0.0.1:9000/alarm")
