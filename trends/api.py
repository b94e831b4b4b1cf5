"""Questions over HTTP: `POST /v1/query` with a JSON question, answered as an Arrow IPC stream.

One route, few readers, and a body of at most 64 KiB: the standard library's server with a thread for each
connection is enough (docs/adr/0011). What bounds it: `LIMITS`.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from edgeward.clock import Clock
from edgeward.errors import (
    EdgewardError,
    Forbidden,
    InvalidDocument,
    NotFound,
    Unavailable,
    UsageError,
)
from edgeward.wire.trend_query import LineageQuery, TrendQuery, decode_question
from trends.journal import Journal
from trends.queries.engine import Engine, Stop, Stopped
from trends.readers import Reader, Readers
from trends.tables import Tables

log = logging.getLogger(__name__)

ARROW = "application/vnd.apache.arrow.stream"


@dataclass(frozen=True)
class Limits:
    """`rows` an answer; `queries` run and `connections` are open at once; a query may take `seconds`, a peer
    that neither reads nor sends `idle` seconds; `body` bytes a request."""

    rows: int = 1_000_000
    queries: int = 4
    connections: int = 64
    seconds: float = 60.0
    idle: float = 15.0
    body: int = 64 << 10


_STATUS: tuple[tuple[type[EdgewardError], int], ...] = (
    (Forbidden, 401), (NotFound, 404), (Stopped, 504), (Unavailable, 503), (InvalidDocument, 400), (UsageError, 400),
)  # fmt: skip


class Api:
    """What the server answers with, apart from HTTP."""

    def __init__(
        self, tables: Tables, journal: Journal, readers: Readers, clock: Clock, limits: Limits
    ) -> None:
        self._tables, self._journal = tables, journal
        self._readers, self._clock = readers, clock
        self.limits = limits
        self.running = threading.BoundedSemaphore(limits.queries)

    def reader(self, authorization: str | None) -> Reader:
        """Raises Forbidden."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Forbidden("no token was given", hint="send `Authorization: Bearer TOKEN`")
        return self._readers.check(token.strip(), self._clock.now())

    def answer(
        self, reader: Reader, question: TrendQuery | LineageQuery, stop: Stop
    ) -> Iterator[pa.RecordBatch]:
        """At least one batch. Nothing of other sites than the reader's is in it."""
        sites = None if reader.sites is None else frozenset(reader.sites)
        engine = Engine(self._tables, self._journal, sites=sites)
        most = min(question.limit, self.limits.rows)
        if isinstance(question, LineageQuery):
            yield from engine.lineage(msgspec.structs.replace(question, limit=most), stop)
            return
        table = engine.ask(msgspec.structs.replace(question, limit=most), stop)
        yield pa.RecordBatch.from_pylist([], schema=table.schema)
        yield from table.to_batches(max_chunksize=16_384)


class Server(ThreadingHTTPServer):
    """`tls` is a context that presents the server's certificate, and asks for the client's where that is wanted."""

    daemon_threads = True
    request_queue_size = 32

    def __init__(self, address: tuple[str, int], api: Api, tls: ssl.SSLContext | None = None) -> None:
        self.api = api
        self._tls = tls
        self._free = threading.BoundedSemaphore(api.limits.connections)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)  # a full house: the peer sees a closed connection
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # The handshake is the peer's to delay, so it is made in the connection's own thread.
        try:
            request.settimeout(self.api.limits.idle)
            if self._tls is not None:
                request = self._tls.wrap_socket(request, server_side=True)
            super().process_request_thread(request, client_address)
        except (OSError, ssl.SSLError) as error:
            log.info("a connection from %s failed: %s", client_address[0], error)
            self.shutdown_request(request)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.warning("a request of %s failed", client_address[0], exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    server_version = "edgeward"
    sys_version = ""

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def do_GET(self) -> None:
        if self.path == "/healthz":
            self._json(200, {"status": "ok"})
        else:
            self._refuse(404, NotFound(f"there is no {self.path[:100]}", hint="POST /v1/query"))

    def do_POST(self) -> None:
        api = self.server.api
        self.close_connection = True
        try:
            if self.path != "/v1/query":
                raise NotFound(f"there is no {self.path[:100]}", hint="POST /v1/query")
            reader = api.reader(self.headers.get("Authorization"))
            question = decode_question(self._body())
            if not api.running.acquire(blocking=False):
                raise Unavailable(f"{api.limits.queries} queries run already", hint="ask again in a moment")
            try:
                self._answer(reader, question)
            finally:
                api.running.release()
        except EdgewardError as error:
            status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
            self._refuse(status, error)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise InvalidDocument("has no Content-Length", source="the request")
        if len(length) > 9 or int(length) > self.server.api.limits.body:
            raise InvalidDocument(f"larger than {self.server.api.limits.body} bytes", source="the request")
        return self.rfile.read(int(length))

    def _answer(self, reader: Reader, question: TrendQuery | LineageQuery) -> None:
        api, stop = self.server.api, Stop()
        timer = threading.Timer(
            api.limits.seconds, stop.stop, [f"it took longer than {api.limits.seconds:g} s"]
        )
        timer.daemon = True
        timer.start()
        begun = False
        batches = api.answer(reader, question, stop)
        try:
            first = next(batches)
            self.send_response(200)
            self.send_header("Content-Type", ARROW)
            self.send_header("Transfer-Encoding", "chunked")
            self.send_header("Connection", "close")
            self.end_headers()
            begun = True
            sink = _Chunks(self.wfile)
            with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), first.schema) as stream:
                stream.write_batch(first)
                for batch in batches:
                    stop.check()
                    stream.write_batch(batch)
            self.wfile.write(b"0\r\n\r\n")
        except OSError as error:
            log.info("reader %s left: %s", reader.name, error)
        except EdgewardError as error:
            if not begun:
                raise
            # Without its last chunk the answer is seen to be cut off.
            log.warning("an answer to %s was cut off: %s", reader.name, error)
        finally:
            timer.cancel()
            batches.close()  # type: ignore[attr-defined]  # it is a generator

    def _refuse(self, status: int, error: EdgewardError) -> None:
        said = {"message": error.message, "hint": error.hint}
        if isinstance(error, InvalidDocument):
            said |= {"message": error.problem, "source": error.source, "field": error.field}
        self._json(status, {"error": said})

    def _json(self, status: int, document: Any) -> None:
        body = msgspec.json.encode(document)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)


class _Chunks:
    """HTTP/1.1 chunks (RFC 9112, 7.1) of what is written."""

    closed = False

    def __init__(self, sink: Any) -> None:
        self._sink = sink

    def write(self, data: Any) -> int:
        piece = bytes(data)
        if piece:
            self._sink.write(b"%x\r\n" % len(piece) + piece + b"\r\n")
        return len(piece)

    def flush(self) -> None:
        self._sink.flush()


def tls_context(certificate: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    """TLS 1.2 or newer; with `client_ca`, only clients with a certificate of it get through. Raises UsageError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"cannot use {certificate} with {key}: {error}") from None
    return context


def check_address(host: str, tls: bool) -> None:
    """Tokens must not cross a network in the clear. Raises UsageError."""
    if not tls and host not in ("127.0.0.1", "::1", "localhost"):
        raise UsageError(
            f"{host} is not this machine alone, and there is no TLS", hint="give --tls-cert and --tls-key"
        )
