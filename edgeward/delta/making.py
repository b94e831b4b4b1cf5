"""Making a delta: every codec is tried, the smallest result counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import zstandard

from edgeward.delta import lanes
from edgeward.delta.frame import PATCH_FROM_BYTES, Codec, DeltaError, Head

#: A delta of more than this share of the file is not worth the work on the device.
WORTH = 0.9

Buffer = bytes | memoryview

#: (up to bytes, level): the optimal parser finds a tenth more, at a twentieth of the speed.
_PATCH_LEVELS = ((8 << 20, 19), (1 << 40, 9))
_TRIAL_LEVEL = 3
#: Small numbers hold many short chance repetitions, which cost more than they save: only an optimal parser
#: passes them over (int8 weights: 8.7 % instead of 10.7 % at level 9). There are no far ones to look for.
_LANES_PARAMETERS: dict[str, int] = {
    "window_log": 18,
    "hash_log": 16,
    "chain_log": 16,
    "search_log": 4,
    "min_match": 3,
    "target_length": 64,
    "strategy": zstandard.STRATEGY_BTOPT,
    "write_checksum": 0,
}
#: The blocks of a large file by which codecs are compared: enough for every kind of tensor to be met.
_TRIAL_BLOCKS = 16
_FED = 1 << 20
#: zstd's hash table has 4 bytes times two to this; far below the base's size, old content is not found again.
_TABLE_LOG = (17, 25)

#: A subtraction must know where its elements begin, XOR need not: hence phases for one only.
_LANES = (
    Codec("xor", 2),
    Codec("xor", 4),
    *(Codec("difference", width, phase) for width in (1, 2, 4) for phase in range(width)),
)


@dataclass(frozen=True)
class Delta:
    """`content` is what travels: head and zstd frame."""

    codec: Codec
    content: bytes


def make(base: Buffer, new: Buffer, *, going_on: Callable[[], None] = lambda: None) -> Delta | None:
    """The smallest delta that makes `new` of `base`; None when it would not be worth it (see WORTH).

    `patch-from` is left out above PATCH_FROM_BYTES. `going_on` is called about every MiB of work, and may
    raise to stop. Raises DeltaError when zstd has not enough memory.
    """
    old, wanted = memoryview(base), memoryview(new)
    if not wanted or not old:
        return None
    limit = int(len(wanted) * WORTH)
    best: Delta | None = None
    try:
        codecs = [_best_lanes(old, wanted, going_on)]
        if max(len(old), len(wanted)) <= PATCH_FROM_BYTES:
            codecs.append(Codec("patch-from"))
        for codec in codecs:
            head = Head(codec, len(old), len(wanted)).encode()
            parts = _patch_from(old, wanted) if codec.kind == "patch-from" else _coded(codec, old, wanted)
            content = _joined(head, parts, limit, going_on)
            if content is not None:
                best, limit = Delta(codec, content), len(content) - 1
    except zstandard.ZstdError as error:
        raise DeltaError(f"no delta could be made: {error}") from None
    return best


def _joined(head: bytes, parts: Iterable[bytes], limit: int, going_on: Callable[[], None]) -> bytes | None:
    """None as soon as it is longer than `limit`: what does not pay is not finished."""
    content = bytearray(head)
    for part in parts:
        going_on()
        content += part
        if len(content) > limit:
            return None
    return bytes(content)


def _best_lanes(old: memoryview, new: memoryview, going_on: Callable[[], None]) -> Codec:
    """By the blocks of a sample; of a small file that is all of it."""
    compressor = zstandard.ZstdCompressor(level=_TRIAL_LEVEL)

    def trial(codec: Codec) -> float:
        every = list(lanes.blocks(codec, len(new)))
        chosen = every[:: -(-len(every) // _TRIAL_BLOCKS)]
        total = 0
        for at, length in chosen:
            going_on()
            total += len(compressor.compress(lanes.encode_block(codec, old, new, at, length)))
        # A phase may bring one more block, and so a sample of another length.
        return total / sum(length for _, length in chosen)

    return min(_LANES, key=trial)


def _coded(codec: Codec, old: memoryview, new: memoryview) -> Iterator[bytes]:
    size = lanes.coded_size(codec, len(new))
    parameters = zstandard.ZstdCompressionParameters(**_LANES_PARAMETERS)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=size)
    for at, length in lanes.blocks(codec, len(new)):
        yield stream.compress(lanes.encode_block(codec, old, new, at, length))
    yield stream.flush()


def _patch_from(old: memoryview, new: memoryview) -> Iterator[bytes]:
    """As `zstd --patch-from`: the base is what came before the first byte, and the window holds both."""
    low, high = _TABLE_LOG
    table = min(max(len(old).bit_length(), low), high)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        next(level for most, level in _PATCH_LEVELS if len(new) <= most),
        source_size=len(new),
        dict_size=len(old),
        window_log=max((len(old) + len(new)).bit_length(), zstandard.WINDOWLOG_MIN),
        hash_log=table,
        chain_log=table,
        write_checksum=0,
    )
    # Raw content: a base that begins like a zstd dictionary is not to be read as one.
    prefix = zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    compressor = zstandard.ZstdCompressor(dict_data=prefix, compression_params=parameters)
    stream = compressor.compressobj(size=len(new))
    for at in range(0, len(new), _FED):
        yield stream.compress(new[at : at + _FED])
    yield stream.flush()
