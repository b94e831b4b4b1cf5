"""The answer that says where an artifact is: a pre-signed address that is good for a short time."""

from __future__ import annotations

from fastapi import Response
from starlette.concurrency import run_in_threadpool

from controller.api.connection import Receive, Scope, Send
from controller.artifacts import Remote
from controller.downloads import Downloads


class Redirect(Response):
    """307 to another server, counted as a download for a time by the artifact's size.

    Takes its slot when it begins to answer; raises Busy then, and Unavailable when nothing can be signed.
    """

    def __init__(self, source: Remote, holder: str, downloads: Downloads) -> None:
        # Nobody on the way may keep it: the address alone gives the bytes to whoever has it.
        super().__init__(status_code=307, headers={"Cache-Control": "no-store"})
        self._source = source
        self._holder = holder
        self._downloads = downloads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._downloads.reserve(self._holder, self._source.size)
        self.headers["Location"] = await run_in_threadpool(self._source.url)
        await super().__call__(scope, receive, send)
