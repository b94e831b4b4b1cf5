"""A download that the controller sends elsewhere: what the other server may see, and what it may do."""

from __future__ import annotations

import random
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import obstore
import pytest

from agent.fetch import BlobStore, Limits
from edgeward.client.transport import Transport
from edgeward.clock import SystemClock
from edgeward.errors import Unavailable
from edgeward.storage import sha256_hex
from tests.controller.test_serving_artifacts import certificate
from tests.servers.s3 import S3Server

CONTENT = random.Random(5).randbytes(3 << 20)
DIGEST, SIZE = sha256_hex(CONTENT), len(CONTENT)
CLOCK = SystemClock()


@contextmanager
def pointing_to(*locations: str) -> Iterator[tuple[str, list[Any]]]:
    """A controller that points to these addresses, one after the other; its URL and what it was asked."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            location = locations[min(len(asked), len(locations) - 1)]
            asked.append((self.path, dict(self.headers)))
            self.send_response(307)
            self.send_header("Location", location)
            self.send_header("Set-Cookie", "session=hidden; Path=/")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None: ...

    with _serving(Handler) as url:
        yield url, asked


@contextmanager
def answering(
    status: int, body: bytes = b"", *, tls: ssl.SSLContext | None = None, **fields: str
) -> Iterator[tuple[str, list[Any]]]:
    """A storage server that answers like that and records what it was asked."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, dict(self.headers)))
            self.send_response(status)
            for name, value in fields.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None: ...

    with _serving(Handler, tls) as url:
        yield url, asked


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def device_of(url: str, folder: Path, limits: Limits | None = None) -> Iterator[Callable[[], Path]]:
    """The agent's download of the artifact, with a token that must stay with the controller."""
    transport = Transport(url, credential=lambda: "token-of-the-device")
    blobs = BlobStore(folder / "blobs", limits=limits, reserve=0)
    try:
        yield lambda: blobs.fetch(transport, DIGEST, SIZE, CLOCK)
    finally:
        transport.close()


def test_the_other_server_sees_neither_token_nor_cookie_and_is_asked_for_the_rest(tmp_path: Path) -> None:
    with ExitStack() as stack:
        part = {"Content_Range": f"bytes 1000-{SIZE - 1}/{SIZE}"}
        storage, seen = stack.enter_context(answering(206, CONTENT[1000:], **part))
        controller, asked = stack.enter_context(pointing_to(f"{storage}/b/k?X-Amz-Signature=0123abcd"))
        fetch = stack.enter_context(device_of(controller, tmp_path))
        (tmp_path / "blobs" / f"{DIGEST}.part").write_bytes(CONTENT[:1000])
        assert fetch().read_bytes() == CONTENT
    assert asked[0][1]["Authorization"] == "Bearer token-of-the-device"
    ((path, headers),) = seen
    assert path == "/b/k?X-Amz-Signature=0123abcd" and headers["Range"] == "bytes=1000-"
    told = {name.lower() for name in headers}
    assert told == {"host", "accept", "accept-encoding", "connection", "user-agent", "range"}
    assert "token-of-the-device" not in str(headers) and "hidden" not in str(headers)


def test_the_other_server_must_have_a_certificate_of_the_systems_cas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crt, key = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(crt, key)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "no-folder"))
    with answering(200, CONTENT, tls=context) as (storage, seen):
        by_name = storage.replace("http://127.0.0.1", "https://localhost")
        by_address = storage.replace("http://", "https://")

        def fetched(where: str, ca_file: Path | None = None) -> bytes:
            blobs = BlobStore(tmp_path / "blobs")
            with pointing_to(f"{where}/k?X-Amz-Signature=0123abcd") as (url, _):
                transport = Transport(url, credential=lambda: "token-of-the-device", ca_file=ca_file)
                try:
                    return blobs.fetch(transport, DIGEST, SIZE, CLOCK).read_bytes()
                finally:
                    transport.close()

        for where, ca_file in ((by_name, None), (by_name, crt), (by_address, crt)):
            with pytest.raises(Unavailable, match="certificate verify failed"):
                fetched(where, ca_file)  # the controller's own anchor does not speak for another server
        monkeypatch.setenv("SSL_CERT_FILE", str(crt))
        with pytest.raises(Unavailable, match="certificate verify failed"):
            fetched(by_address)
        assert seen == []
        assert fetched(by_name) == CONTENT


def test_one_redirect_is_followed_and_no_more(tmp_path: Path) -> None:
    with ExitStack() as stack:
        last, never = stack.enter_context(answering(200, CONTENT))
        storage, _ = stack.enter_context(pointing_to(f"{last}/k?X-Amz-Signature=0123abcd"))
        controller, _ = stack.enter_context(pointing_to(f"{storage}/k?X-Amz-Signature=0123abcd"))
        fetch = stack.enter_context(device_of(controller, tmp_path))
        with pytest.raises(Unavailable, match="points elsewhere once more") as problem:
            fetch()
    assert never == [] and "0123abcd" not in str(problem.value)


def test_an_address_that_has_expired_is_asked_for_again(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    bucket = s3_server.store(s3_bucket)
    obstore.put(bucket, "k", CONTENT)
    expired = obstore.sign(bucket, "GET", "k", timedelta(seconds=1))
    while httpx.get(expired, trust_env=False).status_code != 403:
        pass  # until S3 itself says so
    good = obstore.sign(bucket, "GET", "k", timedelta(minutes=1))
    with pointing_to(expired, good) as (url, asked), device_of(url, tmp_path) as fetch:
        assert fetch().read_bytes() == CONTENT
        assert len(asked) == 2
    with pointing_to(expired) as (url, asked), device_of(url, tmp_path / "other") as fetch:
        with pytest.raises(Unavailable, match="answered 403") as problem:
            fetch()
        assert len(asked) == 2, "not for ever"
        assert "Signature" not in str(problem.value)


def test_what_s3_says_is_no_bytes_is_unavailable_and_says_when_to_come_again(tmp_path: Path) -> None:
    for status in (404, 416, 500, 503):
        with ExitStack() as stack:
            storage, _ = stack.enter_context(answering(status, b"<Error/>", Retry_After="7"))
            controller, _ = stack.enter_context(pointing_to(f"{storage}/k?X-Amz-Signature=0123abcd"))
            fetch = stack.enter_context(device_of(controller, tmp_path))
            with pytest.raises(Unavailable, match=f"answered {status}") as problem:
                fetch()
            assert problem.value.retry_after == 7.0 and "0123abcd" not in str(problem.value)


def test_the_watch_ends_a_drip_of_the_other_server_too(tmp_path: Path) -> None:
    over = threading.Event()

    class Drip(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(SIZE))
            self.end_headers()
            for at in range(2000):
                try:
                    self.wfile.write(CONTENT[at : at + 1])
                except OSError:
                    return
                if over.wait(0.02):
                    return

        def log_message(self, *arguments: Any) -> None: ...

    impatient = Limits(rate=1000.0, window=0.3, deadline=60.0)
    with ExitStack() as stack:
        storage = stack.enter_context(_serving(Drip))
        controller, _ = stack.enter_context(pointing_to(f"{storage}/k"))
        fetch = stack.enter_context(device_of(controller, tmp_path, impatient))
        stack.callback(over.set)
        with pytest.raises(Unavailable, match=r"slower than 1000 B/s over 0.3 s"):
            fetch()
