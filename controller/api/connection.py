"""The TCP connection below an answer: sending a file with sendfile(2), and how much is still on its way.

ASGI has no way to a connection, so this is the one place that knows uvicorn's inside. What it needs is
checked for each request; where anything is missing the answer goes through ASGI piece by piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib
import os
import select
import socket
import struct
import termios
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import Executor
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

EXTENSION = "edgeward.connection"
#: One sendfile call: long enough to cost nothing, short enough that progress is seen.
_PIECE = 1 << 20


def offer(scope: Scope, send: Send) -> None:
    """Put the Connection into `scope["extensions"]` where there is one; `send` must be the server's own."""
    if scope["type"] == "http" and (found := _connection(send)) is not None:
        scope["extensions"] = {**scope.get("extensions", {}), EXTENSION: found}


class Connection:
    """What an answer may do beside ASGI. For the event loop's thread."""

    def __init__(self, cycle: Any, account: Callable[[Any, int], None]) -> None:
        self._cycle = cycle
        self._account = account
        self._transport: asyncio.Transport = cycle.transport
        self._copy: socket.socket | None = None

    @property
    def encrypted(self) -> bool:
        """Then the kernel cannot send a file: it has not the keys."""
        return self._transport.get_extra_info("sslcontext") is not None

    def unread(self) -> int:
        """Bytes that were handed over and that the peer's kernel has not acknowledged."""
        if self._transport.is_closing():
            return 0
        buffered = self._transport.get_write_buffer_size()
        answer = fcntl.ioctl(self._fileno(), termios.TIOCOUTQ, bytes(4))
        return buffered + int(struct.unpack("i", answer)[0])

    def abort(self) -> None:
        """Cut the connection; a running `send_file` ends with ConnectionError."""
        if self._copy is not None:
            with contextlib.suppress(OSError):
                self._copy.shutdown(socket.SHUT_RDWR)
        self._transport.abort()

    async def send_file(
        self, executor: Executor, file: int, offset: int, count: int, moved: Callable[[int], None]
    ) -> None:
        """Send `count` bytes of the descriptor `file` as the answer's body, in a thread of `executor`.

        `moved` is told each number of bytes given to the kernel. The caller still ends the body through
        ASGI, with nothing more in it. Raises OSError when the disk or the connection fails.
        """
        self._check()
        # The head must be in the socket before the file's first byte.
        self._transport.set_write_buffer_limits(high=0)
        await self._cycle.flow.drain()
        self._check()
        self._transport.set_write_buffer_limits()
        # Descriptors of its own: the transport's and the caller's may be closed while the thread works.
        copy, source = socket.socket(fileno=os.dup(self._fileno())), os.dup(file)
        self._copy = copy
        work = asyncio.get_running_loop().run_in_executor(executor, _send, copy, source, offset, count, moved)

        def ended(work: asyncio.Future[None]) -> None:
            work.exception()  # seen, also where nobody waits any more
            copy.close()
            os.close(source)

        work.add_done_callback(ended)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            self.abort()
            raise
        self._account(self._cycle, count)

    def _check(self) -> None:
        if self._cycle.disconnected or self._transport.is_closing():
            raise ConnectionAbortedError("the reader has gone")

    def _fileno(self) -> int:
        sock = self._transport.get_extra_info("socket")
        return int(sock.fileno())


def _send(sock: socket.socket, file: int, offset: int, count: int, moved: Callable[[int], None]) -> None:
    """In a thread, because a file that is not in the page cache makes sendfile wait for the disk."""
    writable = select.poll()
    writable.register(sock, select.POLLOUT)
    end = offset + count
    while offset < end:
        try:
            sent = os.sendfile(sock.fileno(), file, offset, min(end - offset, _PIECE))
        except BlockingIOError:
            writable.poll()
            continue
        if sent == 0:
            raise OSError("the file is shorter than it was")
        offset += sent
        moved(sent)


class _Sent:
    """Stands for body bytes that went around h11."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count


def _account_httptools(cycle: Any, count: int) -> None:
    cycle.expected_content_length -= count


def _account_h11(cycle: Any, count: int) -> None:
    # h11's documented way for sendfile: Connection.send_with_data_passthrough.
    cycle.conn.send_with_data_passthrough(importlib.import_module("h11").Data(data=_Sent(count)))


_NEEDED = {
    "uvicorn.protocols.http.httptools_impl": ("expected_content_length", _account_httptools),
    "uvicorn.protocols.http.h11_impl": ("conn", _account_h11),
}


def _connection(send: Send) -> Connection | None:
    cycle: Any = getattr(send, "__self__", None)
    attribute, account = _NEEDED.get(type(cycle).__module__, ("", None))
    if account is None or not all(
        hasattr(cycle, name) for name in ("transport", "flow", "disconnected", attribute)
    ):
        return None
    sock = cycle.transport.get_extra_info("socket")
    return Connection(cycle, account) if sock is not None and sock.fileno() >= 0 else None
