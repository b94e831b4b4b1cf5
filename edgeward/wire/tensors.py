"""Text and byte strings in tensors: each element behind its length as 4 bytes little-endian.

The Open Inference Protocol's binary form of BYTES; golden vectors and workers use it too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

_LENGTH = struct.Struct("<I")


def pack_elements(items: Iterable[bytes]) -> bytes:
    parts = []
    for item in items:
        parts += [_LENGTH.pack(len(item)), item]
    return b"".join(parts)


def unpack_elements(data: bytes | memoryview) -> list[bytes]:
    """Raises ValueError when a length is cut off or points beyond the end."""
    items, at, end = [], 0, len(data)
    while at < end:
        if at + 4 > end:
            raise ValueError("a length is cut off")
        (size,) = _LENGTH.unpack_from(data, at)
        at += 4
        if at + size > end:
            raise ValueError(f"an element of {size} bytes reaches beyond the end")
        items.append(bytes(data[at : at + size]))
        at += size
    return items
