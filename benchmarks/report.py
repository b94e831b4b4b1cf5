"""What every benchmark prints and writes: ours, the limit and the peer of the same run."""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil
from rich.console import Console
from rich.table import Table


class Row(msgspec.Struct, frozen=True):
    """One measured piece of work.

    `ours` is the median of the runs and `spread` their range as a share of it; `limit` is what the
    machine can do without the product, `peer` the best peer's median. `target` says in words what is to
    be reached and `holds` whether it was (None: could not be measured here).
    """

    work: str
    unit: str
    ours: float | None
    limit: float | None = None
    peer: float | None = None
    peer_name: str = ""
    target: str = ""
    spread: float | None = None
    holds: bool | None = None


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """The range as a share of the median."""
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


def arguments(about: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    return parser


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def finish(title: str, rows: Sequence[Row], file: Path | None, notes: Sequence[str] = ()) -> None:
    """Print the table and, with `file`, write `{machine, rows, notes}`."""
    table = Table(title=title)
    for column in ("work", "unit", "ours", "± spread", "limit", "peer", "to reach", "holds"):
        table.add_column(column, justify="right" if column in ("ours", "limit", "± spread") else "left")
    for row in rows:
        peer = f"{_number(row.peer)} {row.peer_name}".strip() if row.peer is not None else "–"
        share = f"{row.spread:.0%}" if row.spread is not None else "–"
        verdict = {True: "yes", False: "NO", None: "–"}[row.holds]
        table.add_row(
            row.work, row.unit, _number(row.ours), share, _number(row.limit), peer, row.target, verdict
        )
    console = Console(width=max(Console().width, 150))
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    if file is not None:
        machine = {
            "python": platform.python_version(),
            "cpus": psutil.cpu_count(),
            "architecture": platform.machine(),
        }
        document = {"title": title, "machine": machine, "rows": list(rows), "notes": list(notes)}
        file.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
