"""Compressed requests and answers: off the loop, and never larger than allowed."""

from __future__ import annotations

import gzip
import zlib

from agent.serving.messages import Response
from agent.serving.refusal import Refusal, bad

_WINDOWS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_LEVEL = 1


def decompress(encoding: bytes, body: bytes, limit: int) -> bytes:
    """Raises Refusal: 415 for an unknown encoding, 413 above `limit` bytes, 400 when it is damaged."""
    window = _WINDOWS.get(encoding)
    if window is None:
        raise Refusal(
            415, f"content-encoding {encoding[:40].decode('latin-1')!r}: gzip and deflate are known"
        )
    inflater = zlib.decompressobj(window)
    try:
        content = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise bad(f"the body is not {encoding.decode()}: {error}") from None
    if len(content) > limit:
        raise Refusal(413, f"the decompressed body is larger than {limit} bytes")
    if not inflater.eof or inflater.unused_data:
        raise bad(f"the {encoding.decode()} body is cut off or has bytes behind its end")
    return content


def accepted(header: bytes) -> bytes:
    """The encoding to answer in, of an Accept-Encoding header; empty: as it is."""
    for part in header.lower().split(b","):
        name, _, parameters = part.strip().partition(b";")
        if name.strip() in _WINDOWS and parameters.replace(b" ", b"") not in (b"q=0", b"q=0.0"):
            return name.strip()
    return b""


def compress(encoding: bytes, response: Response) -> Response:
    content = b"".join(response.body)
    packed = (
        gzip.compress(content, _LEVEL, mtime=0) if encoding == b"gzip" else zlib.compress(content, _LEVEL)
    )
    headers = (*response.headers, (b"content-encoding", encoding), (b"vary", b"accept-encoding"))
    return Response(response.status, [packed], response.content_type, headers)
