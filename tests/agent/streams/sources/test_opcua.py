"""The OPC UA source against asyncua's own server, in a process that can be killed."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agent.streams.sources.opcua import OpcuaSampleSource
from edgeward.clock import SystemClock
from edgeward.errors import InvalidDocument
from edgeward.wire.streams import Check, OpcuaSource

Until = Callable[..., None]
Start = Callable[..., None]

SERVER = textwrap.dedent(
    """
    import asyncio, sys
    from asyncua import Server, ua

    async def main():
        server = Server()
        await server.init()
        server.set_endpoint(f"opc.tcp://127.0.0.1:{sys.argv[1]}/")
        index = await server.register_namespace("urn:test")
        objects = server.nodes.objects
        nodes = {}
        for name, value in [("Flow", 1.5), ("On", True), ("Text", "x"), ("Count", 7)]:
            nodes[name] = await objects.add_variable(ua.NodeId(name, index), name, value)
        await nodes["Flow"].add_property(
            ua.NodeId("Unit", index), "0:EngineeringUnits",
            ua.EUInformation(DisplayName=ua.LocalizedText("l/s")),
        )
        async with server:
            print(index, flush=True)
            while line := await asyncio.to_thread(sys.stdin.readline):
                status = ua.StatusCodes.BadSensorFailure if line.strip() == "bad" else ua.StatusCodes.Good
                value = ua.Variant(0.0 if line.strip() == "bad" else float(line), ua.VariantType.Double)
                await nodes["Flow"].write_value(ua.DataValue(value, ua.StatusCode(status)))

    asyncio.run(main())
    """
)


class PlantServer:
    def __init__(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(self.port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "2"

    def write(self, text: str) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.close()
            self.process.stdout.close()
        self.process = None


@pytest.fixture
def plant() -> Iterator[PlantServer]:
    server = PlantServer()
    yield server
    server.kill()


NODES = {"on": "ns=2;s=On", "flow": "ns=2;s=Flow", "count": "ns=2;s=Count"}


def source(
    plant: PlantServer, nodes: dict[str, str], quality: dict[str, Check] | None = None
) -> OpcuaSampleSource:
    spec = OpcuaSource(endpoint=f"opc.tcp://127.0.0.1:{plant.port}/", nodes=nodes, interval=0.02)
    return OpcuaSampleSource(spec, list(nodes), quality or {}, SystemClock())


def test_values_bad_status_and_strange_nodes(
    plant: PlantServer, sink: Any, until: Until, start: Start
) -> None:
    plant.start()
    reading = source(plant, NODES, {"flow": Check(unit="l/s"), "count": Check(unit="pcs")})
    start(reading, sink)
    until(lambda: sink.parts)
    assert sink.values[0] == [1, 1.5, 7] and not sink.problems
    plant.write("2.5")
    until(lambda: sink.values[-1] == [1, 2.5, 7])
    plant.write("bad")
    until(lambda: sink.problems)
    assert math.isnan(sink.values[-1][1]) and sink.problems[-1] == "flow: missing or not a finite number"
    plant.write("3")
    until(lambda: sink.values[-1] == [1, 3, 7])
    reading.stop()
    strange = type(sink)()
    reading = source(plant, {"flow": NODES["flow"], "text": "ns=2;s=Text", "none": "ns=2;s=Nowhere"})
    start(reading, strange)
    until(lambda: strange.parts)
    reading.stop()
    assert strange.values[0][0] == 3 and all(math.isnan(value) for value in strange.values[0][1:])
    assert not any(thread.name.startswith("opcua") for thread in threading.enumerate())


def test_another_unit_than_expected_names_both(
    plant: PlantServer, sink: Any, until: Until, start: Start
) -> None:
    plant.start()
    reading = source(plant, NODES, {"flow": Check(unit="m3/h")})
    start(reading, sink)
    until(lambda: sink.parts)
    reading.stop()
    assert sink.problems[0] == "flow: unit is 'l/s', expected 'm3/h'"
    assert math.isnan(sink.values[0][1]) and sink.values[0][2] == 7


def test_it_comes_back_after_the_server_was_killed(
    plant: PlantServer, sink: Any, until: Until, start: Start
) -> None:
    reading = source(plant, NODES)
    start(reading, sink)
    until(lambda: sink.counts["errors"], "an attempt without a server")
    plant.start()
    until(lambda: sink.parts)
    plant.kill()
    errors = sink.counts["errors"]
    until(lambda: sink.counts["errors"] > errors, "the loss is noticed", 20)
    plant.start()
    before = len(sink.parts)
    until(lambda: len(sink.parts) > before, "values again", 30)
    assert sink.counts["reconnects"] >= 1
    reading.stop()
    stopped = len(sink.parts)
    assert not any(thread.name.startswith("opcua") for thread in threading.enumerate())
    assert len(sink.parts) == stopped


def test_without_room_the_newer_reading_counts(
    plant: PlantServer, new_sink: Any, until: Until, start: Start
) -> None:
    plant.start()
    sink = new_sink(room=0)
    reading = source(plant, NODES)
    start(reading, sink)
    until(lambda: sink.counts["dropped"] >= 3)
    reading.stop()


def test_a_silent_server_does_not_hold_up_the_stop(plant: PlantServer, sink: Any, start: Start) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", plant.port))
        silent.listen()
        reading = source(plant, NODES)
        start(reading, sink)
        accepted, _ = silent.accept()
        with accepted:
            assert accepted.recv(1)
            reading.stop()
    assert not any(thread.name.startswith("opcua") for thread in threading.enumerate())


def test_a_wrong_spec_is_refused(plant: PlantServer) -> None:
    with pytest.raises(InvalidDocument, match=r"opcua\.nodes\.a"):
        source(plant, {"a": "what is this"})
    spec = OpcuaSource(endpoint="opc.tcp://127.0.0.1:1/", nodes=NODES)
    with pytest.raises(InvalidDocument, match=r"opcua\.nodes\.b"):
        OpcuaSampleSource(spec, ["b"], {}, SystemClock())
