"""HTTP/1.1 on one connection: requests to the handler, and answers back in the requests' order.

A connection is always in one of these phases; `sweep` ends those that stay too long:

    IDLE       nothing received of a next request      idle_seconds
    ANSWERING  requests are with the handler           (the engine has its own deadline)
    LINGERING  refused, reading on so that the client sees why, then closed

Besides, in each of them, a next request may be on its way: for `request_seconds` at most.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from enum import Enum
from math import inf
from typing import Any, cast

from agent.serving.exchange import Exchange, Shared
from agent.serving.messages import Request, Response, refuse
from agent.serving.reader import RequestReader
from agent.serving.refusal import Refusal

log = logging.getLogger(__name__)

_LINGER_SECONDS = 2.0
_JOINED_BYTES = 16 << 10


class Phase(Enum):
    IDLE = 1
    ANSWERING = 2
    LINGERING = 3


class Connection(asyncio.Protocol):
    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._settings = shared.settings
        self._transport: Any = None
        self._reader = RequestReader(
            shared.settings, shared.statistics, shared.clock, self._complete, self._continue
        )
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
        try:
            self._reader.feed(data)
        except Refusal as refusal:
            self._refuse(refusal)

    # the reader's calls

    def _complete(self, request: Request, keep_alive: bool, held: int) -> None:
        if self._closing or (self._order and not self._order[-1].keep_alive):
            # Behind a request that closes the connection nothing counts (RFC 9112, 9.6).
            self._shared.statistics.held_bytes -= held
            return
        headers = request.headers
        bodiless = request.method == b"HEAD"
        if bodiless:
            request.method = b"GET"
        exchange = Exchange(
            self,
            request,
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
            if self._reader.continue_due:
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
            self._reader.continue_due = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    # refusing

    def _refuse(self, refusal: Refusal) -> None:
        """Answer the request being read, after those before it, and read no more."""
        if self._closing:
            return
        self._closing = True
        self._reader.forget()
        self._phase = Phase.ANSWERING
        exchange = Exchange(self, None, keep_alive=False)
        self._busy += 1
        self._order.append(exchange)
        exchange.respond(refuse(refusal))

    def _forget(self) -> None:
        for exchange in self._waiting:
            self.release(exchange)
        self._waiting.clear()
        self._order.clear()
        self._reader.forget()

    def release(self, exchange: Exchange) -> None:
        self._shared.statistics.held_bytes -= exchange.held
        exchange.held = 0

    def _pause_reading(self) -> None:
        if not self._reading_paused and not self._transport.is_closing():
            self._reading_paused = True
            self._transport.pause_reading()

    # from the server

    def sweep(self, now: float) -> None:
        """End the connection when it has been too long in its phase."""
        settings, reader, waited = self._settings, self._reader, now - self._since
        paused = self._write_paused_since
        if paused is not None and now - paused > settings.write_seconds:
            self._shared.statistics.timeouts += 1
            self._transport.abort()
        elif reader.reading and not self._closing:
            if now - reader.since <= settings.request_seconds or self._reading_paused:
                return
            self._shared.statistics.timeouts += 1
            self._refuse(Refusal(408, f"the request was not complete within {settings.request_seconds:g} s"))
        elif waited > {Phase.IDLE: settings.idle_seconds, Phase.LINGERING: _LINGER_SECONDS}.get(
            self._phase, inf
        ):
            self._transport.close()

    def drain(self) -> None:
        """Close now, or behind the answers that are due."""
        if not self._order:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()
