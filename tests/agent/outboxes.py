"""What the tests of the outbox share: rows, and what is in it."""

from __future__ import annotations

from pathlib import Path

from agent.outbox.outbox import Outbox
from edgeward.clock import Clock, ManualClock
from edgeward.intervals import Interval
from edgeward.wire.rows import AlarmRow, ResultRow, Row, SampleRow, TrendRow
from edgeward.wire.topics import Lane

EVENT_US = 1_700_000_000_000_000


def row(seq: int, lane: Lane = "result") -> tuple[Lane, Row]:
    at = EVENT_US + seq * 1_000_000
    rows: dict[Lane, Row] = {
        "result": ResultRow(at, "s", 1, "", "e", seq, "d", "v", "p", {"score": 0.5}, False),
        "alarm": AlarmRow(at, "s", 1, "", "e", seq, "d", "v", "p", 0.9, 0.5),
        "sample": SampleRow(at, "s", 1, "", "e", seq, {"x": 1.0}),
        "trend": TrendRow(
            EVENT_US // 60_000_000 * 60_000_000 + seq * 60_000_000, 60_000_000, "s", 1, "d", "v", "p", "output:score",
            1, 0, float(seq), 0.0, float(seq), float(seq), [], [],
        ),
    }  # fmt: skip
    return lane, rows[lane]


def open_outbox(folder: Path, clock: Clock | None = None, **named: object) -> Outbox:
    return Outbox(folder / "outbox.db", clock or ManualClock(), **named)  # type: ignore[arg-type]


def rows_of(outbox: Outbox, lane: Lane, epoch: str = "") -> list[bytes]:
    """All rows that wait in a lane of an epoch (the present one), in order."""
    return [data for _, data in contents(outbox, lane, epoch)[0]]


def contents(
    outbox: Outbox, lane: Lane, epoch: str = ""
) -> tuple[list[tuple[int, bytes]], list[tuple[int, int, dict[str, int]]]]:
    """Numbered rows, and lost ranges with their reasons, as an uplink would see them."""
    rows: list[tuple[int, bytes]] = []
    lost: list[tuple[int, int, dict[str, int]]] = []
    at = 0
    while part := outbox.read(
        epoch or outbox.epoch, lane, at, rows=10_000, size=1 << 40, below=1 << 60, sending=False
    ):
        gone: list[Interval] = [(item.first_seq, item.last_seq) for item in part.lost]
        lost += [(item.first_seq, item.last_seq, item.reasons) for item in part.lost]
        numbers = [
            seq
            for seq in range(part.first, part.first + part.count)
            if not any(first <= seq <= last for first, last in gone)
        ]
        rows += zip(numbers, part.rows, strict=True)
        at = part.first + part.count
    return rows, lost
