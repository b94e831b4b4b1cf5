"""The bad link: what it does to packets, and that real clients and brokers still talk through it."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.broker import EmbeddedBroker
from edgeward.mqtt import Broker, Link
from simulators.fault_proxy import Channel, CutError, FaultProxy, Faults, read_packet
from simulators.processes import wait_until

share = st.floats(0, 1)


def packets(number: int, kind: int = 3) -> list[bytes]:
    return [bytes([kind << 4, 4]) + index.to_bytes(4, "big") for index in range(number)]


@given(st.integers(0, 200), st.booleans())
def test_a_good_link_changes_nothing(number: int, acks: bool) -> None:
    sent = packets(number, 4 if acks else 3)
    channel = Channel(Faults(), random.Random(1), Counter())
    assert [out for packet in sent for out in channel.take(packet)] == sent


@given(share, share, share, st.integers(0, 1000))
def test_every_packet_comes_as_often_as_is_counted(
    lost: float, doubled: float, reordered: float, seed: int
) -> None:
    sent, counts = packets(200), Counter[str]()
    channel = Channel(Faults(lost, doubled, reordered), random.Random(seed), counts)
    out = [each for packet in sent for each in channel.take(packet)]
    # Whatever else is sent takes along what was held.
    out += channel.take(b"\xc0\x00")[:-1]
    assert len(out) == 200 - counts["lost"] + counts["doubled"]
    assert set(out) <= set(sent) and max(Counter(out).values(), default=0) <= 2
    assert counts["packets"] == 200


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        (Faults(lost=1.0), []),
        (Faults(doubled=1.0), [index for index in range(50) for _ in range(2)]),
    ],
)
def test_all_of_them(faults: Faults, expected: list[int]) -> None:
    channel = Channel(faults, random.Random(0), Counter())
    out = [each for packet in packets(50) for each in channel.take(packet)]
    assert [int.from_bytes(each[2:], "big") for each in out] == expected


def test_one_that_is_overtaken_comes_within_the_hold() -> None:
    counts = Counter[str]()
    channel = Channel(Faults(reordered=0.2, hold=4), random.Random(7), counts)
    out = [each for packet in packets(2000) for each in channel.take(packet)]
    order = [int.from_bytes(each[2:], "big") for each in out]
    assert counts["reordered"] > 200 and order != sorted(order)
    position = {number: at for at, number in enumerate(order)}
    assert all(abs(at - number) <= 16 for number, at in position.items())


def test_what_opens_a_connection_is_left_alone() -> None:
    channel = Channel(Faults(1.0, 1.0, 1.0, 1.0), random.Random(0), Counter())
    for kind in (1, 2, 8, 9, 10, 11, 12, 13, 14, 15):
        packet = bytes([kind << 4, 0])
        assert channel.take(packet) == [packet]
    with pytest.raises(CutError):
        channel.take(packets(1)[0])


@pytest.mark.parametrize("name", ["lost", "doubled", "reordered", "cut"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_share_is_one(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Faults(**{name: value})


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


@pytest.mark.parametrize("raw", [b"\x30\xff\xff\xff\xff\x01", b"\x30\xff\xff\xff\x7f"])
def test_what_is_no_packet_ends_the_connection(raw: bytes) -> None:
    async def read() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(raw)
        reader.feed_eof()
        await read_packet(reader)

    with pytest.raises(ValueError, match=r"bytes"):
        run(read())


@given(st.binary(max_size=300), st.integers(0, 15))
def test_a_packet_is_read_as_it_was_written(body: bytes, kind: int) -> None:
    low, high = len(body) & 0x7F, len(body) >> 7
    packet = bytes([kind << 4, low | 0x80, high]) + body if high else bytes([kind << 4, low]) + body

    async def read() -> bytes:
        reader = asyncio.StreamReader()
        reader.feed_data(packet + b"next")
        return await read_packet(reader)

    assert run(read()) == packet


class Running:
    """A proxy on a loop of its own, before a broker."""

    def __init__(self, port: int, faults: Faults) -> None:
        self.proxy = FaultProxy("127.0.0.1", port, faults)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> Running:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.proxy.start(), self.loop).result(30)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.proxy.stop(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(30)

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.proxy.port}"


def test_real_clients_lose_messages_through_it_that_both_ends_believe_delivered(tmp_path: Path) -> None:
    """What an outbox is for: QoS 1 alone does not repeat on a connection that stays."""
    got: list[bytes] = []
    with (
        EmbeddedBroker(tmp_path) as broker,
        Running(int(broker.url.rpartition(":")[2]), Faults()) as link,
    ):
        reader = Link(
            Broker(broker.url), "reader", subscriptions=("a",), on_message=lambda m: got.append(m.payload)
        )
        writer = Link(Broker(link.url), "writer", max_reconnect_delay=1)
        for each in (reader, writer):
            each.start()
            wait_until(lambda each=each: each.connected, what="the broker", timeout=30)  # type: ignore[misc]
        writer.publish("a", b"good")
        wait_until(lambda: got == [b"good"], what="a message on a good link", timeout=30)
        link.proxy.faults = Faults(lost=1.0)
        writer.publish("a", b"lost")
        wait_until(lambda: link.proxy.counts["lost"] > 0, what="the loss", timeout=30)
        link.proxy.faults = Faults()
        writer.publish("a", b"later")
        wait_until(lambda: got == [b"good", b"later"], what="the next message", timeout=30)
        link.proxy.faults = Faults(cut=1.0)
        writer.publish("a", b"cut")
        wait_until(lambda: link.proxy.counts["cut"] > 0, what="the cut", timeout=30)
        link.proxy.faults = Faults()
        wait_until(lambda: b"lost" in got, what="what a new connection repeats", timeout=30)
        for each in (reader, writer):
            each.stop()
