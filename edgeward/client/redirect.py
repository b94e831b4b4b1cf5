"""When an artifact is at another server: where one may be sent, what goes along, and what may be told of it.

The address is pre-signed: whoever has it, has the bytes. It stands in no message and no log.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from urllib.parse import urljoin, urlsplit

from edgeward.errors import Unavailable

#: Temporary redirects of a GET (RFC 9110, 15.4).
STATUS = frozenset({302, 303, 307})
#: What S3 answers to an address that has expired, or whose keys have.
STALE = frozenset({400, 401, 403})
#: `If-Range` not: it names the controller's entity tag, and the digest decides in the end.
_FORWARDED = frozenset({"range", "accept-encoding"})


def target(base: str, location: str | None) -> str:
    """Where a redirect of the server at `base` leads. Raises Unavailable where one must not go.

    From https only to https: bytes that nobody on the way may see or replace stay so.
    """
    try:
        url = urljoin(f"{base}/", location or "")
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not location or not fits or "@" in parts.netloc or not (location.isascii() and location.isprintable()):
        raise Unavailable(f"{base} points to what is not an address for an artifact")
    if parts.scheme == "http" and not base.startswith("http:"):
        raise Unavailable(
            f"{base} points to {shown(url)}, which is not encrypted",
            hint="give the controller an https endpoint for its artifacts",
        )
    return url


def forwarded(headers: Mapping[str, str]) -> dict[str, str]:
    """The fields that another server is told: which part is wanted, and how it may be coded."""
    return {name: value for name, value in headers.items() if name.lower() in _FORWARDED}


def shown(url: str) -> str:
    """For messages: without what is signed."""
    return url.partition("?")[0]


def without_queries(text: str) -> str:
    """The same for all addresses in a text."""
    return re.sub(r"\?[^\s\"'<>)]*X-Amz-[^\s\"'<>)]*", "?...", text)


class _Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "X-Amz-" in text:
            record.msg, record.args = without_queries(text), ()
        return True


# The libraries below log every request's address, and every answer's fields when they are told to debug.
for _name in ("httpx", "httpcore.http11", "httpcore.connection"):
    logging.getLogger(_name).addFilter(_Filter())
