"""A request and its answer, without any transport."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec import Struct

from agent.serving.refusal import Refusal

JSON = b"application/json"
BINARY = b"application/octet-stream"


class Request(Struct):
    """`target` is the request target as it came; header names in lower case; a HEAD comes as GET."""

    method: bytes
    target: bytes
    headers: dict[bytes, bytes]
    body: bytes


class Response(Struct):
    """`body` are buffers to send one after the other; `headers` beside content-type and content-length."""

    status: int
    body: list[bytes | memoryview]
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


#: To be called once, on the loop's thread, at once or later.
Respond = Callable[[Response], None]
#: What answers requests, on the loop's thread; must not wait.
Handler = Callable[[Request, Respond], None]

_encode = msgspec.json.Encoder().encode


def answer(content: object, status: int = 200) -> Response:
    return Response(status, [_encode(content)])


def refuse(refusal: Refusal) -> Response:
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if refusal.retry_after is not None:
        headers += ((b"retry-after", b"%d" % refusal.retry_after),)
    if refusal.allow:
        headers += ((b"allow", refusal.allow.encode()),)
    return Response(refusal.status, [_encode({"error": str(refusal)})], JSON, headers)
