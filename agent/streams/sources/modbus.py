"""Registers of a Modbus TCP device. Needs the extra `agent-modbus`."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agent.streams.sources.polling import Pace, Reported, check_features, one_sample, start_thread
from agent.streams.sources.port import Sink
from agent.streams.sources.waiting import Backoff
from edgeward.clock import Clock
from edgeward.errors import MissingDependency
from edgeward.wire.streams import ModbusSource, Register

try:
    from pymodbus.client import ModbusTcpClient
    from pymodbus.pdu import ModbusPDU
except ImportError as error:
    raise MissingDependency(
        "Modbus sources need pymodbus", hint="pip install 'edgeward[agent-modbus]'"
    ) from error

# One request may take that long, and stopping waits for one.
TIMEOUT_S: Final = 2.0
MOST_REGISTERS: Final = 125
MOST_BITS: Final = 2000

_FORMATS: Final = {
    "int16": "h", "uint16": "H", "int32": "i", "uint32": "I", "int64": "q", "uint64": "Q",
    "float32": "f", "float64": "d",
}  # fmt: skip
_BITS: Final = ("coil", "discrete")


@dataclass(frozen=True, slots=True)
class Read:
    """One request: `count` registers or bits of `table` from `address`, and the features that lie there."""

    table: str
    address: int
    count: int
    features: tuple[str, ...]


def words(register: Register) -> int:
    """Registers (or bits) that a value takes."""
    return 1 if register.table in _BITS else struct.calcsize(_FORMATS[register.type]) // 2 or 1


def plan(registers: Mapping[str, Register]) -> list[Read]:
    """As few requests as there are runs without a hole, since a device may refuse addresses it does not have."""
    reads: list[Read] = []
    for name, register in sorted(registers.items(), key=lambda item: (item[1].table, item[1].address)):
        end = register.address + words(register)
        most = MOST_BITS if register.table in _BITS else MOST_REGISTERS
        last = reads[-1] if reads else None
        if (
            last is not None
            and last.table == register.table
            and register.address <= last.address + last.count
            and end - last.address <= most
        ):
            count = max(last.count, end - last.address)
            reads[-1] = Read(last.table, last.address, count, (*last.features, name))
        else:
            reads.append(Read(register.table, register.address, end - register.address, (name,)))
    return reads


def value_of(register: Register, raw: Sequence[int]) -> float:
    """The value of a register's words, most significant first unless `swapped`. NaN may be what the device sent."""
    ordered = list(reversed(raw)) if register.swapped else list(raw)
    packed = struct.pack(f">{len(ordered)}H", *ordered)
    (number,) = struct.unpack(f">{_FORMATS[register.type]}", packed)
    return float(number) * register.scale + register.offset


class ModbusSampleSource:
    """A register that the device refuses is missing in the sample, and costs only its own feature.

    Counts `reconnects`, `errors` (attempts that failed), `refused_reads`, and samples `dropped` because
    the stream had no room: a device cannot wait, and the next reading is newer.
    """

    def __init__(self, spec: ModbusSource, features: Sequence[str], clock: Clock) -> None:
        """Raises InvalidDocument for a feature without a register."""
        check_features(features, list(spec.registers), "spec.source.modbus.registers")
        self._spec = spec
        self._features = tuple(features)
        self._registers = {name: spec.registers[name] for name in features}
        self._reads = plan(self._registers)
        self._clock = clock
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._name = f"modbus {spec.host}:{spec.port}"
        self._reported = Reported(self._name)

    def start(self, sink: Sink) -> None:
        self._thread = start_thread(self._name, lambda: self._work(sink))

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)

    def committed(self, epoch: str, seq: int) -> None:
        """Registers are not numbered."""

    def _work(self, sink: Sink) -> None:
        backoff = Backoff(most=max(5.0, self._spec.interval))
        connected_before = False
        while not self._stop.is_set():
            client: Any = ModbusTcpClient(self._spec.host, port=self._spec.port, timeout=TIMEOUT_S, retries=0)
            try:
                if not client.connect():
                    raise OSError("cannot connect")
                if connected_before:
                    sink.count("reconnects")
                connected_before = True
                self._poll(client, sink, backoff)
            # Whatever a foreign stack raises on what a device sent: the next attempt may work.
            except Exception as error:  # noqa: BLE001
                sink.count("errors")
                self._reported.failed(f"{type(error).__name__}: {error}")
            finally:
                client.close()
            self._stop.wait(backoff.delay())

    def _poll(self, client: Any, sink: Sink, backoff: Backoff) -> None:
        pace = Pace(self._clock, self._spec.interval)
        while not self._stop.is_set():
            readings: dict[str, float] = {}
            for read in self._reads:
                self._read(client, read, readings, sink)
                if self._stop.is_set():
                    return
            backoff.reset()
            self._reported.works()
            values = [readings.get(name, math.nan) for name in self._features]
            if not sink.take(one_sample(values, self._features, self._clock.now())):
                sink.count("dropped")
            self._stop.wait(pace.next())

    def _read(self, client: Any, read: Read, readings: dict[str, float], sink: Sink) -> None:
        response = self._request(client, read)
        if response.isError():
            sink.count("refused_reads")
            if len(read.features) > 1:
                # Which of them it was, the device does not say.
                for name in read.features:
                    register = self._registers[name]
                    single = Read(read.table, register.address, words(register), (name,))
                    self._read(client, single, readings, sink)
            return
        for name in read.features:
            register = self._registers[name]
            at = register.address - read.address
            if read.table in _BITS:
                if at < len(response.bits):
                    readings[name] = float(response.bits[at]) * register.scale + register.offset
            elif at + words(register) <= len(response.registers):
                readings[name] = value_of(register, response.registers[at : at + words(register)])

    def _request(self, client: Any, read: Read) -> ModbusPDU:
        ask = {
            "holding": client.read_holding_registers,
            "input": client.read_input_registers,
            "coil": client.read_coils,
            "discrete": client.read_discrete_inputs,
        }[read.table]
        answer: ModbusPDU = ask(read.address, count=read.count, device_id=self._spec.unit)
        return answer
