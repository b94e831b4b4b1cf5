"""HTTP/1.1 requests from the bytes of one connection, within the server's limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import httptools

from agent.serving.messages import Request
from agent.serving.refusal import Refusal
from agent.serving.settings import Settings
from agent.serving.statistics import Statistics
from edgeward.clock import Clock

_BLANK_LINE = b"\r\n\r\n"

#: A request, whether the connection stays open behind it, and how many bytes count as held for it.
Complete = Callable[[Request, bool, int], None]


class _Head(NamedTuple):
    """What the parser made of a request's head; `size` is that of the whole request."""

    head: bytes
    size: int
    target: bytes
    method: bytes
    headers: dict[bytes, bytes]
    keep_alive: bool


class _ParsingStopped(Exception):  # not an error: it unwinds the parser
    """Ends a parser's run; the reader's `_refusal` says why."""


class RequestReader:
    """`feed` it what arrives. `reading` since `since`: a request has begun and is not complete.

    Clients repeat themselves: a request whose head is, byte for byte, that of the connection's last one
    is not parsed again. Only heads that leave no question are kept: those of a request that came alone,
    with its body as long as it said.
    """

    def __init__(
        self,
        settings: Settings,
        statistics: Statistics,
        clock: Clock,
        complete: Complete,
        continue_wanted: Callable[[], None],
    ) -> None:
        """`complete` is called with each request, `continue_wanted` when `continue_due` has become true."""
        self._settings = settings
        self._statistics = statistics
        self._clock = clock
        self._done = complete
        self._continue_wanted = continue_wanted
        self._max_header_bytes = settings.max_header_bytes
        self._parser: Any = httptools.HttpRequestParser(self)
        self._last: _Head | None = None
        self._completed = 0
        self.reading = False
        self.since = 0.0
        self.continue_due = False
        # of the request being read
        self._method = b""
        self._keep_alive = True
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._progress = 0
        self._overhead = 0
        self._refusal: Refusal | None = None
        self._upgrade_body = 0

    def feed(self, data: bytes) -> None:
        """Raises Refusal; nothing may be fed any more then."""
        if self.reading:
            self._parse(data)
            return
        last = self._last
        if last is not None and len(data) == last.size and data.startswith(last.head):
            self._repeat(last, data)
            return
        completed = self._completed
        self._parse(data)
        if self._completed == completed + 1 and not self.reading:
            self._remember(data)

    def forget(self) -> None:
        """Drop what has been read of a body."""
        self._statistics.held_bytes -= self._body_bytes
        self._body = []
        self._body_bytes = 0
        self.continue_due = False

    def _parse(self, data: bytes) -> None:
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
            raise self._refusal or Refusal(400, f"not HTTP/1.1: {error}") from None
        if self.reading:
            if self._progress != progress:
                self._overhead = 0
            else:
                # Neither a header nor a part of the body was completed: one long header, trailer or chunk line.
                self._overhead += len(data)
                if self._overhead > self._settings.max_header_bytes:
                    raise self._header_refusal()

    # repeated heads

    def _remember(self, data: bytes) -> None:
        headers = self._headers
        head = data[: data.find(_BLANK_LINE) + len(_BLANK_LINE)]
        size = len(head) + int(headers.get(b"content-length", 0))
        plain = b"transfer-encoding" not in headers and b"expect" not in headers and b"upgrade" not in headers
        if plain and size == len(data):
            self._last = _Head(head, size, self._url, self._method, headers, self._keep_alive)

    def _repeat(self, last: _Head, data: bytes) -> None:
        body = data[len(last.head) :]
        if body:
            self._hold(len(body))
        self._done(Request(last.method, last.target, last.headers, body), last.keep_alive, len(body))

    def _hold(self, size: int) -> None:
        statistics = self._statistics
        statistics.held_bytes += size
        if statistics.held_bytes > self._settings.max_held_bytes:
            statistics.held_bytes -= size
            raise Refusal(503, "too many large requests at once", retry_after=1)

    # the parser's calls

    def on_message_begin(self) -> None:
        self._progress += 1
        self._url = b""
        self._headers = {}
        self._header_bytes = 0
        self._body = []
        self._body_bytes = 0
        self._last = None
        self.reading = True
        self.since = self._clock.monotonic()

    def on_url(self, part: bytes) -> None:
        self._url += part
        self._header_bytes += len(part)
        if self._header_bytes > self._max_header_bytes:
            self._stop(self._header_refusal())

    def on_header(self, name: bytes, value: bytes) -> None:
        self._progress += 1
        self._header_bytes += len(name) + len(value) + 4
        if self._header_bytes > self._max_header_bytes:
            self._stop(self._header_refusal())
        name = name.lower()
        headers = self._headers
        headers[name] = value if name not in headers else headers[name] + b", " + value

    def on_headers_complete(self) -> None:
        headers = self._headers
        if b"host" not in headers and self._parser.get_http_version() == "1.1":
            self._stop(Refusal(400, "an HTTP/1.1 request must have a Host header"))
        length = headers.get(b"content-length")
        if length is not None and int(length) > self._settings.max_body_bytes:
            self._stop(self._body_refusal(int(length)))
        if b"expect" in headers:
            if headers[b"expect"].lower() != b"100-continue":
                self._stop(Refusal(417, "only 'Expect: 100-continue' is known"))
            self.continue_due = True
            self._continue_wanted()

    def on_body(self, part: bytes) -> None:
        self._progress += 1
        self.continue_due = False
        if self._body_bytes + len(part) > self._settings.max_body_bytes:
            self._stop(self._body_refusal(self._body_bytes + len(part)))
        try:
            self._hold(len(part))
        except Refusal as refusal:
            self._stop(refusal)
        self._body.append(part)
        self._body_bytes += len(part)

    def on_message_complete(self) -> None:
        self._progress += 1
        parser, headers = self._parser, self._headers
        keep_alive = parser.should_keep_alive()
        if parser.should_upgrade():
            # The parser takes what follows for another protocol. Asking for one is an offer that a server
            # may ignore, so what follows is this request's body, and then HTTP again.
            if b"transfer-encoding" in headers:
                self._stop(Refusal(400, "Upgrade with a chunked body is not supported"))
            keep_alive = b"close" not in headers.get(b"connection", b"").lower()
            self._upgrade_body = int(headers.get(b"content-length", 0))
            if self._upgrade_body:
                return
        self._complete(parser.get_method(), keep_alive)

    def _complete(self, method: bytes, keep_alive: bool) -> None:
        body = self._body
        content = body[0] if len(body) == 1 else b"".join(body)
        held, self._body, self._body_bytes = self._body_bytes, [], 0
        self._method, self._keep_alive = method, keep_alive
        self._completed += 1
        self.continue_due = self.reading = False
        self._done(Request(method, self._url, self._headers, content), keep_alive, held)

    # upgrade offers

    def _ignore_upgrade(self, rest: bytes) -> None:
        self._method = self._parser.get_method()
        self._parser = httptools.HttpRequestParser(self)
        if rest:
            self._parse(rest)

    def _read_upgrade_body(self, data: bytes) -> bytes:
        part = data[: self._upgrade_body]
        self._upgrade_body -= len(part)
        try:
            self.on_body(part)
        except _ParsingStopped:
            raise self._refusal or Refusal(400, "not HTTP/1.1") from None
        if not self._upgrade_body:
            self._complete(self._method, b"close" not in self._headers.get(b"connection", b"").lower())
        return data[len(part) :]

    # refusing

    def _stop(self, refusal: Refusal) -> None:
        self._refusal = refusal
        raise _ParsingStopped

    def _header_refusal(self) -> Refusal:
        return Refusal(431, f"the request's headers are larger than {self._settings.max_header_bytes} bytes")

    def _body_refusal(self, size: int) -> Refusal:
        return Refusal(
            413, f"the body has {size} bytes or more, at most {self._settings.max_body_bytes} are taken"
        )
