"""Delta codecs: whatever the files, the round trip is exact; whatever the damage, it stays within bounds."""

from __future__ import annotations

import random
import struct
import tracemalloc
from typing import Any

import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgeward.delta import Codec, Delta, DeltaError, apply, frame, lanes, make, stream
from edgeward.delta.making import WORTH

LANES = [
    Codec(kind, width, phase)  # type: ignore[arg-type]
    for kind in ("xor", "difference")
    for width in (1, 2, 4)
    for phase in range(width)
]


def weights(seed: int, count: int, moved: float = 0.0) -> bytes:
    """float32 weights; `moved` is by how much the same seed's weights went on."""
    rng, steps = random.Random(seed), random.Random(seed + 1)
    values = [rng.gauss(0, 0.1) + moved * steps.gauss(0, 0.1) for _ in range(count)]
    return struct.pack(f"<{count}f", *values)


@st.composite
def versions(draw: Any) -> tuple[bytes, bytes]:
    """Two versions of a file: related or not, of the same length or not, also longer than a block."""
    base = draw(st.binary(max_size=300)) * draw(st.sampled_from([1, 1, 7, 4000]))
    new = bytearray(base)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(new)))
        new[at : at + draw(st.integers(0, 9))] = draw(st.binary(max_size=9))
    return base, bytes(new)


@settings(max_examples=150, deadline=None)
@given(versions())
def test_what_is_made_is_made_again(files: tuple[bytes, bytes]) -> None:
    base, new = files
    delta = make(base, new)
    if delta is not None:
        assert len(delta.content) <= WORTH * len(new)
        assert apply(delta.content, base, size=len(new)) == new


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(LANES), versions())
def test_every_codec_brings_back_every_byte(codec: Codec, files: tuple[bytes, bytes]) -> None:
    base, new = files
    coded = [
        lanes.encode_block(codec, memoryview(base), memoryview(new), at, length)
        for at, length in lanes.blocks(codec, len(new))
    ]
    head = frame.Head(codec, len(base), len(new))
    delta = head.encode() + zstandard.compress(b"".join(coded))
    assert frame.decode(delta) == head
    pieces = list(stream(delta, base, size=len(new)))
    assert b"".join(pieces) == new
    assert all(len(piece) <= lanes.BLOCK for piece in pieces)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_the_difference_is_the_one_of_integers_and_small_ones_become_small(old: int, new: int) -> None:
    block = lanes.encode_block(
        Codec("difference", 4), memoryview(struct.pack("<I", old)), memoryview(struct.pack("<I", new)), 0, 4
    )
    apart = (new - old + 2**31) % 2**32 - 2**31
    assert struct.unpack("<I", block)[0] == (2 * apart if apart >= 0 else -2 * apart - 1)


def test_the_smallest_wins() -> None:
    base = weights(1, 50_000)
    moved = weights(1, 50_000, moved=1e-3)
    shifted = b"a longer head" + base[4000:]
    cases = {"difference/4": moved, "patch-from": shifted, "difference/4+3": b"x" + moved}
    for wanted, new in cases.items():
        delta = make(b"x" + base if wanted.endswith("+3") else base, new)
        assert delta is not None and delta.codec.name == wanted
    # int8 weights, a step up or down each
    rng = random.Random(3)
    old = rng.randbytes(50_000)
    stepped = bytes((value + rng.choice((-1, 0, 0, 0, 1))) % 256 for value in old)
    delta = make(old, stepped)
    assert delta is not None and delta.codec.name == "difference/1"
    assert len(delta.content) < 0.2 * len(stepped)


def test_a_phase_is_not_chosen_because_less_of_the_file_was_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lanes, "BLOCK", 4096)
    base, moved = weights(1, 16 * 1024), weights(1, 16 * 1024, moved=1e-3)
    delta = make(base, moved)
    assert delta is not None and delta.codec.name == "difference/4"


def test_there_is_none_where_it_does_not_pay() -> None:
    base, other = random.Random(1).randbytes(100_000), random.Random(2).randbytes(100_000)
    assert make(base, other) is None
    assert make(b"", other) is None
    assert make(base, b"") is None
    half = base[:50_000] + other[50_000:]
    assert make(base, half) is not None


def test_making_can_be_stopped() -> None:
    class Stopped(Exception):
        pass

    calls = 0

    def going_on() -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Stopped

    base = weights(1, 600_000)
    stop_at = 0
    make(base, base, going_on=going_on)
    assert calls > 50
    every = calls
    for stop in (1, every // 2, every):
        calls, stop_at = 0, stop
        with pytest.raises(Stopped):
            make(base, base, going_on=going_on)


def test_a_large_file_is_not_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    base = weights(1, 20_000)
    shifted = b"a longer head" + base
    patch = make(base, shifted)
    assert patch is not None and patch.codec.kind == "patch-from"
    monkeypatch.setattr("edgeward.delta.making.PATCH_FROM_BYTES", len(base))
    without = make(base, shifted)
    assert without is None or without.codec.kind != "patch-from"
    monkeypatch.setattr(frame, "PATCH_FROM_BYTES", len(base))
    with pytest.raises(DeltaError, match="at most"):
        apply(patch.content, base, size=len(shifted))


def test_a_base_that_looks_like_a_zstd_dictionary_is_only_bytes() -> None:
    base = b"\x37\xa4\x30\xec" + random.Random(1).randbytes(5000)
    delta = make(base, b"new" + base)
    assert delta is not None and delta.codec.kind == "patch-from"
    assert apply(delta.content, base, size=len(base) + 3) == b"new" + base


# --- deltas that nobody vouches for ---------------------------------------------------------------

BASE = weights(5, 3000)
NEW = weights(5, 3000, moved=1e-3)
SHIFTED = b"head" + BASE


def genuine() -> list[tuple[Delta, bytes]]:
    made = []
    for new in (NEW, SHIFTED):
        delta = make(BASE, new)
        assert delta is not None
        made.append((delta, new))
    assert {delta.codec.kind for delta, _ in made} == {"difference", "patch-from"}
    return made


GENUINE = genuine()


def bounded(delta: bytes, base: bytes, size: int) -> bytes | None:
    """What comes out, None for a refusal; more than `size` never, not even before the refusal."""
    made = 0
    pieces = []
    try:
        for piece in stream(delta, base, size=size):
            made += len(piece)
            assert made <= size
            pieces.append(piece)
    except DeltaError:
        return None
    assert made == size
    return b"".join(pieces)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(GENUINE), st.data())
def test_a_damaged_delta_is_refused_or_gives_other_bytes_within_its_length(
    made: tuple[Delta, bytes], data: st.DataObject
) -> None:
    delta, new = made
    content = bytearray(delta.content)
    # Half of the changes at the front, where the heads are.
    for _ in range(data.draw(st.integers(1, 4))):
        top = data.draw(st.sampled_from([48, len(content) - 1]))
        at = data.draw(st.integers(0, min(top, len(content) - 1)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "remove"])):
            case "flip":
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=5))
            case "remove":
                del content[at : at + 3]
        if not content:
            break
    assume(bytes(content) != delta.content)
    bounded(bytes(content), BASE, len(new))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([*LANES, Codec("patch-from")]), st.integers(0, 5000))
def test_anything_after_a_good_head_stays_within_bounds(rest: bytes, codec: Codec, size: int) -> None:
    head = frame.Head(codec, len(BASE), size).encode()
    bounded(head + rest, BASE, size)
    bounded(head + b"\x28\xb5\x2f\xfd" + rest, BASE, size)


def test_a_delta_for_other_files_is_refused() -> None:
    for delta, new in GENUINE:
        for base, size, says in [
            (BASE[:-1], len(new), "for a base of 12000 bytes"),
            (BASE, len(new) - 1, "signed are"),
            (BASE, len(new) + 1, "signed are"),
        ]:
            with pytest.raises(DeltaError, match=says):
                apply(delta.content, base, size=size)
        other = apply(delta.content, bytes(len(BASE)), size=len(new))
        assert other != new and len(other) == len(new)


def test_a_head_that_make_would_not_write_is_refused() -> None:
    good = bytearray(GENUINE[0][0].content)
    assert good[4:8] == bytes([3, 4, 0, 0])
    for at, value in [(0, 0), (4, 0), (4, 4), (4, 1), (5, 0), (5, 3), (5, 8), (6, 4), (7, 1)]:
        bad = bytearray(good)
        bad[at] = value
        with pytest.raises(DeltaError, match=r"cannot read|can read|no elements"):
            frame.decode(bytes(bad))
    with pytest.raises(DeltaError, match="23 bytes"):
        frame.decode(bytes(good[:23]))


def test_what_follows_the_frame_is_refused() -> None:
    for delta, new in GENUINE:
        for more in (b"rubbish!", zstandard.compress(b"more")):
            with pytest.raises(DeltaError):
                apply(delta.content + more, BASE, size=len(new))
        with pytest.raises(DeltaError, match=r"ends after|damaged"):
            apply(delta.content[:-20], BASE, size=len(new))


@pytest.mark.parametrize("kind", ["patch-from", "xor"])
def test_a_bomb_makes_no_more_than_the_signed_length(kind: Any) -> None:
    """200 MB of zeros in a few KB, its window declared as large: neither is made nor reserved."""
    codec = Codec(kind) if kind == "patch-from" else Codec(kind, 4)
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(200 << 20))
    delta = frame.Head(codec, len(BASE), 4096).encode() + bomb
    tracemalloc.start()
    try:
        with pytest.raises(DeltaError):
            apply(delta, BASE, size=4096)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_window_beyond_the_output_is_refused_before_it_is_reserved() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=0)
    stream_ = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    wide = stream_.compress(NEW) + stream_.flush()
    delta = frame.Head(Codec("xor", 1), len(BASE), len(NEW)).encode() + wide
    with pytest.raises(DeltaError, match=r"memory|window"):
        apply(delta, BASE, size=len(NEW))
