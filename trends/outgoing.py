"""Batches for a central store out of what the site holds of a range of numbers: pure.

Every number of the range is in one batch: as a row, or in a lost range that says why it is not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from edgeward.intervals import Interval, clip, missing, runs, size, union
from edgeward.wire.resources import Residency
from edgeward.wire.rows import Batch, Lost, Row, join_rows
from edgeward.wire.topics import Lane
from trends.losses import share
from trends.residency import outgoing, outgoing_reason

MAX_ROWS = 5_000
MAX_BYTES = 4 << 20
MAX_LOST = 10_000
#: A central store takes what it lacks from any number on: the site answers for an epoch from its beginning.
FLOOR = 0
RESIDENCY = "residency"
#: When something happened is a part of what must stay.
_NO_TIMES = (0, 0)

_encode = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True)
class Gap:
    """Numbers `first .. last` that are lost, how many for which reason, and their event times."""

    first: int
    last: int
    reasons: dict[str, int]
    times: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Holding:
    """What the site holds of the numbers `first .. last` of one lane."""

    first: int
    last: int
    rows: Mapping[int, Row] = field(default_factory=dict)
    gaps: Sequence[Gap] = ()


@dataclass(frozen=True)
class _Piece:
    """Either one encoded row or a lost range."""

    first: int
    last: int
    row: bytes = b""
    lost: Lost | None = None


def batches(epoch: str, lane: Lane, holding: Holding, residency: Residency) -> Iterator[Batch]:
    """Batches that cover the range without a hole, in ascending order."""
    taken: list[_Piece] = []
    rows = lost = weight = 0
    for piece in _pieces(lane, holding, residency):
        if rows >= MAX_ROWS or lost >= MAX_LOST or (taken and weight + len(piece.row) > MAX_BYTES):
            yield _join(epoch, taken)
            taken, rows, lost, weight = [], 0, 0, 0
        taken.append(piece)
        rows += piece.lost is None
        lost += piece.lost is not None
        weight += len(piece.row)
    if taken:
        yield _join(epoch, taken)


def _join(epoch: str, pieces: list[_Piece]) -> Batch:
    first, last = pieces[0].first, pieces[-1].last
    rows = [piece.row for piece in pieces if piece.lost is None]
    lost = [piece.lost for piece in pieces if piece.lost is not None]
    return Batch(epoch, first, last - first + 1, FLOOR, join_rows(rows) if rows else b"", lost=lost)


class Shares(NamedTuple):
    """Of some numbers: how many go as rows, stay here by the policy, or were lost before."""

    forwarded: int
    withheld: int
    lost: int


def shares(batch: Batch, spans: list[Interval]) -> Shares:
    """Those of a batch's numbers that lie in `spans`."""
    lost, withheld = 0, 0
    for item in batch.lost:
        count = size(clip(spans, item.first_seq, item.last_seq))
        if item.reasons.keys() == {RESIDENCY}:
            withheld += count
        else:
            lost += count
    end = batch.first_seq + batch.count - 1
    return Shares(size(clip(spans, batch.first_seq, end)) - lost - withheld, withheld, lost)


def _pieces(lane: Lane, holding: Holding, residency: Residency) -> list[_Piece]:
    first, last = holding.first, holding.last
    pieces: list[_Piece] = []
    stay: list[int] = []
    held = [seq for seq in sorted(holding.rows) if first <= seq <= last]
    for seq in held:
        sent = outgoing(residency, lane, holding.rows[seq])
        if sent is None:
            stay.append(seq)
        else:
            pieces.append(_Piece(seq, seq, row=_encode(sent)))
    known = runs(held)
    for gap in holding.gaps:
        for begin, end in missing(known, max(first, gap.first), min(last, gap.last)):
            times = gap.times if lane in residency.forward else _NO_TIMES
            lost = Lost(begin, end, *times, _shared(gap, end - begin + 1))
            pieces.append(_Piece(begin, end, lost=lost))
            known = union(known, begin, end)
    kept, rest = runs(stay), missing(known, first, last)
    if lane not in residency.forward:
        kept, rest = kept + rest, []
    for begin, end in kept:
        pieces.append(_Piece(begin, end, lost=Lost(begin, end, *_NO_TIMES, {RESIDENCY: end - begin + 1})))
    for begin, end in rest:
        pieces.append(_Piece(begin, end, lost=Lost(begin, end, 0, 0, {"store-lost": end - begin + 1})))
    return sorted(pieces, key=lambda piece: piece.first)


def _shared(gap: Gap, count: int) -> dict[str, int]:
    """The reasons of `count` numbers of a gap, as they may leave."""
    reasons: dict[str, int] = {}
    for reason, number in share(gap.reasons, count).items():
        word = outgoing_reason(reason)
        reasons[word] = reasons.get(word, 0) + number
    return reasons
