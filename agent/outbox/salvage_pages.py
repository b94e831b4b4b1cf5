"""Rows of an outbox whose pages SQLite cannot find its way through any more, read page by page.

A leaf page of the row table holds whole records (SQLite file format, sections 1.6 and 2.1): a page begins with
its type, the number of cells and where each begins; a cell is its length and a record, a record its header of
types and the values. A row counts when the CRC-32 that it carries fits its lane, its number and its data, so
that nothing else in the file can pass for one. Rows longer than a page can hold are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from agent.outbox.rows import check

PAGE = 4096
_INDEX_LEAF, _INDEX_INTERIOR = 0x0A, 0x02
#: The longest record that lies in its page as a whole.
_LOCAL = (PAGE - 12) * 64 // 255 - 23
#: Log file: header, then frames of a header and a page.
_LOG_HEADER, _FRAME_HEADER = 32, 24


class Cell(NamedTuple):
    lane: int
    seq: int
    data: bytes


def rows_in(path: Path, log: Path) -> Iterator[Cell]:
    """Sound rows of the file and of its log, each perhaps more than once, in no order."""
    for page in _pages(path, 0, 0):
        yield from rows_in_page(page)
    if log.exists():
        for page in _pages(log, _LOG_HEADER, _FRAME_HEADER):
            yield from rows_in_page(page)


def _pages(path: Path, skip: int, between: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(skip)
        while len(raw := file.read(between + PAGE)) == between + PAGE:
            yield raw[between:]


def rows_in_page(page: bytes) -> Iterator[Cell]:
    kind = page[0]
    if kind not in (_INDEX_LEAF, _INDEX_INTERIOR):
        return
    header = 12 if kind == _INDEX_INTERIOR else 8
    child = header - 8
    for number in range(min(int.from_bytes(page[3:5], "big"), (PAGE - header) // 2)):
        at = header + 2 * number
        start = int.from_bytes(page[at : at + 2], "big") + child
        try:
            cell = _record(page, start)
        except (IndexError, ValueError):
            continue
        if cell is not None:
            yield cell


def _varint(page: bytes, at: int) -> tuple[int, int]:
    value = 0
    for number in range(8):
        byte = page[at + number]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + number + 1
    return value << 8 | page[at + 8], at + 9


def _record(page: bytes, at: int) -> Cell | None:
    """The row (lane, seq, born, crc, data, sent) in the cell at `at`; None when it is no sound one."""
    length, at = _varint(page, at)
    if length > _LOCAL:
        return None
    head, types = at, []
    header, at = _varint(page, at)
    while at < head + header:
        kind, at = _varint(page, at)
        types.append(kind)
    if len(types) != 6:
        return None
    values: list[int | bytes] = []
    for kind in types:
        if kind in (8, 9):
            values.append(kind - 8)
            continue
        blob = kind >= 12 and kind % 2 == 0
        size = (kind - 12) // 2 if blob else {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}.get(kind, -1)
        raw = page[at : at + size]
        if size < 0 or len(raw) != size:
            return None
        values.append(raw if blob else int.from_bytes(raw, "big", signed=True))
        at += size
    lane, seq, _, crc, data, _ = values
    if (
        isinstance(lane, int)
        and isinstance(seq, int)
        and isinstance(data, bytes)
        and check(lane, seq, data) == crc
    ):
        return Cell(lane, seq, data)
    return None
