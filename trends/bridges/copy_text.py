"""Rows as PostgreSQL's COPY reads them in its CSV format, column by column. Pure."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

_encode = msgspec.json.Encoder().encode


def copy_csv(rows: pa.Table) -> bytes:
    """All rows; a null is an empty field, an empty text a quoted one. Times are in UTC, without a zone.

    PostgreSQL's texts take no NUL: it becomes U+FFFD.
    """
    whole = rows.combine_chunks()
    columns = [_column(whole.column(at)) for at in range(whole.num_columns)]
    written = io.BytesIO()
    options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="all_valid")
    pyarrow.csv.write_csv(pa.table(columns, names=whole.column_names), written, options)
    return written.getvalue()


def _column(column: pa.ChunkedArray) -> Any:
    kind = column.type
    if pa.types.is_string(kind):
        return _without_nul(column)
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return column
    if pa.types.is_timestamp(kind):
        return column.cast(pa.timestamp("us")).cast(pa.string())
    if pa.types.is_map(kind) and pa.types.is_string(kind.key_type):
        return _maps(pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], kind))
    return _without_nul(pa.array([_text(value) for value in column.to_pylist()], pa.string()))


def _without_nul(texts: Any) -> Any:
    return pc.replace_substring(texts, "\0", "\ufffd")


def _maps(maps: pa.MapArray) -> pa.Array:
    """As JSON objects; several times faster than from lists of pairs."""
    names = _without_nul(maps.keys).to_pylist()
    values = maps.items.to_pylist()
    offsets = maps.offsets.to_pylist()
    there = maps.is_valid().to_pylist()
    return pa.array(
        [
            _encode(dict(zip(names[start:end], values[start:end], strict=True))).decode() if valid else None
            for start, end, valid in zip(offsets, offsets[1:], there, strict=False)
        ],
        pa.string(),
    )


def _text(value: Any) -> str | None:
    """A list as an array literal, bytes in hex, a struct as JSON, whatever else as it is printed."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return f"\\x{value.hex()}"
    if isinstance(value, list):
        return "{" + ",".join("NULL" if item is None else repr(item) for item in value) + "}"
    if isinstance(value, dict):
        return _encode(value).decode()
    return str(value)
