"""The same API as an ASGI application: for embedding it, and for tools that speak ASGI only."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from agent.serving.api import Api
from agent.serving.messages import Request, Response, refuse
from agent.serving.refusal import Refusal

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class AsgiApp:
    def __init__(self, api: Api) -> None:
        self._api = api

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        answered: asyncio.Future[Response] = asyncio.get_running_loop().create_future()

        def respond(response: Response) -> None:
            if not answered.done():
                answered.set_result(response)

        bodiless = scope["method"] == "HEAD"
        try:
            body = await self._body(receive)
        except Refusal as refusal:
            respond(refuse(refusal))
        else:
            target = scope.get("raw_path") or scope["path"].encode()
            headers: dict[bytes, bytes] = {}
            for name, value in scope["headers"]:
                headers[name] = headers[name] + b", " + value if name in headers else value
            method = b"GET" if bodiless else scope["method"].encode()
            self._api.handle(Request(method, target, headers, body), respond)
        response = await answered
        body = b"".join(response.body)
        headers_out = [
            (b"content-type", response.content_type),
            (b"content-length", b"%d" % len(body)),
            *response.headers,
        ]
        await send({"type": "http.response.start", "status": response.status, "headers": headers_out})
        await send({"type": "http.response.body", "body": b"" if bodiless else body})

    async def _body(self, receive: Receive) -> bytes:
        """Raises Refusal (413)."""
        limit = self._api.settings.max_body_bytes
        parts, size = [], 0
        while True:
            message = await receive()
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            if size > limit:
                raise Refusal(413, f"the body has {size} bytes or more, at most {limit} are taken")
            if not message.get("more_body"):
                return b"".join(parts)
