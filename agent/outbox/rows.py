"""What an outbox hands out and takes in, and the check over each row that it keeps."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from agent.outbox.eviction import Tally
from edgeward.wire.rows import Lost
from edgeward.wire.topics import Lane


@dataclass(frozen=True)
class LaneState:
    """`next_seq` is the number the next row gets; everything up to `acked` is stored (-1: nothing)."""

    next_seq: int
    acked: int

    @property
    def floor(self) -> int:
        return self.acked + 1


@dataclass(frozen=True)
class TrendChange:
    """What is to be known of a stream's open trends: all of it (`whole`), or what came to it."""

    stream: str
    data: bytes
    whole: bool


@dataclass(frozen=True)
class Discarded:
    """Rows of one lane that could not be written, and the span of their event times."""

    count: int
    first_event_time: int
    last_event_time: int

    def __add__(self, other: Discarded | None) -> Discarded:
        if other is None:
            return self
        return Discarded(
            self.count + other.count,
            min(self.first_event_time, other.first_event_time),
            max(self.last_event_time, other.last_event_time),
        )


@dataclass(frozen=True)
class Sequence:
    """One numbered sequence that the outbox still answers for: of the present epoch, or of one before."""

    epoch: str
    lane: Lane
    floor: int
    next_seq: int


@dataclass(frozen=True)
class Part:
    """Numbers `first .. first + count - 1` without a hole: `rows` (MessagePack) for all that are not `lost`."""

    first: int
    count: int
    floor: int
    rows: list[bytes]
    lost: list[Lost]


@dataclass(frozen=True)
class LaneSize:
    """Rows that wait, what they cost in bytes, and how many were lost since the outbox was made."""

    rows: int
    bytes: int
    lost: int


@dataclass
class Found:
    """One lane of a damaged file: its numbers lie in `floor .. next_seq - 1`, `gaps` are records that are sound."""

    id: int
    epoch: str
    name: Lane
    next_seq: int
    floor: int = 0
    gaps: list[Tally] = field(default_factory=list)


def check(lane: int, seq: int, data: bytes) -> int:
    """CRC-32 of a row in its place: SQLite would hand out a flipped bit as if it were data."""
    return zlib.crc32(data, (lane << 24 ^ seq) & 0xFFFFFFFF)


def event_time(row: bytes) -> int:
    """The first field of a row (MessagePack array) that is a time in microseconds; 0 when it has none.

    Rows are taken apart for nothing else when they are evicted, in thousands.
    """
    start = 1 if row and row[0] & 0xF0 == 0x90 else 3
    kind = row[start : start + 1]
    if kind in (b"\xcf", b"\xd3"):
        return int.from_bytes(row[start + 1 : start + 9], "big", signed=kind == b"\xd3")
    if kind in (b"\xce", b"\xd2"):
        return int.from_bytes(row[start + 1 : start + 5], "big", signed=kind == b"\xd2")
    return 0


def guarded(data: bytes) -> bytes:
    """`data` behind its CRC-32."""
    return zlib.crc32(data).to_bytes(4, "big") + data


def unguarded(data: bytes) -> bytes | None:
    """What `guarded` was given; None when a bit has changed."""
    return data[4:] if zlib.crc32(data[4:]) == int.from_bytes(data[:4], "big") else None
