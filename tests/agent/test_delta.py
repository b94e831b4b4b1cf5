"""Deltas on the device: used where they can be, and whatever is wrong with one, the whole file comes."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agent import delta
from agent.fetch import BlobStore, Limits
from agent.state import SlotRecord
from edgeward import delta as codecs
from edgeward.client.transport import Transport
from edgeward.clock import ManualClock, SystemClock
from edgeward.storage import sha256_hex
from edgeward.wire import API_VERSION
from edgeward.wire.desired import ModelRef
from edgeward.wire.package import Blob, Golden, Lineage, Manifest, Variant

OLD = random.Random(1).randbytes(200_000)
NEW = OLD[:50_000] + random.Random(2).randbytes(3000) + OLD[53_000:]
MADE = codecs.make(OLD, NEW)
assert MADE is not None
DELTA = MADE.content
BASE, TARGET = Blob(sha256_hex(OLD), len(OLD)), Blob(sha256_hex(NEW), len(NEW))


class Request:
    """What a test's answer to a delta request works with."""

    def __init__(self, handler: BaseHTTPRequestHandler, source: Source) -> None:
        self._handler = handler
        self._source = source
        self.range = handler.headers.get("Range", "")
        self.if_range = handler.headers.get("If-Range", "")
        self.begun = False
        self.bases = re.findall("base=([0-9a-f]+)", handler.path)

    def head(self, status: int = 200, **headers: str) -> None:
        self._handler.send_response(status)
        for name, value in headers.items():
            if value:
                self._handler.send_header(name.replace("_", "-"), value)
        self._handler.end_headers()

    def send(self, data: bytes) -> None:
        self._handler.wfile.write(data)
        self._source.sent += len(data)

    def delta(self, content: bytes = DELTA, base: str = BASE.digest, **headers: str) -> None:
        """As the controller answers, ranges included."""
        etag = f'"{sha256_hex(content)}"'
        begin = 0
        if self.range and self.if_range == etag:
            begin = int(self.range.removeprefix("bytes=").removesuffix("-"))
        length = str(len(content) - begin)
        told = {"ETag": etag, "Edgeward_Delta_Base": base, "Content_Length": length} | headers
        self.head(206 if begin else 200, **told)
        self.send(content[begin:])

    def cut(self) -> None:
        self._handler.close_connection = True


@dataclass
class Source:
    """A real HTTP server; `answers` are taken in turn for delta requests, the last one for all that follow."""

    answers: list[Callable[[Request], None]] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)
    whole: int = 0
    sent: int = 0
    url: str = ""

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        request = Request(handler, self)
        if path == f"/artifacts/{TARGET.digest}":
            self.whole += 1
            request.head(Content_Length=str(len(NEW)))
            request.send(NEW)
        elif path == f"/artifacts/{TARGET.digest}/delta":
            self.asked.append(request)
            answer = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
            answer(request)
        else:
            request.head(404, Content_Length="0")


@contextmanager
def serving(source: Source) -> Iterator[Transport]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            try:
                source.serve(self)
            except (ConnectionError, TimeoutError):
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        source.url = f"http://127.0.0.1:{server.server_port}"
        transport = Transport(source.url)
        try:
            yield transport
        finally:
            transport.close()
            server.shutdown()
            thread.join()


class Device:
    def __init__(self, folder: Path, transport: Transport) -> None:
        self.transport = transport
        self.blobs = BlobStore(folder / "blobs")
        self.clock = ManualClock()
        self.folder = folder
        self.blobs.path(BASE.digest).write_bytes(OLD)

    def fetch(self, *bases: Blob) -> int | None:
        """As Verifier.fetch_blobs does; what the delta brought over the network."""
        took = delta.fetch(self.blobs, self.transport, TARGET, bases or [BASE], self.clock)
        self.blobs.fetch(self.transport, TARGET.digest, TARGET.size, self.clock)
        assert self.blobs.read(TARGET.digest, TARGET.size) == NEW
        return took

    def left(self) -> list[str]:
        return [path.name for path in self.folder.glob("deltas/*")]


@contextmanager
def device(folder: Path, *answers: Callable[[Request], None]) -> Iterator[tuple[Device, Source]]:
    source = Source(list(answers))
    with serving(source) as transport:
        yield Device(folder, transport), source


def test_a_delta_is_taken_instead_of_the_whole(tmp_path: Path) -> None:
    with device(tmp_path, Request.delta) as (one, source):
        missing = Blob("0" * 64, 5)
        assert one.fetch(missing, BASE) == len(DELTA)
        assert source.whole == 0 and source.sent == len(DELTA) < 0.02 * len(NEW)
        assert source.asked[0].bases == [BASE.digest], "what is not on the disk is not offered"
        assert one.left() == []
        assert one.fetch() is None and len(source.asked) == 1, "it is here already"


def test_nothing_is_asked_for_without_a_base_or_for_a_small_file(tmp_path: Path) -> None:
    with device(tmp_path, Request.delta) as (one, source):
        assert one.fetch(Blob("0" * 64, 5)) is None
        assert source.asked == [] and source.whole == 1
        small = Blob("1" * 64, delta.SMALLEST - 1)
        assert delta.fetch(one.blobs, one.transport, small, [BASE], one.clock) is None
        assert source.asked == []


def flipped(at: int) -> bytes:
    damaged = bytearray(DELTA)
    damaged[at] ^= 1
    return bytes(damaged)


OTHER = codecs.make(OLD, NEW[:-1] + b"x")
assert OTHER is not None
WRONG: dict[str, Callable[[Request], None]] = {
    "there is none": lambda request: request.head(404, Content_Length="0"),
    "bit flip in the head": lambda request: request.delta(flipped(9)),
    "bit flip in the frame": lambda request: request.delta(flipped(len(DELTA) - 500)),
    "truncated": lambda request: request.delta(DELTA[:-100]),
    "of another model": lambda request: request.delta(OTHER.content),
    "no delta at all": lambda request: request.delta(b"<html>" * 500),
    "empty": lambda request: request.delta(b""),
    "as long as the file": lambda request: request.delta(NEW),
    "announced as too long": lambda request: request.head(
        ETag=f'"{"0" * 64}"', Edgeward_Delta_Base=BASE.digest, Content_Length=str(len(NEW))
    ),
    "from a base that was not offered": lambda request: request.delta(base="0" * 64),
    "does not say its base": lambda request: request.delta(base=""),
    "an ETag that is a path": lambda request: request.delta(ETag='"../../../blobs/x"'),
    "an ETag that is no hash": lambda request: request.delta(ETag='"abc"'),
    "coded": lambda request: request.delta(Content_Encoding="gzip"),
    "a server that fails": lambda request: request.head(500, Content_Length="0"),
    "it asks for too much": lambda request: request.head(416, Content_Length="0"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_whole_comes_when_the_delta_is_wrong(tmp_path: Path, wrong: str) -> None:
    with device(tmp_path, WRONG[wrong]) as (one, source):
        assert one.fetch() is None
        assert (source.whole, len(source.asked)) == (1, 1)
        assert one.left() == []
        assert sorted(path.name for path in (tmp_path / "blobs").iterdir()) == sorted(
            [BASE.digest, TARGET.digest]
        )


def test_a_damaged_base_is_found_before_it_is_used(tmp_path: Path) -> None:
    with device(tmp_path, Request.delta) as (one, source):
        one.blobs.path(BASE.digest).write_bytes(b"x" + OLD[1:])
        assert one.fetch() is None
        assert source.whole == 1 and one.left() == []


#: What lies in the sockets' buffers when the reader has gone.
SOCKETS = 32 << 20


def endless(request: Request) -> None:
    request.head(ETag=f'"{"0" * 64}"', Edgeward_Delta_Base=BASE.digest, Connection="close")
    request.cut()
    while True:
        request.send(bytes(1 << 16))


def test_an_endless_delta_is_cut_at_the_signed_length(tmp_path: Path) -> None:
    with device(tmp_path, endless) as (one, source):
        assert one.fetch() is None
        assert source.whole == 1 and one.left() == []
        assert source.sent < 2 * len(NEW) + SOCKETS


def endless_error(request: Request) -> None:
    request.head(404, Connection="close")
    request.cut()
    while True:
        request.send(b" " * 4096)


def test_an_endless_error_is_cut(tmp_path: Path) -> None:
    with device(tmp_path, endless_error) as (one, source):
        assert one.fetch() is None and source.whole == 1
        assert source.sent < len(NEW) + SOCKETS


def test_a_connection_that_breaks_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    def broken(request: Request) -> None:
        begin = int(request.range.removeprefix("bytes=").removesuffix("-") or 0)
        told = {"ETag": f'"{sha256_hex(DELTA)}"', "Edgeward_Delta_Base": BASE.digest}
        request.head(206 if begin else 200, Content_Length=str(len(DELTA) - begin), **told)
        request.send(DELTA[begin : begin + 500])
        request.cut()

    with device(tmp_path, broken) as (one, source):
        assert one.fetch() == len(DELTA)
        assert source.whole == 0
        assert source.sent <= len(DELTA) + len(source.asked), "at most a byte twice for each cut"
        assert len(source.asked) == -(-(len(DELTA) - 500) // 499) + 1


def test_what_has_arrived_outlives_the_agent_but_not_another_delta(tmp_path: Path) -> None:
    def half(request: Request) -> None:
        told = {"ETag": f'"{sha256_hex(DELTA)}"', "Edgeward_Delta_Base": BASE.digest}
        request.head(Content_Length=str(len(DELTA)), **told)
        request.send(DELTA[:2000])
        request.cut()

    def dead(request: Request) -> None:
        request.cut()

    with device(tmp_path, half, dead) as (one, source):
        (tmp_path / "deltas").mkdir()
        (tmp_path / "deltas" / f"{TARGET.digest}.{'1' * 64}").write_bytes(b"of a delta that is no more")
        (tmp_path / "deltas" / f"{'2' * 64}.{'1' * 64}").write_bytes(b"another artifact's")
        assert delta.fetch(one.blobs, one.transport, TARGET, [BASE], one.clock) is None
        assert len(source.asked) == 1 + delta.TRIES
        assert one.left() == [f"{TARGET.digest}.{sha256_hex(DELTA)}"]
    for index, etag in enumerate((sha256_hex(DELTA), "1" * 64)):
        folder = tmp_path / str(index)
        (folder / "deltas").mkdir(parents=True)
        (folder / "deltas" / f"{TARGET.digest}.{etag}").write_bytes(DELTA[:2000])
        with device(folder, Request.delta) as (one, source):
            assert one.fetch() == len(DELTA)
            assert source.sent == (len(DELTA) - 1999 if index == 0 else len(DELTA))
            assert one.left() == []


def test_a_complete_delta_that_was_not_applied_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "deltas").mkdir()
    (tmp_path / "deltas" / f"{TARGET.digest}.{sha256_hex(DELTA)}").write_bytes(DELTA)
    with device(tmp_path, Request.delta) as (one, source):
        assert one.fetch() == len(DELTA) and source.sent == 1


def test_a_busy_controller_is_asked_again_a_few_times(tmp_path: Path) -> None:
    def busy(request: Request) -> None:
        request.head(503, Content_Length="0", Retry_After="1")

    with device(tmp_path / "a", busy, Request.delta) as (one, source):
        assert one.fetch() == len(DELTA) and len(source.asked) == 2
    with device(tmp_path / "b", busy) as (one, source):
        assert one.fetch() is None
        assert len(source.asked) == delta.TRIES and source.whole == 1


def test_a_controller_that_wants_to_be_left_alone_is(tmp_path: Path) -> None:
    def full(request: Request) -> None:
        request.head(503, Content_Length="0", Retry_After="10")

    with device(tmp_path, full) as (one, source):
        assert one.fetch() is None
        assert (source.whole, len(source.asked)) == (1, 1)


def test_a_head_that_never_ends_is_cut(tmp_path: Path) -> None:
    ended = threading.Event()

    def drip(request: Request) -> None:
        request.cut()
        try:
            while True:
                request.send(b"HTTP/1.1 200 OK\r\n" if not request.begun else b"X: y\r\n"[:1])
                request.begun = True
                ended.wait(0.01)
        finally:
            ended.set()

    with device(tmp_path, drip) as (one, source):
        limits = Limits(rate=10_000.0, window=0.3)
        assert delta.fetch(one.blobs, one.transport, TARGET, [BASE], SystemClock(), limits) is None
        assert ended.wait(30) and len(source.asked) == 1


def test_without_room_for_it_no_delta_is_fetched(tmp_path: Path) -> None:
    with device(tmp_path, Request.delta) as (one, source):
        one.blobs = BlobStore(tmp_path / "blobs", reserve=1 << 60)
        (tmp_path / "deltas").mkdir()
        (tmp_path / "deltas" / f"{TARGET.digest}.{sha256_hex(DELTA)}").write_bytes(DELTA[:2000])
        assert delta.fetch(one.blobs, one.transport, TARGET, [BASE], one.clock) is None
        assert len(source.asked) == 1 and one.left() == []


def test_a_drip_is_given_up(tmp_path: Path) -> None:
    """Time is the clock's: each connection brings some bytes and takes 20 seconds."""
    devices: list[Device] = []

    def drip(request: Request) -> None:
        begin = int(request.range.removeprefix("bytes=").removesuffix("-") or 0)
        told = {"ETag": f'"{sha256_hex(DELTA)}"', "Edgeward_Delta_Base": BASE.digest}
        request.head(206 if begin else 200, Content_Length=str(len(DELTA) - begin), **told)
        devices[0].clock.advance(20)
        request.send(DELTA[begin : begin + 10])
        request.cut()

    with device(tmp_path, drip) as (one, source):
        devices.append(one)
        assert one.fetch() is None
        assert len(source.asked) == 2 and source.whole == 1


def test_no_disk_space_for_the_delta_costs_the_delta_only(tmp_path: Path) -> None:
    with device(tmp_path, Request.delta) as (one, source):
        (tmp_path / "deltas").write_text("not a folder")
        assert one.fetch() is None and source.whole == 1


# --- which files may be bases ---------------------------------------------------------------------


def manifest(version: int, **variants: str) -> Manifest:
    made = [
        Variant(name, "tflite" if name.startswith("tflite") else "onnx", Blob(digest * 64, 10), [], [])
        for name, digest in variants.items()
    ]
    golden = Golden(Blob("f" * 64, 1), 0.0, 0.0)
    lineage = Lineage("test", {}, "none", "0" * 64, 1, "all", {})
    return Manifest(API_VERSION, "m", version, "2026-11-24T00:00:00Z", [], made, golden, lineage)


def test_the_same_variant_comes_first_and_other_runtimes_never() -> None:
    running = manifest(2, fp32="1", int8="2", tflite="3")
    previous = manifest(1, fp32="4", int8="5")
    wanted = manifest(3, int8="6", fp32="1").variants
    assert [blob.digest[0] for blob in delta.bases(wanted[0], [running, previous])] == ["2", "5", "1", "4"]
    assert [blob.digest[0] for blob in delta.bases(wanted[1], [running, previous])] == ["4", "2", "5"]


def test_models_of_the_slot_come_first_then_the_same_model_elsewhere() -> None:
    def ref(model: str, version: int) -> ModelRef:
        return ModelRef(model, version, f"{version}" * 64)

    records = {
        "a": SlotRecord(ref("m", 2), ref("n", 1)),
        "b": SlotRecord(ref("m", 3), ref("m", 2)),
        "c": SlotRecord(ref("o", 1), ref("m", 4)),
    }
    found = delta.earlier(records, "a", "m")
    assert found == [ref("m", 2), ref("n", 1), ref("m", 3), ref("m", 4)]
    assert delta.earlier(records, "new", "o") == [ref("o", 1)]
    assert delta.earlier({}, "a", "m") == []
