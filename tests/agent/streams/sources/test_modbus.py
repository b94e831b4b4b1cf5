"""The Modbus source against pymodbus's own server on loopback."""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from agent.streams.sources.modbus import ModbusSampleSource, plan, value_of, words
from edgeward.clock import SystemClock
from edgeward.errors import InvalidDocument
from edgeward.wire.streams import ModbusSource, Register

Until = Callable[..., None]
Start = Callable[..., None]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def serving(port: int) -> Iterator[None]:
    """Holding 0-9 (0: int16 -5, 1-2: float32 1.5, 3-4: the same swapped), input 100, coils and discretes."""
    high, low = struct.unpack(">HH", struct.pack(">f", 1.5))
    holding = SimData(0, values=[0xFFFB, high, low, low, high, 7], datatype=DataType.REGISTERS)
    device = SimDevice(
        id=1,
        simdata=(
            [SimData(0, values=[True, False, True] + [False] * 13, datatype=DataType.BITS)],
            [SimData(0, values=[False, True] + [False] * 14, datatype=DataType.BITS)],
            [holding],
            [SimData(100, values=[250], datatype=DataType.REGISTERS)],
        ),
    )
    ready, box = threading.Event(), {}

    async def run() -> None:
        server = ModbusTcpServer(device, address=("127.0.0.1", port))
        box["stop"], box["loop"] = server.shutdown, asyncio.get_running_loop()
        await server.serve_forever(background=True)
        ready.set()
        await server.serving

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(10)
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(box["stop"](), box["loop"]).result(10)
        thread.join(10)


def source(
    port: int, registers: dict[str, Register], features: list[str] | None = None
) -> ModbusSampleSource:
    spec = ModbusSource(host="127.0.0.1", port=port, registers=registers, interval=0.02)
    return ModbusSampleSource(spec, features or list(registers), SystemClock())


REGISTERS = {
    "signed": Register(address=0, type="int16", scale=0.1, offset=1),
    "float": Register(address=1, type="float32"),
    "swapped": Register(address=3, type="float32", swapped=True),
    "input": Register(address=100, table="input"),
    "coil": Register(address=2, table="coil"),
    "discrete": Register(address=0, table="discrete"),
}


def test_registers_become_features_in_their_order(sink: Any, until: Until, start: Start) -> None:
    port = free_port()
    with serving(port):
        reading = source(port, REGISTERS, ["coil", "signed", "float", "swapped", "input", "discrete"])
        start(reading, sink)
        until(lambda: len(sink.parts) >= 2)
        reading.stop()
    assert sink.values[0] == pytest.approx([1, 0.5, 1.5, 1.5, 250, 0])
    assert not sink.problems and not sink.counts["errors"]


def test_a_refused_register_costs_its_own_feature(sink: Any, until: Until, start: Start) -> None:
    port = free_port()
    registers = {"good": Register(address=5), "beyond": Register(address=6), "alone": Register(address=500)}
    with serving(port):
        reading = source(port, registers)
        start(reading, sink)
        until(lambda: sink.parts)
        reading.stop()
    assert sink.values[0][0] == 7 and math.isnan(sink.values[0][1]) and math.isnan(sink.values[0][2])
    assert sink.problems[0] == "beyond: missing or not a finite number"
    assert sink.counts["refused_reads"] >= 3, "the two together, and each of them alone"


def test_it_comes_back_with_the_device(sink: Any, until: Until, start: Start) -> None:
    port = free_port()
    reading = source(port, REGISTERS)
    start(reading, sink)
    until(lambda: sink.counts["errors"], "a failed attempt is counted, and start() did not wait for it")
    with serving(port):
        until(lambda: sink.parts)
    errors = sink.counts["errors"]
    until(lambda: sink.counts["errors"] > errors)
    before = len(sink.parts)
    with serving(port):
        until(lambda: len(sink.parts) > before)
        assert sink.counts["reconnects"] >= 1
    reading.stop()
    stopped = len(sink.parts)
    assert not any(thread.name.startswith("modbus") for thread in threading.enumerate())
    assert len(sink.parts) == stopped


def test_without_room_the_newer_reading_counts(new_sink: Any, until: Until, start: Start) -> None:
    port = free_port()
    sink = new_sink(room=0)
    with serving(port):
        reading = source(port, REGISTERS)
        start(reading, sink)
        until(lambda: sink.counts["dropped"] >= 3)
        reading.stop()


def test_a_silent_device_does_not_hold_up_the_stop(sink: Any, start: Start) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        reading = source(silent.getsockname()[1], REGISTERS)
        start(reading, sink)
        accepted, _ = silent.accept()
        with accepted:
            assert accepted.recv(1)
            reading.stop()
    assert not any(thread.name.startswith("modbus") for thread in threading.enumerate())


def test_a_feature_without_a_register_is_refused() -> None:
    with pytest.raises(InvalidDocument, match=r"modbus\.registers\.b"):
        source(1, {"a": Register(address=0)}, ["a", "b"])


registers = st.dictionaries(
    st.text(min_size=1, max_size=3),
    st.builds(
        Register,
        address=st.one_of(st.integers(0, 300), st.integers(0, 60000)),
        table=st.sampled_from(["holding", "input", "coil", "discrete"]),
        type=st.sampled_from(["int16", "uint32", "float64"]),
    ),
    min_size=1,
    max_size=60,
)


@given(registers)
def test_the_plan_reads_every_feature_once_within_the_protocols_limits(given: dict[str, Register]) -> None:
    reads = plan(given)
    assert sorted(name for read in reads for name in read.features) == sorted(given)
    for read in reads:
        assert 1 <= read.count <= (2000 if read.table in ("coil", "discrete") else 125)
        wanted: set[int] = set()
        for name in read.features:
            register = given[name]
            span = range(register.address, register.address + words(register))
            assert register.table == read.table
            assert read.address <= span.start and span.stop <= read.address + read.count
            wanted.update(span)
        assert wanted == set(range(read.address, read.address + read.count)), "no address nobody asked for"


def test_neighbours_share_a_request() -> None:
    given = {f"f{index}": Register(address=index * 2, type="float32") for index in range(70)}
    assert [(read.address, read.count) for read in plan(given)] == [(0, 124), (124, 16)]


@given(
    st.sampled_from([("int16", "h"), ("uint16", "H"), ("int32", "i"), ("uint64", "Q"), ("float64", "d")]),
    st.binary(min_size=8, max_size=8),
    st.booleans(),
)
def test_values_come_out_of_their_words(kind: tuple[Any, str], raw: bytes, swapped: bool) -> None:
    register = Register(address=0, type=kind[0], swapped=swapped)
    count = words(register)
    (expected,) = struct.unpack(f">{kind[1]}", raw[: count * 2])
    sent = list(struct.unpack(f">{count}H", raw[: count * 2]))
    got = value_of(register, sent[::-1] if swapped else sent)
    assert got == float(expected) or math.isnan(expected)
