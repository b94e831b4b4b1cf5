"""The answer that is a file: one of a limited number, with ranges, and not for readers who do not read."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from fastapi import Response

from controller.api.connection import EXTENSION, Connection, Receive, Scope, Send
from controller.api.ranges import Part, Unsatisfiable, part_of
from controller.downloads import Downloads, Pace
from edgeward.clock import Clock

log = logging.getLogger(__name__)

_CHUNK = 256 << 10
_GONE = "the reader has gone"


class Download(Response):
    """A file that never changes, under the strong entity tag `etag`.

    Takes its slot when it begins to answer; raises Busy then. A HEAD needs none.
    """

    def __init__(
        self,
        path: Path,
        etag: str,
        holder: str,
        downloads: Downloads,
        executor: Executor,
        clock: Clock,
        headers: dict[str, str],
    ) -> None:
        super().__init__(headers={"ETag": etag, "Accept-Ranges": "bytes", **headers})
        del self.headers["content-length"]
        self.headers["Content-Type"] = "application/octet-stream"
        self._path = path
        self._etag = etag
        self._holder = holder
        self._downloads = downloads
        self._executor = executor
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = scope["method"] == "HEAD"
        asked = {name: value.decode("latin-1") for name, value in scope["headers"]}
        range_ = None if head else asked.get(b"range")  # RFC 9110, 14.2: a range is for GET
        file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(file).st_size
            try:
                part = part_of(size, self._etag, range_, asked.get(b"if-range"))
            except Unsatisfiable:
                refused = Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
                await refused(scope, receive, send)
                return
            if head:
                await self._begin(send, part)
                await _end(send)
                return
            with self._downloads.slot(self._holder):
                await self._begin(send, part)
                await self._body(scope, receive, send, file, part)
        finally:
            os.close(file)

    async def _begin(self, send: Send, part: Part) -> None:
        self.headers["Content-Length"] = str(part.length)
        if part.partial:
            self.status_code = 206
            self.headers["Content-Range"] = f"bytes {part.start}-{part.end - 1}/{part.size}"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

    async def _body(self, scope: Scope, receive: Receive, send: Send, file: int, part: Part) -> None:
        connection: Connection | None = scope.get("extensions", {}).get(EXTENSION)
        given = 0

        def moved(count: int) -> None:
            nonlocal given
            given += count

        if connection is not None and not connection.encrypted:
            work = connection.send_file(self._executor, file, part.start, part.length, moved)
        else:
            work = self._pieces(send, file, part, moved)
        pace = Pace(self._downloads.limits, self._clock.monotonic())
        sending, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
        try:
            problem = await self._watch(sending, gone, pace, lambda: given - _unread(connection))
            if sending.done() and not problem:
                await _end(send)
                return
            if problem != _GONE:
                log.warning("download of %s by %s ended: %s", self._path.name[:16], self._holder, problem)
            if connection is None:
                raise ConnectionAbortedError(problem)  # all that ASGI has to make a server hang up
            connection.abort()
            await gone
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _watch(
        self, sending: asyncio.Task[None], gone: asyncio.Task[None], pace: Pace, taken: Callable[[], int]
    ) -> str:
        """Why it did not end well: when it is sent, the reader has gone, or must go."""
        every = pace.limits.window / 10
        while True:
            await asyncio.wait({sending, gone}, timeout=every, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                error = sending.exception()
                if error is None:
                    return ""
                if isinstance(error, ConnectionError):
                    return _GONE
                return f"{type(error).__name__}: {error}"
            if gone.done():
                return _GONE
            if problem := pace.problem(self._clock.monotonic(), taken()):
                return problem

    async def _pieces(self, send: Send, file: int, part: Part, moved: Callable[[int], None]) -> None:
        """Through ASGI: for TLS, and for servers other than uvicorn."""
        loop, at = asyncio.get_running_loop(), part.start
        while at < part.end:
            size = min(_CHUNK, part.end - at)
            piece = await loop.run_in_executor(self._executor, os.pread, file, size, at)
            if not piece:
                raise OSError("the file is shorter than it was")
            at += len(piece)
            moved(len(piece))
            await send({"type": "http.response.body", "body": piece, "more_body": True})


def _unread(connection: Connection | None) -> int:
    with contextlib.suppress(OSError):
        return connection.unread() if connection else 0
    return 0


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(send: Send) -> None:
    await send({"type": "http.response.body", "body": b"", "more_body": False})
