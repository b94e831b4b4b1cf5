"""Rows as CloudEvents 1.0: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md. Pure.

The id is the row's key, the same whenever and wherever it is sent: consumers drop repeats by source and id.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import msgspec
import pyarrow as pa

from trends.bridges.bridge import LANES

SPECVERSION = "1.0"
JSON = "application/json"
STRUCTURED = "application/cloudevents+json; charset=UTF-8"

_encode = msgspec.json.Encoder(decimal_format="number").encode
#: What an attribute's text must not hold (spec, "Type System").
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ufdd0-\ufdef]")


@dataclass(frozen=True)
class Event:
    """`attributes` are the context attributes, all texts, `data` the row as JSON."""

    attributes: Mapping[str, str]
    data: Mapping[str, Any]


def plain_rows(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows as JSON has them: times in RFC 3339, maps as objects; bytes and NaN become base64 and null."""
    kinds = {field.name: field.type for field in rows.schema}
    for batch in rows.to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            for name, value in row.items():
                if isinstance(value, datetime.datetime):
                    row[name] = rfc3339(value)
                elif value is not None and pa.types.is_map(kinds[name]):
                    row[name] = dict(value)
            yield row


def rfc3339(at: datetime.datetime) -> str:
    """In UTC with microseconds."""
    return at.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def row_key(table: str, row: Mapping[str, Any]) -> str:
    """`site/device/lane/epoch/seq`: what names a row for ever. Of a gap, its range and reason."""
    lane = LANES.get(table) or f"gap-{row['lane']}"
    if table == "gaps":
        # The reason is text of any length, from a sender: another reason for one range is another gap.
        reason = hashlib.sha256(str(row["reason"]).encode()).hexdigest()[:16]
        number = f"{row['first_seq']}-{row['last_seq']}-{reason}"
    else:
        number = str(row["seq"])
    return f"{row['site']}/{row['device']}/{lane}/{quote(str(row['epoch']), safe='')}/{number}"


def device_of(row: Mapping[str, Any]) -> str:
    return f"{row['site']}/{row['device']}"


def event(table: str, row: Mapping[str, Any]) -> Event:
    """The event of one of `plain_rows`."""
    kind = LANES.get(table, "gap")
    at = row.get("event_time") or row.get("bucket") or row.get("received")
    attributes = {
        "specversion": SPECVERSION,
        "id": row_key(table, row),
        "source": f"/edgeward/{quote(str(row['site']))}/{quote(str(row['device']))}",
        "type": f"edgeward.{kind}.v1",
        "datacontenttype": JSON,
        "dataschema": f"urn:edgeward:schema:{kind}:1",
        "partitionkey": device_of(row),
    }
    if at:
        attributes["time"] = str(at)
    if subject := _FORBIDDEN.sub("\ufffd", str(row.get("stream") or "")):
        attributes["subject"] = subject
    return Event(attributes, row)


def structured(made: Event) -> bytes:
    """JSON event format: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md"""
    return _encode({**made.attributes, "data": made.data})


def data(made: Event) -> bytes:
    """The payload of the binary mode of every protocol."""
    return _encode(made.data)


def kafka_headers(made: Event) -> list[tuple[str, bytes]]:
    """Of the binary mode (Kafka protocol binding, 3.2)."""
    headers = [("content-type", JSON.encode())]
    headers += [
        (f"ce_{name}", value.encode()) for name, value in made.attributes.items() if name != "datacontenttype"
    ]
    return headers


def mqtt_properties(made: Event) -> list[tuple[str, str]]:
    """User properties of the binary mode (MQTT protocol binding, 3.1; MQTT 5.0); the content type is apart."""
    return [(name, value) for name, value in made.attributes.items() if name != "datacontenttype"]


def http_headers(made: Event) -> list[tuple[str, str]]:
    """Of the binary mode (HTTP protocol binding, 3.1)."""
    headers = [("content-type", JSON)]
    headers += [
        (f"ce-{name}", quote(value, safe="!#$&'()*+,/:;<=>?@[\\]^_`{|}~"))
        for name, value in made.attributes.items()
        if name != "datacontenttype"
    ]
    return headers
