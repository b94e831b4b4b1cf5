"""What the HTTP client makes of answers, from a real server on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from edgeward.client.transport import Transport, _beginning, retry_after
from edgeward.errors import Unavailable

DATE = "Tue, 24 Nov 2026 12:00:00 GMT"


@pytest.mark.parametrize(
    ("value", "date", "seconds"),
    [
        ("7", None, 7.0),
        ("0", None, 0.0),
        ("9" * 5000, None, 999_999_999.0),
        ("Tue, 24 Nov 2026 12:00:30 GMT", DATE, 30.0),
        ("Tue, 24 Nov 2026 11:00:30 GMT", DATE, 0.0),
        ("Tue, 24 Nov 2026 12:00:30 GMT", None, None),
        ("Tue, 24 Nov 2026 12:00:30", DATE, None),
        ("-7", DATE, None),
        ("soon", DATE, None),
        ("٣", DATE, None),
        (None, DATE, None),
    ],
)
def test_retry_after_is_read_as_the_rfc_says(
    value: str | None, date: str | None, seconds: float | None
) -> None:
    assert retry_after(value, date) == seconds


class _Busy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(int(self.path[1:]))
        self.send_header("Retry-After", "7")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Busy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("status", [429, 503])
def test_who_is_sent_away_knows_for_how_long(url: str, status: int) -> None:
    transport = Transport(url)
    with pytest.raises(Unavailable) as caught:
        transport.request("GET", f"/{status}")
    assert caught.value.retry_after == 7.0
    with pytest.raises(Unavailable) as caught, transport.stream(f"/{status}"):
        pass
    assert caught.value.retry_after == 7.0
    transport.close()


def test_who_finds_nobody_does_not() -> None:
    transport = Transport("http://127.0.0.1:1")
    with pytest.raises(Unavailable) as caught:
        transport.request("GET", "/")
    assert caught.value.retry_after is None
    transport.close()


@pytest.mark.parametrize("piece", [b"x", bytes(1 << 20)])
def test_an_error_is_read_to_an_honest_length_only(piece: bytes) -> None:
    taken = 0

    class Endless(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            nonlocal taken
            while taken < 10_000:
                taken += 1
                yield piece

    body = _beginning(httpx.Response(503, stream=Endless()))
    assert len(body) <= 64 << 10 and taken < 100
