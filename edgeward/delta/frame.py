"""The head of a delta: what made it, from how much, into how much."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from edgeward.errors import EdgewardError

Kind = Literal["patch-from", "xor", "difference"]

MAGIC = b"EWD1"
#: Magic, kind, width, phase, zero, base size, size; little-endian. The zstd frame follows.
_HEAD = struct.Struct("<4sBBBBQQ")
HEAD_BYTES = _HEAD.size

#: A patch-from takes about three times the file in memory on the device and seven times where it is made.
PATCH_FROM_BYTES = 64 << 20

_KINDS: dict[int, Kind] = {1: "patch-from", 2: "xor", 3: "difference"}
_NUMBERS = {kind: number for number, kind in _KINDS.items()}
_WIDTHS = (1, 2, 4)


class DeltaError(EdgewardError):
    """A delta is damaged, or made for another base or another output."""


@dataclass(frozen=True)
class Codec:
    """How a delta was made.

    `width` is the bytes of an element (1, 2 or 4) whose bytes lie apart in the compressed stream, `phase`
    the zero bytes (below `width`) in front of both files that bring most elements to a multiple of
    `width`. Both are 1 and 0 for `patch-from`.
    """

    kind: Kind
    width: int = 1
    phase: int = 0

    @property
    def name(self) -> str:
        """For people and headers: `patch-from`, `xor/4`, `difference/4+1`."""
        if self.kind == "patch-from":
            return self.kind
        return f"{self.kind}/{self.width}" + (f"+{self.phase}" if self.phase else "")


@dataclass(frozen=True)
class Head:
    """`base_size` and `size` in bytes."""

    codec: Codec
    base_size: int
    size: int

    def encode(self) -> bytes:
        codec = self.codec
        return _HEAD.pack(MAGIC, _NUMBERS[codec.kind], codec.width, codec.phase, 0, self.base_size, self.size)


def decode(delta: bytes) -> Head:
    """The head of a delta. Raises DeltaError unless it is one that `Head.encode` makes."""
    if len(delta) < HEAD_BYTES:
        raise DeltaError(f"the delta has {len(delta)} bytes, its head alone would have {HEAD_BYTES}")
    magic, number, width, phase, zero, base_size, size = _HEAD.unpack_from(delta)
    kind = _KINDS.get(number)
    if magic != MAGIC or kind is None or zero or width not in _WIDTHS or phase >= width:
        raise DeltaError(
            "not a delta that this version can read", hint="the full artifact is fetched instead"
        )
    if kind == "patch-from" and width != 1:
        raise DeltaError("a patch-from delta has no elements")
    return Head(Codec(kind, width, phase), base_size, size)
