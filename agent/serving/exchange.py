"""A request waiting for its answer on a connection, and what all connections share."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

from agent.serving.messages import Handler, Request, Response
from agent.serving.settings import Settings
from agent.serving.statistics import Statistics
from edgeward.clock import Clock

if TYPE_CHECKING:
    from agent.serving.connection import Connection

_STATUS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class Exchange:
    """A request that waits for its answer, in line behind earlier ones of its connection."""

    __slots__ = ("bodiless", "connection", "held", "keep_alive", "request", "response", "says_keep_alive")

    def __init__(
        self,
        connection: Connection,
        request: Request | None,
        *,
        keep_alive: bool,
        bodiless: bool = False,
        says_keep_alive: bool = False,
        held: int = 0,
    ) -> None:
        """`held` bytes of body count as held in memory until the answer is there."""
        self.held = held
        self.connection = connection
        self.request = request
        self.keep_alive = keep_alive
        self.bodiless = bodiless
        self.says_keep_alive = says_keep_alive
        self.response: Response | None = None

    def respond(self, response: Response) -> None:
        if self.response is None:
            self.response = response
            self.connection.release(self)
            self.connection.flush()

    def head(self, response: Response, size: int, date: bytes) -> bytes:
        """The status line and headers of an answer of `size` bytes."""
        head = b"%bdate: %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n" % (
            _STATUS[response.status],
            date,
            response.content_type,
            size,
        )
        for name, value in response.headers:
            head += b"%b: %b\r\n" % (name, value)
        if not self.keep_alive:
            return head + b"connection: close\r\n\r\n"
        if self.says_keep_alive:
            return head + b"connection: keep-alive\r\n\r\n"
        return head + b"\r\n"


class Shared:
    """What the connections of a server have in common. `date` is the header's value now."""

    def __init__(self, handler: Handler, settings: Settings, clock: Clock, statistics: Statistics) -> None:
        self.handler = handler
        self.settings = settings
        self.clock = clock
        self.statistics = statistics
        self.connections: set[Connection] = set()
        self.draining = False
        self.date = b""
        self.emptied: Callable[[], None] = lambda: None
