"""Journal entries as the Arrow tables of their lane: rows in, columns out. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec.structs import astuple

from edgeward.wire.rows import ROW_TYPES, Row, decode_rows
from edgeward.wire.topics import Lane
from trends.journal import GapRow, Stored
from trends.schemas import SCHEMAS, TABLE_OF

_DAY_US = 86_400_000_000


#: Rows that exist as objects at once: they take ten times the memory of their columns.
SLICE_ROWS = 10_000


def to_arrow(lane: Lane, stored: Sequence[Stored]) -> pa.Table:
    """Raises InvalidDocument when an entry is not what it was when it was written."""
    parts = [_part(lane, entries) for entries in _slices(stored)]
    return pa.concat_tables(parts) if parts else SCHEMAS[TABLE_OF[lane]].empty_table()


def _slices(stored: Sequence[Stored]) -> Iterator[Sequence[Stored]]:
    begin = rows = 0
    for at, entry in enumerate(stored):
        if rows + entry.count > SLICE_ROWS and at > begin:
            yield stored[begin:at]
            begin, rows = at, 0
        rows += entry.count
    if begin < len(stored):
        yield stored[begin:]


def _part(lane: Lane, stored: Sequence[Stored]) -> pa.Table:
    schema = SCHEMAS[TABLE_OF[lane]]
    names = ROW_TYPES[lane].__struct_fields__
    values: dict[str, list[Any]] = {name: [] for name in names}
    for entry in stored:
        # Entry by entry, while its rows are in the processor's cache.
        rows = decode_rows(lane, entry.rows)
        for column, found in zip(values.values(), zip(*map(astuple, rows), strict=True), strict=bool(rows)):
            column += found
    counts = np.array([entry.count for entry in stored], np.int64)
    columns: dict[str, pa.Array] = {
        field.name: _column(values[field.name], field.type) for field in schema if field.name in names
    }
    times = columns["bucket" if lane == "trend" else "event_time"]
    columns["date"] = _days(times.cast(pa.int64()).to_numpy())
    for name in ("site", "device", "epoch"):
        columns[name] = _repeated([getattr(entry, name) for entry in stored], counts)
    first = np.repeat(np.array([entry.first_seq for entry in stored], np.int64), counts)
    columns["seq"] = pa.array(first + _within(counts))
    received = np.repeat(np.array([entry.received for entry in stored], np.int64), counts)
    columns["received"] = pa.array(received).cast(schema.field("received").type)
    return pa.table([columns[field.name] for field in schema], schema=schema)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if isinstance(kind, pa.MapType):
        return _maps(values, kind)
    return pa.array(values, kind)


def _maps(values: list[dict[str, float]], kind: pa.MapType) -> pa.Array:
    """Several times faster than from lists of pairs."""
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    keys = list(chain.from_iterable(values))
    numbers = np.fromiter(chain.from_iterable(map(_items, values)), np.float64, len(keys))
    return pa.MapArray.from_arrays(offsets, pa.array(keys, kind.key_type), pa.array(numbers))


_items: Callable[[dict[str, float]], Any] = dict.values


def _within(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... anew for each entry of so many rows."""
    ends = np.cumsum(counts)
    within: np.ndarray = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return within


def _repeated(values: list[str], counts: np.ndarray) -> pa.Array:
    known = {value: at for at, value in enumerate(dict.fromkeys(values))}
    indices = np.repeat(np.array([known[value] for value in values], np.int32), counts)
    return pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(list(known), pa.string())).cast(
        pa.string()
    )


def _days(times: np.ndarray) -> pa.Array:
    """The UTC days of times in microseconds since 1970, as YYYY-MM-DD."""
    days, indices = np.unique(times // _DAY_US, return_inverse=True)
    names = np.datetime_as_string(days.astype("datetime64[D]"))
    return pa.DictionaryArray.from_arrays(
        pa.array(indices.astype(np.int32)), pa.array(names.tolist(), pa.string())
    ).cast(pa.string())


def gaps_to_arrow(gaps: list[GapRow]) -> pa.Table:
    schema = SCHEMAS["gaps"]
    return pa.table(
        [pa.array([getattr(gap, field.name) for gap in gaps], field.type) for field in schema], schema=schema
    )


def from_arrow(lane: Lane, table: pa.Table) -> list[Row]:
    """The rows that `to_arrow` was given, from a table with their columns; what an older store left out is
    as an older agent left it out."""
    kind = ROW_TYPES[lane]
    names = kind.__struct_fields__
    defaults = dict(
        zip(names[len(names) - len(kind.__struct_defaults__) :], kind.__struct_defaults__, strict=True)
    )
    columns: list[list[Any]] = []
    for name in names:
        if name not in table.schema.names:
            columns.append([defaults[name]] * table.num_rows)
            continue
        column = table.column(name)
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("us", column.type.tz)).cast(pa.int64())
        values = column.to_pylist(maps_as_pydicts="strict")
        if name in defaults:
            values = [defaults[name] if value is None else value for value in values]
        columns.append(values)
    return [kind(*values) for values in zip(*columns, strict=True)]
