"""What the tables hold, column by column."""

from __future__ import annotations

import pyarrow as pa

from edgeward.wire.topics import Lane

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
