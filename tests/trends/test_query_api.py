"""The query API over real HTTP and TLS, through the client: who may ask what, and what bounds it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from edgeward.client import TrendClient
from edgeward.clock import ManualClock, SystemClock
from edgeward.errors import (
    Conflict,
    EdgewardError,
    Forbidden,
    InvalidDocument,
    NotFound,
    Unavailable,
    UsageError,
)
from edgeward.trust import certificates, keys
from edgeward.trust.certificates import StoreIdentity
from edgeward.wire.trend_query import LineageQuery, TrendQuery
from trends.api import Api, Limits, Server, check_address, tls_context
from trends.readers import Readers

SCORE = TrendQuery(
    series=["output:score"], rollup="", group_by=["site"], measures=["count", "mean"], quantiles=[0.5]
)


class Running:
    def __init__(self, plant: Any, limits: Limits, tls: ssl.SSLContext | None) -> None:
        self.clock = ManualClock()
        self.readers = Readers(plant.folder)
        self.api = Api(plant.tables, plant.journal, self.readers, self.clock, limits)
        self.server = Server(("127.0.0.1", 0), self.api, tls)
        self.port: int = self.server.server_address[1]
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def token(self, sites: frozenset[str] | None = None, name: str = "grafana") -> str:
        return self.readers.add(name, sites, self.clock.now() + 60)

    def client(self, token: str, **more: Any) -> TrendClient:
        return TrendClient(f"http://127.0.0.1:{self.port}", token, **more)

    def raw(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def serve(plant: Any) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(limits: Limits | None = None, tls: ssl.SSLContext | None = None) -> Running:
        started.append(Running(plant, limits or Limits(), tls))
        return started[-1]

    yield start
    for item in started:
        item.close()


def test_the_client_gets_what_the_engine_gives(plant: Any, serve: Callable[..., Running]) -> None:
    plant.put(plant.trend(0, [1.0, 2.0]), plant.result(0, 1.0), plant.result(1, 2.0))
    running = serve()
    with running.client(running.token()) as client:
        assert client.query(SCORE).to_pylist() == [{"site": "north", "count": 2, "mean": 1.5, "p50": 1.0}]
        assert client.query(LineageQuery(digest=plant.old)).column("source_seq").to_pylist() == [0, 1]
        assert client.query(TrendQuery(series=["output:none"])).num_rows == 0
        with pytest.raises(NotFound, match="models --refresh"):
            client.query(TrendQuery(series=["output:score"], filters={"model": ["x"]}))
        with pytest.raises(InvalidDocument, match="series"):
            client.query(TrendQuery(series=["score"]))


def test_a_reader_sees_its_sites_only_and_until_its_end(plant: Any, serve: Callable[..., Running]) -> None:
    plant.put(plant.trend(0, [1.0]))
    plant.put(plant.trend(0, [5.0]), plant.result(0, 5.0), site="south")
    running = serve()
    token = running.token(frozenset({"south"}))
    with running.client(token) as client, running.client("wrong") as stranger:
        assert client.query(SCORE).column("site").to_pylist() == ["south"]
        with pytest.raises(Forbidden, match="not known here"):
            stranger.query(SCORE)
        running.clock.advance(61)
        with pytest.raises(Forbidden, match="has ended"):
            client.query(SCORE)


def test_a_reader_that_is_removed_is_out_at_once(plant: Any, serve: Callable[..., Running]) -> None:
    running = serve()
    token = running.token()
    with pytest.raises(Conflict):
        running.token()
    assert token not in (plant.folder / "readers.json").read_text()
    assert (plant.folder / "readers.json").stat().st_mode & 0o077 == 0
    with running.client(token) as client:
        client.query(SCORE)
        running.readers.remove("grafana")
        with pytest.raises(Forbidden):
            client.query(SCORE)
    with pytest.raises(NotFound):
        running.readers.remove("grafana")


def test_requests_are_refused_by_name(plant: Any, serve: Callable[..., Running]) -> None:
    running = serve(Limits(body=300))
    good = {"Authorization": f"Bearer {running.token()}"}
    ask = b'{"trend": {"series": ["output:x"]}}'
    for method, path, body, headers, status, says in (
        ("GET", "/v1/query", b"", good, 404, "POST /v1/query"),
        ("POST", "/v1/other", ask, good, 404, "POST /v1/query"),
        ("POST", "/v1/query", ask, {}, 401, "no token"),
        ("POST", "/v1/query", ask, {"Authorization": "Basic eDp5"}, 401, "no token"),
        ("POST", "/v1/query", b"{", good, 400, "the query"),
        ("POST", "/v1/query", b" " * 301, good, 400, "larger than 300 bytes"),
        ("POST", "/v1/query", b'{"trend": {"series": ["x"]}}', good, 400, "is not a series"),
    ):
        got, document = running.raw(method, path, body, **headers)
        assert got == status and says in json.dumps(document), (method, path, body)
    assert running.raw("GET", "/healthz") == (200, {"status": "ok"})


def test_answers_have_as_many_rows_as_allowed(plant: Any, serve: Callable[..., Running]) -> None:
    plant.put(*(plant.result(minute, 1.0) for minute in range(5)))
    running = serve(Limits(rows=3))
    with running.client(running.token()) as client:
        assert client.query(LineageQuery(digest=plant.old)).num_rows == 3


def test_a_query_that_takes_too_long_ends_with_the_reason(plant: Any, serve: Callable[..., Running]) -> None:
    plant.put(plant.trend(0, [1.0]))
    running = serve(Limits(seconds=0.0))
    with running.client(running.token()) as client, pytest.raises(EdgewardError, match="longer than 0 s"):
        while True:  # the timer may come after a query that is quick
            client.query(SCORE)


def test_more_queries_at_once_than_allowed_are_told_to_wait(
    plant: Any, serve: Callable[..., Running]
) -> None:
    running = serve(Limits(queries=1))
    with running.client(running.token()) as client:
        assert running.api.running.acquire(blocking=False)
        with pytest.raises(Unavailable, match="1 queries run already") as told:
            client.query(SCORE)
        assert told.value.retry_after == 1.0
        running.api.running.release()
        client.query(SCORE)


def test_a_peer_that_says_nothing_does_not_keep_others_out(plant: Any, serve: Callable[..., Running]) -> None:
    running = serve(Limits(connections=1, idle=0.2))
    with socket.create_connection(("127.0.0.1", running.port)) as silent:
        assert silent.recv(1) == b"", "closed by the server"
    with running.client(running.token()) as client:
        while True:  # until the place is free again
            with contextlib.suppress(Unavailable):
                client.query(SCORE)
                break


def pem_of(certificate: Any, key: Any) -> bytes:
    encoded: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificates.to_pem(certificate).encode() + encoded


def test_with_a_client_ca_only_its_certificates_get_through(
    plant: Any, serve: Callable[..., Running], tmp_path: Path
) -> None:
    now, ca_key = SystemClock().now(), keys.generate_key()
    ca = certificates.make_ca(ca_key, now)
    (tmp_path / "ca.pem").write_text(certificates.to_pem(ca))
    key = keys.generate_key()
    served = certificates.issue_server(ca, ca_key, key.public_key(), ["127.0.0.1"], now, lifetime=600)
    (tmp_path / "server.pem").write_bytes(pem_of(served, key))
    for name, issuer, issuer_key in (("member", ca, ca_key), ("stranger", *_other_ca(now))):
        own = keys.generate_key()
        identity = StoreIdentity("plant", frozenset({"north"}))
        made = certificates.issue(issuer, issuer_key, own.public_key(), identity, now, lifetime=600)
        (tmp_path / f"{name}.pem").write_bytes(pem_of(made, own))
    running = serve(tls=tls_context(tmp_path / "server.pem", tmp_path / "server.pem", tmp_path / "ca.pem"))
    token, url = running.token(), f"https://127.0.0.1:{running.port}"
    for certificate in (None, tmp_path / "stranger.pem"):
        outsider = TrendClient(url, token, ca_file=tmp_path / "ca.pem", certificate=certificate)
        with outsider as client, pytest.raises(Unavailable):
            client.query(SCORE)
    with TrendClient(url, token, ca_file=tmp_path / "ca.pem", certificate=tmp_path / "member.pem") as client:
        assert client.query(SCORE).num_rows == 0
    member = TrendClient(url, "wrong", ca_file=tmp_path / "ca.pem", certificate=tmp_path / "member.pem")
    with member as client, pytest.raises(Forbidden):
        client.query(SCORE)


def _other_ca(now: float) -> tuple[Any, Any]:
    key = keys.generate_key()
    return certificates.make_ca(key, now), key


def test_beyond_this_machine_there_is_tls() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        check_address(host, False)
    check_address("0.0.0.0", True)
    with pytest.raises(UsageError, match="no TLS"):
        check_address("0.0.0.0", False)
