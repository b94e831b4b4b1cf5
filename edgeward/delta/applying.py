"""Applying a delta that nobody vouches for: bounded by what is signed, never by what it says itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import zstandard

from edgeward.delta import frame, lanes
from edgeward.delta.frame import Codec, DeltaError

#: Where zstd's windows begin and end (2**10, 2**31).
_WINDOWS = (1 << 10, 1 << 31)
_READ = 1 << 20


class _Reader(Protocol):
    def read(self, size: int) -> bytes: ...


def apply(delta: bytes, base: bytes, *, size: int) -> bytes:
    """The file that `delta` makes of `base`, exactly `size` bytes long. See `stream`."""
    return b"".join(stream(delta, base, size=size))


def stream(delta: bytes, base: bytes, *, size: int) -> Iterator[bytes]:
    """The same in pieces of at most about a MiB, `size` bytes together.

    `size` is the signed length: no more is ever made or reserved, whatever the delta says. What comes out
    is unverified. Raises DeltaError for a delta that is damaged or meant for other files, at once or after
    some pieces.
    """
    head = frame.decode(delta)
    codec = head.codec
    if head.base_size != len(base):
        raise DeltaError(f"the delta is for a base of {head.base_size} bytes, this one has {len(base)}")
    if head.size != size:
        raise DeltaError(f"the delta makes {head.size} bytes, signed are {size}")
    most = frame.PATCH_FROM_BYTES if codec.kind == "patch-from" else _WINDOWS[1]
    if max(size, len(base)) > most:
        raise DeltaError(f"a {codec.name} delta is for files of at most {most} bytes")
    payload = memoryview(delta)[frame.HEAD_BYTES :]
    try:
        if codec.kind == "patch-from":
            prefix = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
            yield from _patched(_reader(payload, size, prefix), size)
        else:
            reader = _reader(payload, lanes.coded_size(codec, size))
            yield from _decoded(reader, codec, memoryview(base), size)
    except zstandard.ZstdError as error:
        raise DeltaError(f"the delta is damaged: {error}") from None


def _reader(payload: memoryview, size: int, prefix: zstandard.ZstdCompressionDict | None = None) -> _Reader:
    """The window is what zstd reserves by the frame's own word: no larger than the output may be."""
    window = min(max(size, _WINDOWS[0]), _WINDOWS[1])
    decompressor = zstandard.ZstdDecompressor(dict_data=prefix, max_window_size=window)
    # Across frames, so that what follows the frame is looked at, too, and not passed over.
    return decompressor.stream_reader(payload, read_across_frames=True)


def _patched(reader: _Reader, size: int) -> Iterator[bytes]:
    made = 0
    while made < size:
        piece = reader.read(min(_READ, size - made))
        if not piece:
            raise DeltaError(f"the delta ends after {made} of {size} bytes")
        made += len(piece)
        yield piece
    _ended(reader, size)


def _decoded(reader: _Reader, codec: Codec, base: memoryview, size: int) -> Iterator[bytes]:
    for at, length in lanes.blocks(codec, size):
        coded = bytearray()
        while len(coded) < length:
            piece = reader.read(length - len(coded))
            if not piece:
                raise DeltaError(f"the delta ends after {at + len(coded)} of {size} bytes")
            coded += piece
        plain = lanes.decode_block(codec, base, bytes(coded), at)
        # Only the first block has the phase, only the last one the rest of an element.
        yield plain[max(0, codec.phase - at) : codec.phase + size - at]
    _ended(reader, size)


def _ended(reader: _Reader, size: int) -> None:
    if reader.read(1):
        raise DeltaError(f"the delta makes more than the signed {size} bytes")
