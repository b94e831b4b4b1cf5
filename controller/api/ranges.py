"""Which part of a file a request asks for (RFC 9110, section 14)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_RANGE = re.compile(r"bytes=[ \t]*(?:(\d{1,19})-(\d{0,19})|-(\d{1,19}))[ \t]*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """Bytes `start` to `end` (exclusive) of a file of `size` bytes; `partial` when that was asked for."""

    start: int
    end: int
    size: int
    partial: bool

    @property
    def length(self) -> int:
        return self.end - self.start


class Unsatisfiable(Exception):
    """The range lies behind the end: 416."""


def part_of(size: int, etag: str, range_: str | None, if_range: str | None) -> Part:
    """What `Range` and `If-Range` select of a file with the strong entity tag `etag`.

    A field that is malformed, names another unit or several ranges, or whose If-Range is not exactly `etag`
    is ignored, as the RFC permits: the answer is the whole file then. Raises Unsatisfiable.
    """
    whole = Part(0, size, size, False)
    found = _RANGE.fullmatch(range_) if range_ else None
    if found is None or (if_range is not None and if_range.strip() != etag):
        return whole
    first, last, suffix = found.groups()
    if suffix is not None:
        if int(suffix) == 0 or size == 0:
            raise Unsatisfiable
        return Part(max(size - int(suffix), 0), size, size, True)
    start = int(first)
    if last and int(last) < start:
        return whole
    if start >= size:
        raise Unsatisfiable
    return Part(start, min(int(last) + 1, size) if last else size, size, True)
