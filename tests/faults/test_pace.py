"""A site's cap and window on downloads, over real connections; seconds are the injected clock's."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent import delta
from agent.fetch import BlobStore, Limits, Origin
from agent.pace import LOOK_SECONDS, Pace, Paused
from edgeward.clock import ManualClock, SystemClock
from edgeward.errors import Unavailable
from edgeward.storage import sha256_hex
from edgeward.wire.package import Blob
from edgeward.wire.reports import WaitReason
from edgeward.wire.schedule import Delivery
from tests.faults.conftest import Answer, Server, head

CONTENT = random.Random(1).randbytes(1 << 20)
DIGEST, SIZE = sha256_hex(CONTENT), len(CONTENT)
RATE = 32 << 10
CHUNK = 64 << 10

Serve = Callable[[Answer], tuple[Server, Any]]


def whole(connection: socket.socket, offset: int) -> None:
    connection.sendall(head(SIZE, offset) + CONTENT[offset:])


class Seen(Pace):
    """A pace that remembers what passed at which of its clock's seconds."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock, wait=clock.advance)
        self.clock = clock
        self.passed: list[tuple[float, int]] = []

    def take(self, count: int, *, capped: bool = True) -> None:
        super().take(count, capped=capped)
        self.passed.append((self.clock.monotonic(), count))

    def most_beyond(self, rate: float) -> float:
        """By how many bytes any stretch of time exceeded what `rate` allows in it."""
        worst = 0.0
        for first in range(len(self.passed)):
            total = 0
            for at, count in self.passed[first:]:
                total += count
                worst = max(worst, total - rate * (at - self.passed[first][0]))
        return worst


def test_no_stretch_of_a_download_exceeds_the_cap(tmp_path: Path, serve: Serve) -> None:
    clock = ManualClock()
    pace = Seen(clock)
    pace.allow(Delivery(rate=RATE), lambda: None)
    _, transport = serve(whole)
    blobs = BlobStore(tmp_path / "blobs", reserve=0, pace=pace)
    assert blobs.fetch(transport, DIGEST, SIZE, clock).read_bytes() == CONTENT
    assert sum(count for _, count in pace.passed) == SIZE
    assert pace.most_beyond(RATE) <= CHUNK + RATE  # one chunk, and a second's worth after a pause
    assert clock.monotonic() == pytest.approx(SIZE / RATE, abs=1.5)


def test_without_a_cap_nothing_waits(tmp_path: Path, serve: Serve) -> None:
    clock = ManualClock()
    pace = Seen(clock)
    _, transport = serve(whole)
    BlobStore(tmp_path / "blobs", reserve=0, pace=pace).fetch(transport, DIGEST, SIZE, clock)
    assert clock.monotonic() == 0.0


def test_the_sites_own_network_has_no_cap_and_no_window(tmp_path: Path, serve: Serve) -> None:
    clock = ManualClock()
    pace = Seen(clock)
    pace.allow(Delivery(rate=RATE), lambda: Paused(WaitReason.BANDWIDTH_WINDOW, "closed", None))
    looked: list[int] = []
    pace.meanwhile = lambda: looked.append(1)
    _, transport = serve(whole)
    blobs = BlobStore(tmp_path / "blobs", reserve=0, pace=pace)
    with pytest.raises(Paused):
        blobs.fetch(transport, DIGEST, SIZE, clock)
    origin = Origin("/artifacts", ".peer", local=True)
    assert blobs.fetch(transport, DIGEST, SIZE, clock, origin).read_bytes() == CONTENT
    assert clock.monotonic() == 0.0 and looked, "the guard still runs between its chunks"


def test_two_transfers_share_one_cap(tmp_path: Path, serve: Serve) -> None:
    clock = ManualClock()
    pace = Seen(clock)
    pace.allow(Delivery(rate=RATE), lambda: None)
    transports = [serve(whole)[1], serve(whole)[1]]
    threads = [
        threading.Thread(
            target=BlobStore(tmp_path / str(index), reserve=0, pace=pace).fetch,
            args=(transport, DIGEST, SIZE, clock),
        )
        for index, transport in enumerate(transports)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(count for _, count in pace.passed) == 2 * SIZE
    # Two threads let the clock go on while the other one waits: it is never too fast.
    assert clock.monotonic() >= 2 * SIZE / RATE - 2


def test_after_a_long_pause_no_more_than_a_second_s_worth_comes_at_once() -> None:
    clock = ManualClock()
    pace = Seen(clock)
    pace.allow(Delivery(rate=RATE), lambda: None)
    clock.advance(3600.0)
    for _ in range(100):
        pace.take(RATE // 10)
    assert pace.most_beyond(RATE) <= RATE + RATE // 10


def test_a_cap_is_not_a_slow_peer_and_does_not_hide_one(tmp_path: Path, serve: Serve) -> None:
    """Real seconds, for the watch's thread: at 64 KiB/s, of a peer that must bring 1 MB/s when it is asked."""
    limits = Limits(rate=1_000_000.0, window=0.3, deadline=1.0)
    clock = SystemClock()
    pace = Pace(clock)
    pace.allow(Delivery(rate=64 << 10), lambda: None)
    part, over = CONTENT[: 192 << 10], threading.Event()
    digest = sha256_hex(part)

    def quick(connection: socket.socket, offset: int) -> None:
        connection.sendall(head(len(part), offset) + part[offset:])

    def drip(connection: socket.socket, offset: int) -> None:
        connection.sendall(head(len(part), offset))
        for at in range(offset, len(part), 100):
            connection.sendall(part[at : at + 100])
            if over.wait(0.02):
                return

    _, transport = serve(quick)
    blobs = BlobStore(tmp_path / "quick", limits=limits, reserve=0, pace=pace)
    began = clock.monotonic()
    assert blobs.fetch(transport, digest, len(part), clock).read_bytes() == part
    assert clock.monotonic() - began > limits.deadline, "the cap took longer than a peer may"

    _, transport = serve(drip)
    blobs = BlobStore(tmp_path / "drip", limits=limits, reserve=0, pace=pace)
    try:
        with pytest.raises(Unavailable, match="slower than 1e"):
            blobs.fetch(transport, digest, len(part), clock)
    finally:
        over.set()


def test_a_window_that_closes_pauses_what_runs_and_keeps_its_part(tmp_path: Path, serve: Serve) -> None:
    clock = ManualClock()
    pace = Seen(clock)
    opens = 100.0

    def closed() -> Paused | None:
        shut = 3.0 <= clock.monotonic() < opens
        return Paused(WaitReason.BANDWIDTH_WINDOW, "closed", opens) if shut else None

    pace.allow(Delivery(rate=RATE), closed)
    server, transport = serve(whole)
    blobs = BlobStore(tmp_path / "blobs", reserve=0, pace=pace)
    with pytest.raises(Paused) as caught:
        blobs.fetch(transport, DIGEST, SIZE, clock)
    assert caught.value.until == opens and clock.monotonic() < 3.0 + 2 * LOOK_SECONDS
    part = blobs.path(DIGEST).with_suffix(".part").stat().st_size
    assert 2 * RATE < part < 4 * RATE + CHUNK
    with pytest.raises(Paused):
        blobs.fetch(transport, DIGEST, SIZE, clock)
    assert server.offsets == [0], "outside of the window nobody is asked"
    clock.advance(opens)
    assert blobs.fetch(transport, DIGEST, SIZE, clock).read_bytes() == CONTENT
    assert server.offsets == [0, part]


def test_a_delta_keeps_to_the_window_and_the_cap(tmp_path: Path, serve: Serve) -> None:
    """Its bytes count like any, and outside of the window none is asked for."""
    clock = ManualClock()
    pace = Seen(clock)
    base, target = CONTENT, CONTENT[:-1] + b"x"
    base_blob, blob = Blob(DIGEST, SIZE), Blob(sha256_hex(target), SIZE)
    noise = random.Random(2).randbytes(8 * RATE)
    etag = sha256_hex(noise)

    def answer(connection: socket.socket, offset: int) -> None:
        fields = f'ETag: "{etag}"\r\nEdgeward-Delta-Base: {DIGEST}\r\nContent-Length: {len(noise)}'
        connection.sendall(f"HTTP/1.1 200 OK\r\n{fields}\r\n\r\n".encode() + noise)

    server, transport = serve(answer)
    blobs = BlobStore(tmp_path / "blobs", reserve=0, pace=pace)
    blobs.path(DIGEST).write_bytes(base)
    pace.allow(Delivery(rate=RATE), lambda: Paused(WaitReason.BANDWIDTH_WINDOW, "closed", 9.0))
    with pytest.raises(Paused):
        delta.fetch(blobs, transport, blob, [base_blob], clock)
    assert server.offsets == []
    pace.allow(Delivery(rate=RATE), lambda: None)
    limits = Limits(deadline=2.0, window=0.1, rate=float(SIZE))
    assert delta.fetch(blobs, transport, blob, [base_blob], clock, limits) is None, "it is no delta"
    assert sum(count for _, count in pace.passed) == len(noise), "the cap's time was not the peer's"
    assert clock.monotonic() >= len(noise) / RATE - 1.5


def test_what_the_system_reads_ahead_of_a_capped_transfer_is_small(serve: Serve) -> None:
    """Else a file of some megabytes crosses the link at once, whatever is counted afterwards."""
    pace = Pace(ManualClock())
    ahead = {}
    for name, rate in (("capped", 8 << 10), ("free", None)):
        pace.allow(Delivery(rate=rate), lambda: None)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            reader = socket.create_connection(listening.getsockname())
            writer, _ = listening.accept()
            with reader, writer:
                writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                pace.narrow(reader)
                writer.settimeout(0.2)
                sent = 0
                try:
                    while sent < 8 << 20:
                        sent += writer.send(bytes(4096))
                except TimeoutError:
                    pass
                ahead[name] = sent
    assert ahead["capped"] < 128 << 10 and 2 * ahead["capped"] < ahead["free"]


def test_who_waits_under_the_cap_gives_up_when_the_agent_ends() -> None:
    pace, raised = Pace(SystemClock()), threading.Event()
    pace.allow(Delivery(rate=4096), lambda: None)

    def wait() -> None:
        with pytest.raises(Unavailable, match="the agent ends"):
            pace.take(1 << 30)
        raised.set()

    thread = threading.Thread(target=wait)
    thread.start()
    pace.stop()
    thread.join()
    assert raised.is_set()
