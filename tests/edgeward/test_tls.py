"""Certificates of another decade: who may be reached when the machine's clock is wrong.

OpenSSL goes by the machine's clock, which a test cannot turn; so the server's certificate is of ten years
ahead or behind, as it looks from a machine that is ten years off.
"""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgeward.client.transport import Transport
from edgeward.clock import SystemClock
from edgeward.errors import Unavailable
from edgeward.trust import certificates, keys
from edgeward.trust.tls import PeerTime

YEAR = 365 * 86400.0
NOW = SystemClock().now()


class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        seen: list[str] = self.server.seen  # type: ignore[attr-defined]
        seen.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_: Any) -> None:
        pass


class Quiet(http.server.HTTPServer):
    def handle_error(self, *_: Any) -> None:
        pass


@contextmanager
def serving(folder: Path, then: float, host: str = "127.0.0.1") -> Iterator[tuple[str, Path, list[str]]]:
    """Address, CA file and what was asked of an HTTPS server with a certificate for the day after `then`."""
    ca_key, key = keys.generate_key(), keys.generate_key()
    ca = certificates.make_ca(ca_key, then)
    issued = certificates.issue_server(ca, ca_key, key.public_key(), [host], then, lifetime=86400)
    (folder / "ca.pem").write_text(certificates.to_pem(ca))
    (folder / "server.pem").write_text(certificates.to_pem(issued))
    (folder / "server.key").write_bytes(keys.private_pem(key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    seen: list[str] = []
    with Quiet(("127.0.0.1", 0), Hello) as server:
        server.seen = seen  # type: ignore[attr-defined]
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_port}", folder / "ca.pem", seen
        finally:
            server.shutdown()
            thread.join()


def get(url: str, ca: Path, time: PeerTime | None) -> bytes:
    transport = Transport(url, ca_file=ca, peer_time=time)
    try:
        return transport.request("GET", "/x").content
    finally:
        transport.close()


@pytest.mark.parametrize("years", [10, -9])
def test_dates_are_judged_by_the_time_that_is_known_better(tmp_path: Path, years: int) -> None:
    then = NOW + years * YEAR
    with serving(tmp_path, then) as (url, ca, seen):
        assert get(url, ca, PeerTime(lambda: then + 60)) == b"hello"
        assert get(url, ca, PeerTime(None)) == b"hello"
        seen.clear()
        refused: list[tuple[PeerTime | None, str]] = [
            (None, "not yet valid|expired"),
            (PeerTime(lambda: then + 60, wrong=lambda: False), "not yet valid|expired"),
            (PeerTime(lambda: then + 2 * 86400), "not for now"),
            (PeerTime(lambda: then - 3600), "not for now"),
            (PeerTime(lambda: NOW), "not for now"),
        ]
        for time, says in refused:
            with pytest.raises(Unavailable, match=says):
                get(url, ca, time)
        assert seen == [], "nothing was said to it, no credential either"


def test_a_healthy_machine_verifies_as_usual(tmp_path: Path) -> None:
    with serving(tmp_path, NOW) as (url, ca, _):
        assert get(url, ca, PeerTime(SystemClock().now, lambda: False)) == b"hello"
        assert get(url, ca, None) == b"hello"


def test_the_clock_may_be_put_right_between_two_connections(tmp_path: Path) -> None:
    wrong = [True]
    with serving(tmp_path, NOW + 10 * YEAR) as (url, ca, _):
        time = PeerTime(lambda: NOW + 10 * YEAR + 60, lambda: wrong[0])
        # The server ends each connection after its answer.
        transport = Transport(url, ca_file=ca, peer_time=time)
        for wrong[0], fails in ((True, False), (False, True), (True, False)):
            if fails:
                with pytest.raises(Unavailable):
                    transport.request("GET", "/x")
            else:
                transport.request("GET", "/x")
        transport.close()


@pytest.mark.parametrize("time", [PeerTime(None), PeerTime(lambda: NOW + 60)], ids=["no dates", "a time"])
def test_chain_and_name_count_whatever_the_time(tmp_path: Path, time: PeerTime) -> None:
    (tmp_path / "other").mkdir()
    with (
        serving(tmp_path, NOW) as (url, _, _),
        serving(tmp_path / "other", NOW) as (_, stranger, _),
        pytest.raises(Unavailable, match="certificate verify failed"),
    ):
        get(url, stranger, time)
    with (
        serving(tmp_path, NOW, host="elsewhere") as (url, ca, _),
        pytest.raises(Unavailable, match="IP address mismatch"),
    ):
        get(url, ca, time)


def test_without_a_ca_file_the_usual_roots_are_trusted(tmp_path: Path) -> None:
    made: Callable[..., Any] = Transport("https://127.0.0.1:1", peer_time=PeerTime(None))._client._transport
    pool = made._pool  # type: ignore[attr-defined]
    assert len(pool._ssl_context.get_ca_certs()) > 50
