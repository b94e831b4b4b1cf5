"""Compare what was produced with what is stored, sample by sample."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pyarrow as pa
from msgspec import Struct

from edgeward.errors import InvalidDocument
from trends.query import Queries


class Produced(Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a produced file: the samples `first_seq .. last_seq` of one sensor epoch."""

    device: str
    stream: str
    epoch: str
    first_seq: int
    last_seq: int


class Verdict(Struct, frozen=True):
    """`stored` counts distinct produced samples found; `duplicated` the rows beyond one for each."""

    produced: int
    stored: int
    lost: int
    duplicated: int


def read_produced(path: Path) -> list[Produced]:
    """Raises InvalidDocument naming file and line."""
    lines: list[Produced] = []
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDocument(f"cannot read it: {error}", source=str(path)) from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                item = msgspec.json.decode(line, type=Produced)
            except msgspec.DecodeError as error:
                raise InvalidDocument(str(error), source=f"{path}:{number}") from None
            if not 0 <= item.first_seq <= item.last_seq:
                raise InvalidDocument("expected 0 <= first_seq <= last_seq", source=f"{path}:{number}")
            lines.append(item)
    return lines


def verify(queries: Queries, produced: list[Produced]) -> Verdict:
    """Every produced sample must be in `results` exactly once."""
    wanted: dict[tuple[str, str, str], set[int]] = {}
    for item in produced:
        numbers = wanted.setdefault((item.device, item.stream, item.epoch), set())
        numbers.update(range(item.first_seq, item.last_seq + 1))
    total = sum(map(len, wanted.values()))
    found: pa.Table = queries.sql(
        "SELECT device, stream, source_epoch, source_seq, count(*) AS n FROM results"
        " WHERE source_seq >= 0 GROUP BY ALL"
    )
    stored = duplicated = 0
    for row in found.to_pylist():
        if row["source_seq"] in wanted.get((row["device"], row["stream"], row["source_epoch"]), ()):
            stored += 1
            duplicated += row["n"] - 1
    return Verdict(total, stored, total - stored, duplicated)
