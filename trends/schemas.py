"""What the tables hold, column by column, and journal rows in that form. Pure."""

from __future__ import annotations

import datetime
from typing import Any

import msgspec
import pyarrow as pa

from edgeward.wire.rows import ROW_TYPES, AlarmRow, ResultRow, SampleRow, TrendRow
from edgeward.wire.topics import Lane
from trends.journal import GapRow, Stored

_TIME = pa.timestamp("us", tz="UTC")
_NUMBERS = pa.map_(pa.string(), pa.float64())

_ORIGIN = [
    ("date", pa.string()),
    ("site", pa.string()),
    ("device", pa.string()),
    ("epoch", pa.string()),
    ("seq", pa.int64()),
    ("received", _TIME),
]
_LINEAGE = [
    ("stream", pa.string()),
    ("revision", pa.int64()),
]
_MODEL = [("digest", pa.string()), ("variant", pa.string()), ("provider", pa.string())]
_SOURCE = [("key", pa.string()), ("source_epoch", pa.string()), ("source_seq", pa.int64())]

SCHEMAS: dict[str, pa.Schema] = {
    "results": pa.schema(
        [*_ORIGIN, ("event_time", _TIME), *_LINEAGE, *_SOURCE, *_MODEL, ("outputs", _NUMBERS), ("alarm", pa.bool_())]
    ),
    "alarms": pa.schema(
        [*_ORIGIN, ("event_time", _TIME), *_LINEAGE, *_SOURCE, *_MODEL, ("value", pa.float64()), ("threshold", pa.float64())]
    ),
    "samples": pa.schema([*_ORIGIN, ("event_time", _TIME), *_LINEAGE, *_SOURCE, ("values", _NUMBERS)]),
    "trends": pa.schema(
        [
            *_ORIGIN, ("bucket", _TIME), ("width", pa.int64()), *_LINEAGE, *_MODEL, ("series", pa.string()),
            ("count", pa.int64()), ("missing", pa.int64()), ("mean", pa.float64()), ("m2", pa.float64()),
            ("minimum", pa.float64()), ("maximum", pa.float64()),
            ("edges", pa.list_(pa.float64())), ("histogram", pa.list_(pa.int64())),
            ("sketch", pa.binary()),
        ]
    ),
    "gaps": pa.schema(
        [
            ("site", pa.string()), ("device", pa.string()), ("epoch", pa.string()), ("lane", pa.string()),
            ("first_seq", pa.int64()), ("last_seq", pa.int64()), ("reason", pa.string()),
            ("first_event_time", _TIME), ("last_event_time", _TIME), ("received", _TIME),
            ("count", pa.int64()),
        ]
    ),
}  # fmt: skip

TABLE_OF: dict[Lane, str] = {"result": "results", "alarm": "alarms", "trend": "trends", "sample": "samples"}
PARTITIONS = {"results": ["date"], "alarms": ["date"], "trends": ["date"], "samples": ["date"], "gaps": []}
_DAY_US = 86_400_000_000


def _date(event_time: int) -> str:
    """The UTC day of a time in microseconds since 1970, as YYYY-MM-DD."""
    day = datetime.date(1970, 1, 1) + datetime.timedelta(days=event_time // _DAY_US)
    return day.isoformat()


def to_arrow(lane: Lane, stored: list[Stored]) -> pa.Table:
    """Journal rows as the Arrow table of their lane."""
    schema = SCHEMAS[TABLE_OF[lane]]
    decode = msgspec.msgpack.Decoder(ROW_TYPES[lane]).decode
    rows: list[Any] = [decode(item.row) for item in stored]
    times = [row.bucket if isinstance(row, TrendRow) else row.event_time for row in rows]
    days: dict[int, str] = {}
    columns: dict[str, list[Any]] = {
        "date": [days.get(at // _DAY_US) or days.setdefault(at // _DAY_US, _date(at)) for at in times],
        "site": [item.site for item in stored],
        "device": [item.device for item in stored],
        "epoch": [item.epoch for item in stored],
        "seq": [item.seq for item in stored],
        "received": [item.received for item in stored],
    }
    kind: type[ResultRow | AlarmRow | SampleRow | TrendRow] = ROW_TYPES[lane]
    for field in kind.__struct_fields__:
        values = [getattr(row, field) for row in rows]
        if values and isinstance(values[0], dict):
            values = [list(value.items()) for value in values]
        columns[field] = values
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def gaps_to_arrow(gaps: list[GapRow]) -> pa.Table:
    schema = SCHEMAS["gaps"]
    return pa.table(
        [pa.array([getattr(gap, field.name) for gap in gaps], field.type) for field in schema], schema=schema
    )
