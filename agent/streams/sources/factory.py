"""From a stream's spec to the source that fills it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent.streams.decode.sequence import Position
from agent.streams.sources.files import FilesSampleSource
from agent.streams.sources.mqtt import MqttLink, MqttSampleSource
from agent.streams.sources.port import SampleSource
from agent.streams.sources.push import PushSource
from edgeward.clock import Clock
from edgeward.identifiers import DeviceName
from edgeward.wire.streams import (
    CameraSource,
    Check,
    FilesSource,
    HttpSource,
    ModbusSource,
    MqttSource,
    OpcuaSource,
    Source,
)


def build(
    source: Source,
    features: Sequence[str],
    quality: Mapping[str, Check],
    *,
    name: DeviceName,
    clock: Clock,
    link: MqttLink,
    position: Position | None = None,
) -> SampleSource:
    """The source that `source` declares, not started yet.

    `position` is what the stream committed last of this source: files go on after it. Raises
    InvalidDocument naming the field for a spec that cannot be read by, MissingDependency naming the extra.
    """
    spec = source.one()
    match spec:
        case MqttSource():
            return MqttSampleSource(spec, features, quality, name, link, clock, position)
        case HttpSource():
            return PushSource(spec, features, quality, clock, position)
        case FilesSource():
            return FilesSampleSource(spec, features, clock, position)
        # The rest needs optional extras, which these imports name when they are absent.
        case CameraSource():
            from agent.streams.sources.camera import CameraSampleSource

            return CameraSampleSource(spec, clock)
        case OpcuaSource():
            from agent.streams.sources.opcua import OpcuaSampleSource

            return OpcuaSampleSource(spec, features, quality, clock)
        case ModbusSource():
            from agent.streams.sources.modbus import ModbusSampleSource

            return ModbusSampleSource(spec, features, clock)


def numbers_samples(source: Source) -> bool:
    """Whether its samples carry an epoch and a sequence number, and so a position to commit."""
    spec = source.one()
    return isinstance(spec, FilesSource) or (isinstance(spec, MqttSource | HttpSource) and spec.sequence)
