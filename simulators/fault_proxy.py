"""A bad link to an MQTT broker: packets lost, doubled and out of order, and connections that are cut.

It stands between clients and a broker and knows where a packet ends (MQTT 5.0, 2.1: fixed header,
"remaining length"), so that what it does is what a broken broker, bridge or gateway does. TCP itself
loses nothing: a packet is lost here although both ends believe that the other has it, which neither end
repeats on that connection. Only PUBLISH and its acknowledgements are touched; a connection that cannot
be opened would test nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = 3, 4, 5, 6, 7
_TOUCHED = frozenset({PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP})
#: A packet that says it is larger than this ends the connection.
MAX_PACKET = 64 << 20


@dataclass(frozen=True)
class Faults:
    """Shares of packets, and per packet the chance that the connection is cut after it. `hold` is how many
    later packets may overtake one that is out of order."""

    lost: float = 0.0
    doubled: float = 0.0
    reordered: float = 0.0
    cut: float = 0.0
    hold: int = 4

    def __post_init__(self) -> None:
        for name in ("lost", "doubled", "reordered", "cut"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, between 0 and 1")


class CutError(Exception):
    """The link is cut here."""


@dataclass
class Channel:
    """One direction of one connection: what of its packets goes on, and in which order. Pure but for `chance`."""

    faults: Faults
    chance: random.Random
    counts: Counter[str]
    _held: list[tuple[int, bytes]] = field(default_factory=list)

    def take(self, packet: bytes) -> list[bytes]:
        """The packets to forward now. Raises CutError after which nothing more may be sent."""
        out: list[bytes] = []
        if packet[0] >> 4 not in _TOUCHED:
            return [*self._flush(), packet]
        roll = self.chance.random
        self.counts["packets"] += 1
        if roll() < self.faults.cut:
            self.counts["cut"] += 1
            raise CutError
        if roll() < self.faults.lost:
            self.counts["lost"] += 1
        elif roll() < self.faults.reordered:
            self.counts["reordered"] += 1
            self._held.append((self.chance.randint(1, self.faults.hold), packet))
            return out
        else:
            out.append(packet)
            if roll() < self.faults.doubled:
                self.counts["doubled"] += 1
                out.append(packet)
        return out + self._overtaken()

    def _overtaken(self) -> list[bytes]:
        """What was held and has been overtaken often enough."""
        due = [packet for left, packet in self._held if left <= 1]
        self._held = [(left - 1, packet) for left, packet in self._held if left > 1]
        return due

    def _flush(self) -> list[bytes]:
        held, self._held = self._held, []
        return [packet for _, packet in held]


async def read_packet(reader: asyncio.StreamReader) -> bytes:
    """One control packet, whole. Raises IncompleteReadError at the end, ValueError for what is no MQTT."""
    head = await reader.readexactly(1)
    length, shift = 0, 0
    while True:
        byte = await reader.readexactly(1)
        head += byte
        length |= (byte[0] & 0x7F) << shift
        if not byte[0] & 0x80:
            break
        shift += 7
        if shift > 21:
            raise ValueError("a remaining length of more than four bytes")
    if length > MAX_PACKET:
        raise ValueError(f"a packet of {length} bytes")
    return head + await reader.readexactly(length)


class FaultProxy:
    """Listens on loopback and forwards to a broker. `faults` may be exchanged while it runs."""

    def __init__(self, host: str, port: int, faults: Faults, *, seed: int = 0) -> None:
        self._host = host
        self._port = port
        self.faults = faults
        self.counts: Counter[str] = Counter()
        self._chance = random.Random(seed)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def port(self) -> int:
        assert self._server is not None, "not started"
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", port)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self.cut_all()
            await self._server.wait_closed()

    def cut_all(self) -> None:
        """End every connection, as a router that restarts does."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(reader, back))
                group.create_task(self._forward(there, writer))
        except* (OSError, asyncio.IncompleteReadError, CutError, ValueError):
            self.counts["connections ended"] += 1
        finally:
            for end in (writer, back):
                self._writers.discard(end)
                end.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = Channel(self.faults, self._chance, self.counts)
        while True:
            packet = await read_packet(reader)
            channel.faults = self.faults
            for each in channel.take(packet):
                writer.write(each)
            await writer.drain()


async def serve(proxy: FaultProxy, port: int, ready: Callable[[int], None], stop: asyncio.Event) -> None:
    """Run until `stop`; `ready` is told the port."""
    await proxy.start(port)
    ready(proxy.port)
    with contextlib.suppress(asyncio.CancelledError):
        await stop.wait()
    await proxy.stop()
