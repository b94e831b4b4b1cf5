"""Every declared source has an implementation, and says which extra it lacks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from agent.streams.sources.factory import build, numbers_samples
from agent.streams.sources.mqtt import Receive
from edgeward.clock import ManualClock
from edgeward.errors import InvalidDocument, MissingDependency
from edgeward.identifiers import DeviceName
from edgeward.wire.streams import (
    CameraSource,
    FilesSource,
    HttpSource,
    ModbusSource,
    MqttSource,
    OpcuaSource,
    Register,
    Source,
)


class NoLink:
    def subscribe(self, topic: str, receive: Receive) -> None: ...

    def unsubscribe(self, topic: str) -> None: ...

    def expect_acks(self, topic: str, position: Any, *, expected: bool = True) -> None: ...

    def acknowledge(self, topic: str, epoch: str, seq: int) -> None: ...

    def publish(self, topic: str, payload: bytes) -> bool:
        return False


def made(source: Source, features: list[str] | None = None) -> Any:
    return build(
        source, features if features is not None else ["a"], {},
        name=DeviceName("north", "turbine-1"), clock=ManualClock(), link=NoLink(), position=("e", 3),
    )  # fmt: skip


def test_every_source_is_built_and_stops_unstarted(tmp_path: Path) -> None:
    for source in (
        Source(mqtt=MqttSource(topic="t")),
        Source(http=HttpSource()),
        Source(files=FilesSource(path=str(tmp_path))),
        Source(camera=CameraSource(url="0")),
        Source(opcua=OpcuaSource(endpoint="opc.tcp://127.0.0.1:1/", nodes={"a": "i=1"})),
        Source(modbus=ModbusSource(host="127.0.0.1", registers={"a": Register(address=0)})),
    ):
        made(source).stop()


def test_positions_belong_to_sources_that_number() -> None:
    assert numbers_samples(Source(files=FilesSource(path="x")))
    assert numbers_samples(Source(mqtt=MqttSource(topic="t", sequence=True)))
    assert not numbers_samples(Source(http=HttpSource()))
    assert not numbers_samples(Source(camera=CameraSource(url="0")))


def test_a_position_reaches_its_source(tmp_path: Path) -> None:
    assert made(Source(files=FilesSource(path=str(tmp_path)))).position == ("e", 3)
    assert b'"position":{"epoch":"e","seq":3}' in made(Source(http=HttpSource())).handle({}, b"[]")[1]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, ours, extra, source in (
        ("cv2", "sources.camera", "agent-camera", Source(camera=CameraSource(url="0"))),
        (
            "asyncua", "sources.opcua", "agent-opcua",
            Source(opcua=OpcuaSource(endpoint="opc.tcp://127.0.0.1:1/", nodes={"a": "i=1"})),
        ),
        (
            "pymodbus.client", "sources.modbus", "agent-modbus",
            Source(modbus=ModbusSource(host="127.0.0.1", registers={"a": Register(address=0)})),
        ),
        (
            "google.protobuf", "decode.sparkplug", "agent-sparkplug",
            Source(mqtt=MqttSource(topic="t", format="sparkplug")),
        ),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            patch.delitem(sys.modules, f"agent.streams.{ours}", raising=False)
            patch.delitem(sys.modules, "edgeward.sparkplug", raising=False)
            with pytest.raises(MissingDependency, match=rf"edgeward\[{extra}\]"):
                made(source)


def test_a_wrong_path_is_refused_when_the_stream_is_built() -> None:
    with pytest.raises(InvalidDocument, match=r"spec\.source\.key"):
        made(Source(mqtt=MqttSource(topic="t", key="a[")))
