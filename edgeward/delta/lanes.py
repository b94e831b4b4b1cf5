"""Elements of 1, 2 or 4 bytes against those at the same place of the base, their bytes laid apart.

Of a retrained weight, sign, exponent and high mantissa bits stay and the low ones look random. XOR, or the
difference of the bit patterns as integers, turns what stays into zeros; laying first bytes beside first
bytes (the byte-shuffle of HDF5 and Blosc) brings the zeros together, where an entropy coder finds them.

Blocks are integers of BLOCK bytes: without numpy, which a controller does not have, arithmetic on one large
integer is what runs at memory speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from edgeward.delta.frame import Codec

#: One plane of a block of 4-byte elements fills one block of zstd (128 KiB), with its own entropy table.
BLOCK = 512 << 10


@dataclass(frozen=True)
class _Masks:
    low: int  # the lowest bit of every element
    high: int  # the highest bit of every element
    rest: int  # all bits but the highest


@lru_cache(maxsize=8)
def _masks(width: int, length: int) -> _Masks:
    low = int.from_bytes((b"\x01" + bytes(width - 1)) * (length // width), "little")
    high = low << (8 * width - 1)
    return _Masks(low, high, (1 << 8 * length) - 1 ^ high)


def _spread(bits: int, width: int) -> int:
    """Elements full of ones where `bits` has an element's lowest bit."""
    return (bits << 8 * width) - bits


def _zigzag_difference(new: int, old: int, width: int, length: int) -> int:
    """`new - old` in every element, modulo its size; small ones of either sign become small numbers.

    Subtraction without a borrow across elements as in Warren, Hacker's Delight, 2-18; zigzag as in
    Protocol Buffers.
    """
    mask = _masks(width, length)
    apart = ((new | mask.high) - (old & mask.rest)) ^ ((new ^ old ^ mask.high) & mask.high)
    negative = _spread((apart & mask.high) >> (8 * width - 1), width)
    return ((apart & mask.rest) << 1) ^ negative


def _undo_zigzag_difference(coded: int, old: int, width: int, length: int) -> int:
    mask = _masks(width, length)
    odd = coded & mask.low
    apart = ((coded ^ odd) >> 1) ^ _spread(odd, width)
    return ((old & mask.rest) + (apart & mask.rest)) ^ ((old ^ apart) & mask.high)


def _piece(data: memoryview, at: int, length: int, phase: int) -> bytes:
    """`length` bytes at `at` of `phase` zeros, the data, and zeros without end."""
    front = max(0, min(length, phase - at))
    begin = max(0, at - phase)
    body = bytes(data[begin : begin + length - front])
    return bytes(front) + body + bytes(length - front - len(body))


def coded_size(codec: Codec, size: int) -> int:
    """Bytes of the coded stream: `size` with its phase, up to a whole element."""
    return -(-(size + codec.phase) // codec.width) * codec.width


def blocks(codec: Codec, size: int) -> Iterator[tuple[int, int]]:
    """(begin, length) of every block of the coded stream."""
    total = coded_size(codec, size)
    for at in range(0, total, BLOCK):
        yield at, min(BLOCK, total - at)


def encode_block(codec: Codec, base: memoryview, new: memoryview, at: int, length: int) -> bytes:
    """One block of the coded stream, as long as its input."""
    width = codec.width
    old = int.from_bytes(_piece(base, at, length, codec.phase), "little")
    wanted = int.from_bytes(_piece(new, at, length, codec.phase), "little")
    coded = wanted ^ old if codec.kind == "xor" else _zigzag_difference(wanted, old, width, length)
    plain = coded.to_bytes(length, "little")
    return b"".join([plain[plane::width] for plane in range(width)])


def decode_block(codec: Codec, base: memoryview, coded: bytes, at: int) -> bytes:
    """The bytes of one block, zeros around the file included."""
    width, length = codec.width, len(coded)
    plain = bytearray(length)
    each = length // width
    for plane in range(width):
        plain[plane::width] = coded[plane * each : (plane + 1) * each]
    old = int.from_bytes(_piece(base, at, length, codec.phase), "little")
    number = int.from_bytes(plain, "little")
    wanted = number ^ old if codec.kind == "xor" else _undo_zigzag_difference(number, old, width, length)
    return wanted.to_bytes(length, "little")
