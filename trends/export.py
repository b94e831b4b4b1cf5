"""Answers as CSV, JSON lines, Arrow or Parquet, batch by batch: memory stays that of one batch."""

from __future__ import annotations

import base64
import csv
import datetime
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from edgeward.errors import UsageError

FORMATS = ("csv", "json", "jsonl", "arrow", "parquet")
_BY_SUFFIX = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".arrow": "arrow", ".parquet": "parquet"}


def format_of(path: Path) -> str:
    """By the file's ending. Raises UsageError."""
    if path.suffix not in _BY_SUFFIX:
        raise UsageError(f"cannot tell the format of {path}", hint=f"use {', '.join(_BY_SUFFIX)}")
    return _BY_SUFFIX[path.suffix]


def plain(value: Any) -> Any:
    """A cell as JSON has it: times as ISO 8601 in UTC, bytes as base64, maps as objects."""
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
        return dict(value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if (isinstance(value, float) and value != value) or value in (float("inf"), float("-inf")):
        return str(value)  # JSON has no number for it
    return value


def _cell(value: Any) -> Any:
    value = plain(value)
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def write(
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    form: str,
    sink: IO[bytes],
    seen: Callable[[int], None] = lambda rows: None,
) -> int:
    """Rows written; `seen` is told their number after each batch. Raises OSError."""
    rows = 0
    with _writer(schema, form, sink) as put:
        for batch in batches:
            put(batch)
            rows += batch.num_rows
            seen(rows)
    return rows


@contextmanager
def _writer(schema: pa.Schema, form: str, sink: IO[bytes]) -> Iterator[Callable[[pa.RecordBatch], None]]:
    if form == "arrow":
        with pa.ipc.new_stream(sink, schema) as arrow:
            yield arrow.write_batch
    elif form == "parquet":
        with pq.ParquetWriter(sink, schema, compression="zstd") as parquet:
            yield parquet.write_batch
    elif form == "csv":
        sink.write(_csv_line(schema.names))
        yield lambda batch: _put(
            sink, (_csv_line([_cell(v) for v in row.values()]) for row in batch.to_pylist())
        )
    elif form == "jsonl":
        yield lambda batch: _put(sink, (json.dumps(plain(row)).encode() + b"\n" for row in batch.to_pylist()))
    elif form == "json":
        first = [b"["]

        def put(batch: pa.RecordBatch) -> None:
            for row in batch.to_pylist():
                sink.write(first[0] + b"\n " + json.dumps(plain(row)).encode())
                first[0] = b","

        yield put
        sink.write(b"\n]\n" if first[0] == b"," else b"[]\n")
    else:
        raise UsageError(f"unknown format {form!r}", hint=f"one of {', '.join(FORMATS)}")


def _put(sink: IO[bytes], lines: Iterable[bytes]) -> None:
    sink.writelines(lines)


class _Line:
    """What csv.writer writes to."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text = text


def _csv_line(values: list[Any]) -> bytes:
    line = _Line()
    csv.writer(line).writerow(values)
    return line.text.encode()


def write_file(
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    path: Path,
    seen: Callable[[int], None] = lambda rows: None,
) -> int:
    """To a file whose ending says the format; it appears under its name once it is whole. Raises UsageError."""
    form = format_of(path)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            rows = write(schema, batches, form, file, seen)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {os.strerror(error.errno or 0)}") from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return rows
