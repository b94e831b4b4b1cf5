"""How far an outbox came, beside the outbox: what tells that a damaged file has lost its end.

SQLite leaves out the part of a write-ahead log that does not verify and opens the rest as if nothing had been.
Numbers that were given out already would be given out again, and the store would drop the new rows as repeats.
The mark is written after each commit, without fsync: it survives a kill, and after a power cut it is never
ahead of what was durable.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgeward.wire.topics import Lane

_SLOT = 8192
#: Lanes in a mark; an outbox that was damaged more often than that in one partition forgets the oldest.
MAX_LANES = 64


class LaneMark(msgspec.Struct, frozen=True, array_like=True):
    """A lane's key in the outbox, and that its numbers `floor .. next_seq - 1` are not acknowledged."""

    id: int
    epoch: str
    name: Lane
    next_seq: int
    floor: int


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """`epoch` is the present one; `count` grows with each mark."""

    count: int
    epoch: str
    lanes: list[LaneMark]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Mark).decode


def read(path: Path) -> Mark | None:
    """The newest sound mark; None without one."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    marks = [mark for start in (0, _SLOT) if (mark := _slot(raw[start : start + _SLOT])) is not None]
    return max(marks, key=lambda mark: mark.count, default=None)


def _slot(raw: bytes) -> Mark | None:
    length = int.from_bytes(raw[:2], "big")
    data = raw[6 : 6 + length]
    if not data or zlib.crc32(data) != int.from_bytes(raw[2:6], "big"):
        return None
    try:
        return _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


@dataclass
class _Memory:
    map: mmap.mmap
    count: int


class Watermark:
    """Two slots, written in turn: a write that is cut off leaves the other one. Losing it costs no row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._memory: _Memory | None = None

    def open(self) -> None:
        """Go on from the marks in the file, or make it. Without room on the disk there are no marks."""
        if self._memory is not None:
            return
        known = read(self._path)
        with contextlib.suppress(OSError):
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                # In a hole of the file, the first write to a full disk would be a SIGBUS.
                os.posix_fallocate(fd, 0, 2 * _SLOT)
                self._memory = _Memory(mmap.mmap(fd, 2 * _SLOT), known.count if known else 0)
            finally:
                os.close(fd)

    def write(self, epoch: str, lanes: list[LaneMark]) -> None:
        memory = self._memory
        if memory is None:
            return
        memory.count += 1
        data = _encode(Mark(memory.count, epoch, lanes[-MAX_LANES:]))
        start = memory.count % 2 * _SLOT
        head = len(data).to_bytes(2, "big") + zlib.crc32(data).to_bytes(4, "big")
        memory.map[start : start + len(head) + len(data)] = head + data

    def close(self) -> None:
        if self._memory is not None:
            self._memory.map.close()
            self._memory = None
