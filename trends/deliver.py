"""Where an answer goes: a table on the screen, standard output, or a file; with progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from trends import export

out = Console(highlight=False)
ROWS_SHOWN = 200


def batches_of(answer: pa.Table) -> Iterator[pa.RecordBatch]:
    if not answer.num_rows:
        yield pa.RecordBatch.from_pylist([], schema=answer.schema)
    yield from answer.to_batches(max_chunksize=16_384)


def note(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


@contextmanager
def working(what: str) -> Iterator[Progress]:
    """Progress on stderr, where a person looks on."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(what, total=None)
        yield progress


def deliver(batches: Iterator[pa.RecordBatch], output: str, out_file: Path | None) -> None:
    with working("asking the tables") as progress:
        first = next(batches, None)

        def seen(rows: int) -> None:
            progress.update(progress.task_ids[0], description=f"{rows:,} rows")

        def everything() -> Iterator[pa.RecordBatch]:
            if first is not None:
                yield first
            yield from batches

        schema = None if first is None else first.schema
        if out_file is not None and schema is not None:
            rows = export.write_file(schema, everything(), out_file, seen)
        elif output != "table" and schema is not None:
            export.write(schema, everything(), output, sys.stdout.buffer, seen)
            sys.stdout.buffer.flush()
            return
        else:
            shown: list[dict[str, Any]] = []
            rows = 0
            for batch in everything():
                rows += batch.num_rows
                shown += (
                    batch.slice(0, ROWS_SHOWN - len(shown)).to_pylist() if len(shown) < ROWS_SHOWN else []
                )
    if out_file is not None:
        out.print(f"{rows} rows written to {out_file}")
        return
    _show(list(schema.names) if schema is not None else [], shown, rows)


def _show(names: list[str], shown: list[dict[str, Any]], rows: int) -> None:
    view = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        view.add_column(name)
    for row in shown:
        view.add_row(*(_text(value) for value in row.values()))
    out.print(view)
    if rows > len(shown):
        out.print(f"... {rows - len(shown)} more rows: use -o csv or --out FILE")


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(export.plain(value))
