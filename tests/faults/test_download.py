"""What a link, a server and a disk may do to a download; the signed digest and length decide."""

from __future__ import annotations

import errno
import random
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.fetch import BlobStore, Limits, NoRoom
from edgeward.clock import SystemClock
from edgeward.errors import DigestMismatch, EdgewardError, Unavailable
from edgeward.storage import sha256_hex
from tests.faults.conftest import Answer, Server, head

CHUNK = 64 << 10
CONTENT = random.Random(1).randbytes(1 << 20)
DIGEST, SIZE = sha256_hex(CONTENT), len(CONTENT)
CLOCK = SystemClock()
IMPATIENT = Limits(rate=1000.0, window=0.3, deadline=60.0)

Serve = Callable[[Answer], tuple[Server, Any]]


def store(folder: Path, limits: Limits | None = None) -> BlobStore:
    return BlobStore(folder / "blobs", limits=limits, reserve=0)


def whole(connection: socket.socket, offset: int) -> None:
    connection.sendall(head(SIZE, offset) + CONTENT[offset:])


def test_a_connection_cut_at_200_offsets_costs_a_chunk_each(tmp_path: Path, serve: Serve) -> None:
    chance, ends = random.Random(7), [0]

    def cut(connection: socket.socket, offset: int) -> None:
        # About 200 pieces, half of them ended by a reset instead of a close.
        end = min(SIZE, offset + chance.randint(1, 2 * SIZE // 200))
        if len(ends) > 200:
            end = SIZE
        connection.sendall(head(SIZE, offset) + CONTENT[offset:end])
        ends.append(end)
        if chance.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    server, transport = serve(cut)
    blobs, tries = store(tmp_path), 0
    while True:
        tries += 1
        try:
            path = blobs.fetch(transport, DIGEST, SIZE, CLOCK)
            break
        except Unavailable:
            assert tries < 1000
    assert path.read_bytes() == CONTENT
    assert tries >= 150
    again = [end - begin for end, begin in zip(ends[:-1], server.offsets, strict=True)]
    assert all(0 <= size <= CHUNK for size in again)


@pytest.mark.parametrize("where", ["headers", "body", "nothing"])
def test_a_drip_is_given_up_wherever_it_drips(tmp_path: Path, serve: Serve, where: str) -> None:
    over = threading.Event()

    def drip(connection: socket.socket, offset: int) -> None:
        parts = {"headers": (b"", head(SIZE)), "body": (head(SIZE), CONTENT), "nothing": (b"", b"")}
        at_once, slowly = parts[where]
        connection.sendall(at_once)
        for byte in slowly[:2000]:
            connection.sendall(bytes([byte]))
            if over.wait(0.02):
                return
        over.wait(60)

    _, transport = serve(drip)
    try:
        with pytest.raises(Unavailable, match=r"slower than 1000 B/s over 0.3 s"):
            store(tmp_path, IMPATIENT).fetch(transport, DIGEST, SIZE, CLOCK)
    finally:
        over.set()


def test_a_download_that_is_never_done_ends_at_its_deadline(tmp_path: Path, serve: Serve) -> None:
    over = threading.Event()

    def steady(connection: socket.socket, offset: int) -> None:
        connection.sendall(head(SIZE, offset))
        for at in range(offset, SIZE, 500):
            connection.sendall(CONTENT[at : at + 500])
            if over.wait(0.05):
                return

    server, transport = serve(steady)
    blobs = store(tmp_path, Limits(rate=1000.0, window=0.4, deadline=1.0))
    with pytest.raises(Unavailable, match="not finished within 1 s"):
        blobs.fetch(transport, DIGEST, SIZE, CLOCK)
    over.set()
    server.answer = whole
    assert blobs.fetch(transport, DIGEST, SIZE, CLOCK).read_bytes() == CONTENT
    assert server.offsets[1] > 0, "what had arrived was kept"


def test_a_body_without_end_is_cut_behind_the_signed_length(tmp_path: Path, serve: Serve) -> None:
    sent = [0]

    def endless(connection: socket.socket, offset: int) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        # The socket's buffers hold what the client has not read: without them this counts what it took.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        while sent[0] < 64 << 20:
            connection.sendall(CONTENT[:CHUNK])
            sent[0] += CHUNK

    _, transport = serve(endless)
    with pytest.raises(DigestMismatch, match="longer than the signed 100000 bytes"):
        store(tmp_path).fetch(transport, DIGEST, 100_000, CLOCK)
    assert list((tmp_path / "blobs").iterdir()) == []
    assert sent[0] < 16 << 20


@pytest.mark.parametrize(
    ("answered", "problem"),
    [
        (head(SIZE) + CONTENT[:5000] + b"\x00" + CONTENT[5001:], DigestMismatch),
        (head(SIZE) + CONTENT[:-1], Unavailable),
        (head(SIZE - 1) + CONTENT[:-1], Unavailable),
        (head(SIZE + 1) + CONTENT + b"x", DigestMismatch),
        (head(SIZE, status="500 Oops"), EdgewardError),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", Unavailable),
        (b"nonsense\r\n\r\n", Unavailable),
        (b"", Unavailable),
    ],
)
def test_what_is_not_what_was_signed_never_becomes_visible(
    tmp_path: Path, serve: Serve, answered: bytes, problem: type[Exception]
) -> None:
    server, transport = serve(lambda connection, offset: connection.sendall(answered))
    blobs = store(tmp_path)
    with pytest.raises(problem):
        blobs.fetch(transport, DIGEST, SIZE, CLOCK)
    assert not blobs.path(DIGEST).exists()
    server.answer = whole
    for _ in range(2):
        try:
            blobs.fetch(transport, DIGEST, SIZE, CLOCK)
            break
        except DigestMismatch:
            continue  # what the bad answer had left was wrong: it begins anew
    assert blobs.read(DIGEST, SIZE) == CONTENT


@given(st.integers(0, SIZE - 1), st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_every_flipped_bit_is_found(tmp_path_factory: Any, at: int, bit: int) -> None:
    changed = bytearray(CONTENT)
    changed[at] ^= 1 << bit
    server = Server(lambda connection, offset: connection.sendall(head(SIZE) + changed))
    from edgeward.client.transport import Transport

    transport = Transport(server.url)
    blobs = store(tmp_path_factory.mktemp("flip"))
    try:
        with pytest.raises(DigestMismatch):
            blobs.fetch(transport, DIGEST, SIZE, CLOCK)
        assert list(blobs.folder.iterdir()) == []
    finally:
        transport.close()
        server.close()


@pytest.mark.parametrize("content_range", ["bytes 0-9/10", "bytes 12345-99999/100000", "nonsense"])
def test_another_range_than_was_asked_for_is_not_put_in_its_place(
    tmp_path: Path, serve: Serve, content_range: str
) -> None:
    def other(connection: socket.socket, offset: int) -> None:
        if offset:
            connection.sendall(head(SIZE, offset, content_range=content_range) + CONTENT[:10])
        else:
            connection.sendall(head(SIZE) + CONTENT[:300_000])

    server, transport = serve(other)
    blobs = store(tmp_path)
    for _ in range(2):
        with pytest.raises(Unavailable):
            blobs.fetch(transport, DIGEST, SIZE, CLOCK)
    assert server.offsets == [0, 300_000]
    server.answer = whole
    assert blobs.fetch(transport, DIGEST, SIZE, CLOCK).read_bytes() == CONTENT


def test_a_server_without_ranges_is_asked_for_the_whole(tmp_path: Path, serve: Serve) -> None:
    server, transport = serve(lambda connection, offset: connection.sendall(head(SIZE) + CONTENT[:9000]))
    blobs = store(tmp_path)
    with pytest.raises(Unavailable):
        blobs.fetch(transport, DIGEST, SIZE, CLOCK)
    server.answer = lambda connection, offset: connection.sendall(head(SIZE) + CONTENT)
    assert blobs.fetch(transport, DIGEST, SIZE, CLOCK).read_bytes() == CONTENT
    assert server.offsets == [0, 9000]


# the disk


def test_a_download_that_does_not_fit_is_not_begun(small_disk: Path, serve: Serve) -> None:
    server, transport = serve(whole)
    with pytest.raises(NoRoom) as refused:
        BlobStore(small_disk / "blobs", reserve=4096).fetch(transport, DIGEST, SIZE, CLOCK)
    assert refused.value.limit == SIZE + 4096 > refused.value.measured
    assert server.offsets == []


def test_a_disk_that_fills_up_meanwhile_keeps_what_has_arrived(small_disk: Path, serve: Serve) -> None:
    size = 700_000
    content = CONTENT[:size]
    digest = sha256_hex(content)
    filler = small_disk / "filler"

    def fill(connection: socket.socket, offset: int) -> None:
        connection.sendall(head(size, offset) + content[offset : offset + 100_000])
        filler.write_bytes(bytes(400_000))
        connection.sendall(content[offset + 100_000 :])

    server, transport = serve(fill)
    blobs = BlobStore(small_disk / "blobs", reserve=0)
    with pytest.raises(OSError, match="No space") as full:
        blobs.fetch(transport, digest, size, CLOCK)
    assert full.value.errno == errno.ENOSPC
    filler.unlink()
    server.answer = lambda connection, offset: connection.sendall(head(size, offset) + content[offset:])
    assert blobs.fetch(transport, digest, size, CLOCK).read_bytes() == content
    assert server.offsets[1] >= 50_000


def test_what_nothing_needs_is_removed(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    wanted, other, begun = (sha256_hex(name) for name in (b"wanted", b"other", b"begun"))
    for digest in (wanted, other):
        blobs.path(digest).write_bytes(b"12345")
    blobs.path(begun).with_suffix(".part").write_bytes(b"123")
    (blobs.folder / ".x.tmp").write_bytes(b"1")
    assert blobs.collect([wanted, begun]) == 6
    assert {path.name for path in blobs.folder.iterdir()} == {wanted, f"{begun}.part"}
    assert blobs.collect([]) == 8
