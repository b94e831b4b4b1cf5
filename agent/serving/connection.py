"""HTTP/1.1 on one connection: from bytes to requests, and answers back in the requests' order.

A connection is always in one of these phases; `sweep` ends those that stay too long:

    IDLE       nothing received of a next request      idle_seconds
    READING    a request has begun                     request_seconds
    ANSWERING  requests are with the handler           (the engine has its own deadline)
    LINGERING  refused, reading on so that the client sees why, then closed
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from enum import Enum
from typing import Any, cast

import httptools

from agent.serving.exchange import Exchange, Shared
from agent.serving.messages import Request, Response, refuse
from agent.serving.refusal import Refusal

log = logging.getLogger(__name__)

_LINGER_SECONDS = 2.0
_JOINED_BYTES = 16 << 10


class Phase(Enum):
    IDLE = 1
    READING = 2
    ANSWERING = 3
    LINGERING = 4


class Connection(asyncio.Protocol):
    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._settings = shared.settings
        self._max_header_bytes = shared.settings.max_header_bytes
        self._transport: Any = None
        self._parser: Any = httptools.HttpRequestParser(self)
        self._phase = Phase.IDLE
        self._since = 0.0
        self._order: deque[Exchange] = deque()
        self._waiting: deque[Exchange] = deque()
        self._busy = 0
        self._advancing = False
        self._write_paused_since: float | None = None
        self._reading_paused = False
        self._closing = False
        self._ended = False
        # of the request being read
        self._method = b""
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._continue_due = False
        self._progress = 0
        self._overhead = 0
        self._refusal: Refusal | None = None
        self._upgrade_body = 0

    # the transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        shared = self._shared
        self._since = shared.clock.monotonic()
        if len(shared.connections) >= self._settings.max_connections or shared.draining:
            shared.statistics.refused_connections += 1
            self._refuse(Refusal(503, "too many connections, or stopping", retry_after=1))
            transport.close()
            return
        shared.connections.add(self)
        shared.statistics.connections = len(shared.connections)

    def connection_lost(self, error: Exception | None) -> None:
        shared = self._shared
        self._closing = True
        if self._order:
            shared.statistics.disconnects += 1
        self._forget()
        shared.connections.discard(self)
        shared.statistics.connections = len(shared.connections)
        if not shared.connections:
            shared.emptied()

    def eof_received(self) -> bool:
        """A client may have said all it has to say and still read its answers."""
        self._ended = True
        if self._order:
            self._order[-1].keep_alive = False
            self._closing = True
            return True
        return False

    def pause_writing(self) -> None:
        self._write_paused_since = self._shared.clock.monotonic()
        self._pause_reading()

    def resume_writing(self) -> None:
        self._write_paused_since = None
        self._advance()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._upgrade_body:
            data = self._read_upgrade_body(data)
            if not data:
                return
        progress = self._progress
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            # A callback's refusal comes back as the parser's error.
            self._refuse(self._refusal or Refusal(400, f"not HTTP/1.1: {error}"))
            return
        if self._phase is Phase.READING:
            if self._progress != progress:
                self._overhead = 0
            else:
                # Neither a header nor a part of the body was completed: one long header, trailer or chunk line.
                self._overhead += len(data)
                if self._overhead > self._settings.max_header_bytes:
                    self._refuse(self._header_refusal())

    # the parser's calls

    def on_message_begin(self) -> None:
        self._progress += 1
        self._url = b""
        self._headers = {}
        self._header_bytes = 0
        self._body = []
        self._body_bytes = 0
        self._phase = Phase.READING
        self._since = self._shared.clock.monotonic()

    def on_url(self, part: bytes) -> None:
        self._url += part
        self._header_bytes += len(part)
        if self._header_bytes > self._max_header_bytes:
            self._stop_parsing(self._header_refusal())

    def on_header(self, name: bytes, value: bytes) -> None:
        self._progress += 1
        self._header_bytes += len(name) + len(value) + 4
        if self._header_bytes > self._max_header_bytes:
            self._stop_parsing(self._header_refusal())
        name = name.lower()
        headers = self._headers
        headers[name] = value if name not in headers else headers[name] + b", " + value

    def on_headers_complete(self) -> None:
        headers = self._headers
        if b"host" not in headers and self._parser.get_http_version() == "1.1":
            self._stop_parsing(Refusal(400, "an HTTP/1.1 request must have a Host header"))
        length = headers.get(b"content-length")
        if length is not None and int(length) > self._settings.max_body_bytes:
            self._stop_parsing(self._body_refusal(int(length)))
        if b"expect" in headers:
            if headers[b"expect"].lower() != b"100-continue":
                self._stop_parsing(Refusal(417, "only 'Expect: 100-continue' is known"))
            self._continue_due = True
            self._continue()

    def on_body(self, part: bytes) -> None:
        self._progress += 1
        self._continue_due = False
        self._body.append(part)
        self._body_bytes += len(part)
        statistics = self._shared.statistics
        statistics.held_bytes += len(part)
        if self._body_bytes > self._settings.max_body_bytes:
            self._stop_parsing(self._body_refusal(self._body_bytes))
        if statistics.held_bytes > self._settings.max_held_bytes:
            self._stop_parsing(Refusal(503, "too many large requests at once", retry_after=1))

    def on_message_complete(self) -> None:
        self._progress += 1
        parser, headers = self._parser, self._headers
        keep_alive = parser.should_keep_alive()
        if parser.should_upgrade():
            # The parser takes what follows for another protocol. Asking for one is an offer that a server
            # may ignore, so what follows is this request's body, and then HTTP again.
            if b"transfer-encoding" in headers:
                self._stop_parsing(Refusal(400, "Upgrade with a chunked body is not supported"))
            keep_alive = b"close" not in headers.get(b"connection", b"").lower()
            self._upgrade_body = int(headers.get(b"content-length", 0))
            if self._upgrade_body:
                return
        self._complete(parser.get_method(), keep_alive)

    def _complete(self, method: bytes, keep_alive: bool) -> None:
        body = self._body
        content = body[0] if len(body) == 1 else b"".join(body)
        held, self._body, self._body_bytes = self._body_bytes, [], 0
        self._continue_due = False
        headers = self._headers
        bodiless = method == b"HEAD"
        exchange = Exchange(
            self,
            Request(b"GET" if bodiless else method, self._url, headers, content),
            keep_alive=keep_alive,
            bodiless=bodiless,
            says_keep_alive=b"connection" in headers and b"keep-alive" in headers[b"connection"].lower(),
            held=held,
        )
        self._phase = Phase.ANSWERING
        self._order.append(exchange)
        if self._busy >= self._settings.max_pipelined or self._write_paused_since is not None:
            self._waiting.append(exchange)
            self._pause_reading()
        else:
            self._begin(exchange)

    # upgrade offers

    def _ignore_upgrade(self, rest: bytes) -> None:
        self._method = self._parser.get_method()
        self._parser = httptools.HttpRequestParser(self)
        if rest:
            self.data_received(rest)

    def _read_upgrade_body(self, data: bytes) -> bytes:
        part = data[: self._upgrade_body]
        self._upgrade_body -= len(part)
        try:
            self.on_body(part)
        except _ParsingStopped:
            self._refuse(self._refusal or Refusal(400, "not HTTP/1.1"))
            return b""
        if not self._upgrade_body:
            self._complete(self._method, b"close" not in self._headers.get(b"connection", b"").lower())
        return data[len(part) :]

    # answering

    def _begin(self, exchange: Exchange) -> None:
        request, exchange.request = exchange.request, None
        if request is not None:
            self._busy += 1
            self._shared.handler(request, exchange.respond)

    def flush(self) -> None:
        """Write every answer whose turn it is."""
        order = self._order
        while order:
            exchange = order[0]
            response = exchange.response
            if response is None:
                break
            order.popleft()
            self._busy -= 1
            self._write(exchange, response)
            if not exchange.keep_alive:
                return
        self._advance()

    def _advance(self) -> None:
        """Begin what had to wait, and see what to do when nothing is left."""
        if self._advancing:
            return
        self._advancing = True
        while (
            self._waiting and self._busy < self._settings.max_pipelined and self._write_paused_since is None
        ):
            self._begin(self._waiting.popleft())
        self._advancing = False
        if self._reading_paused and not self._waiting and self._write_paused_since is None:
            self._reading_paused = False
            self._transport.resume_reading()
        if not self._order:
            if self._continue_due:
                self._continue()
            if self._phase is Phase.ANSWERING:
                self._phase = Phase.IDLE
                self._since = self._shared.clock.monotonic()

    def _write(self, exchange: Exchange, response: Response) -> None:
        transport, shared = self._transport, self._shared
        answers = shared.statistics.answers
        answers[response.status] = answers.get(response.status, 0) + 1
        if transport.is_closing():
            return
        if shared.draining:
            exchange.keep_alive = False
        body = response.body
        size = len(body[0]) if len(body) == 1 else sum(map(len, body))
        head = exchange.head(response, size, shared.date)
        if exchange.bodiless:
            transport.write(head)
        elif size <= _JOINED_BYTES:
            transport.write(b"".join((head, *body)))
        else:
            transport.writelines([head, *body])
        if not exchange.keep_alive:
            self._end()

    def _end(self) -> None:
        """Close behind the last answer. Unread input would turn that into a reset, which may overtake it."""
        self._closing = True
        self._forget()
        self._phase = Phase.LINGERING
        self._since = self._shared.clock.monotonic()
        if self._transport.can_write_eof() and not self._ended and not self._shared.draining:
            self._transport.write_eof()
            if self._reading_paused:
                self._reading_paused = False
                self._transport.resume_reading()
        else:
            self._transport.close()

    def _continue(self) -> None:
        if not self._order:
            self._continue_due = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    # refusing

    def _stop_parsing(self, refusal: Refusal) -> None:
        self._refusal = refusal
        raise _ParsingStopped

    def _refuse(self, refusal: Refusal) -> None:
        """Answer the request being read, after those before it, and read no more."""
        if self._closing:
            return
        self._closing = True
        self._continue_due = False
        self._forget_body()
        self._phase = Phase.ANSWERING
        exchange = Exchange(self, None, keep_alive=False)
        self._busy += 1
        self._order.append(exchange)
        exchange.respond(refuse(refusal))

    def _header_refusal(self) -> Refusal:
        return Refusal(431, f"the request's headers are larger than {self._settings.max_header_bytes} bytes")

    def _body_refusal(self, size: int) -> Refusal:
        return Refusal(
            413, f"the body has {size} bytes or more, at most {self._settings.max_body_bytes} are taken"
        )

    def _forget(self) -> None:
        for exchange in self._waiting:
            self.release(exchange)
        self._waiting.clear()
        self._order.clear()
        self._forget_body()

    def release(self, exchange: Exchange) -> None:
        self._shared.statistics.held_bytes -= exchange.held
        exchange.held = 0

    def _forget_body(self) -> None:
        self._shared.statistics.held_bytes -= self._body_bytes
        self._body = []
        self._body_bytes = 0

    def _pause_reading(self) -> None:
        if not self._reading_paused and not self._transport.is_closing():
            self._reading_paused = True
            self._transport.pause_reading()

    # from the server

    def sweep(self, now: float) -> None:
        """End the connection when it has been too long in its phase."""
        settings, waited = self._settings, now - self._since
        paused = self._write_paused_since
        if paused is not None and now - paused > settings.write_seconds:
            self._shared.statistics.timeouts += 1
            self._transport.abort()
        elif self._phase is Phase.IDLE and waited > settings.idle_seconds:
            self._transport.close()
        elif (
            self._phase is Phase.READING
            and waited > settings.request_seconds
            and not self._closing
            and not self._reading_paused
        ):
            self._shared.statistics.timeouts += 1
            self._refuse(Refusal(408, f"the request was not complete within {settings.request_seconds:g} s"))
        elif self._phase is Phase.LINGERING and waited > _LINGER_SECONDS:
            self._transport.close()

    def drain(self) -> None:
        """Close now, or behind the answers that are due."""
        if not self._order:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()


class _ParsingStopped(Exception):  # not an error: it unwinds the parser
    """Ends a parser's run; the connection's `_refusal` says why."""
