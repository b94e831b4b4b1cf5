"""Rows as CloudEvents 1.0: what the specification asks of attributes, for whatever a row holds."""

from __future__ import annotations

import base64
import datetime
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from tests.trends.bridges.filled import Filled
from trends.bridges import cloudevents
from trends.bridges.cloudevents import event, plain_rows, rfc3339, row_key
from trends.bridges.feed import Position
from trends.schemas import SCHEMAS

labels = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,8}[a-z0-9])?", fullmatch=True)
epochs = st.text(min_size=1, max_size=20).filter(str.isprintable)
texts = st.text(max_size=30)
times = st.datetimes(
    datetime.datetime(2000, 1, 1), datetime.datetime(2100, 1, 1), timezones=st.just(datetime.UTC)
)
tables = st.sampled_from([*SCHEMAS])


@st.composite
def rows(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    table = draw(tables)
    row: dict[str, Any] = {"site": draw(labels), "device": draw(labels), "epoch": draw(epochs)}
    at = rfc3339(draw(times))
    if table == "gaps":
        row |= {"lane": draw(st.sampled_from(["result", "alarm"])), "reason": draw(texts), "received": at}
        row |= {"first_seq": draw(st.integers(0, 9)), "last_seq": draw(st.integers(0, 9))}
    else:
        row |= {"seq": draw(st.integers(0, 1 << 60)), "stream": draw(texts)}
        row["bucket" if table == "trends" else "event_time"] = at
    return table, row


# Spec, "Attribute Naming Convention" and "Required Attributes".
NAME = re.compile(r"[a-z0-9]{1,20}")
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


@given(rows())
def test_attributes_are_those_of_the_specification(made: tuple[str, dict[str, Any]]) -> None:
    table, row = made
    attributes = event(table, row).attributes
    assert {"specversion", "id", "source", "type", "time", "dataschema"} <= set(attributes)
    assert attributes["specversion"] == "1.0"
    for name, value in attributes.items():
        assert NAME.fullmatch(name) and value
        assert not re.search("[\x00-\x1f\x7f-\x9f\ufdd0-\ufdef]", value)
        value.encode()
    assert RFC3339.fullmatch(attributes["time"])
    assert urlsplit(attributes["dataschema"]).scheme and urlsplit(attributes["source"]).path
    assert attributes["source"].isascii() and " " not in attributes["source"]


@given(rows(), rows())
def test_an_id_is_of_one_row_only(one: tuple[str, dict[str, Any]], two: tuple[str, dict[str, Any]]) -> None:
    def key(made: tuple[str, dict[str, Any]]) -> tuple[Any, ...]:
        table, row = made
        names = ("site", "device", "epoch", "seq", "lane", "first_seq", "last_seq", "reason")
        return (table, *(row.get(name) for name in names))

    same = event(*one).attributes["id"] == event(*two).attributes["id"]
    assert same == (key(one) == key(two))


def test_ids_of_epochs_with_slashes_differ() -> None:
    base = {"site": "s", "device": "d"}
    assert row_key("results", {**base, "epoch": "e/1", "seq": 2}) != row_key(
        "results", {**base, "epoch": "e", "seq": "1/2"}
    )


@given(rows())
def test_both_modes_say_the_same(made: tuple[str, dict[str, Any]]) -> None:
    built = event(*made)
    whole = json.loads(cloudevents.structured(built))
    data = whole.pop("data")
    assert json.loads(cloudevents.data(built)) == data == json.loads(json.dumps(made[1]))
    kafka = dict(cloudevents.kafka_headers(built))
    assert kafka.pop("content-type") == b"application/json" == whole.pop("datacontenttype").encode()
    assert {name.removeprefix("ce_"): value.decode() for name, value in kafka.items()} == whole
    assert dict(cloudevents.mqtt_properties(built)) == whole
    http = dict(cloudevents.http_headers(built))
    del http["content-type"]
    for value in http.values():
        assert value.isascii() and not re.search(r'[\x00-\x20"\x7f]', value)
    assert {name.removeprefix("ce-"): unquote(value) for name, value in http.items()} == whole


def test_rows_of_a_store_become_events(tmp_path: Path) -> None:
    filled = Filled(tmp_path)
    for lane in ("result", "alarm", "trend", "sample"):
        filled.commit(3, lane=lane)  # type: ignore[arg-type]
    filled.lose(3, 5)
    ids = []
    for table in SCHEMAS:
        for batch in filled.feed(table).batches(Position(), 100):
            for row in plain_rows(batch.rows):
                built = event(table, row)
                ids.append(built.attributes["id"])
                data = json.loads(cloudevents.structured(built))["data"]
                assert set(data) == set(SCHEMAS[table].names)
                if table == "trends":
                    assert base64.b64decode(data["sketch"]) == b"\x00\xff"
                    assert built.attributes["time"] == data["bucket"]
    assert len(ids) == len(set(ids)) == 13
    filled.close()


def test_what_json_lacks_becomes_null() -> None:
    kind = pa.map_(pa.string(), pa.float64())
    table = pa.table(
        {"a": [float("nan")], "m": pa.array([[("x", float("inf")), ("y", 1.0)]], kind), "n": [None]}
    )
    (row,) = plain_rows(table)
    assert json.loads(cloudevents._encode(row)) == {"a": None, "m": {"x": None, "y": 1.0}, "n": None}


@given(times, st.integers(-12, 12))
def test_a_time_is_the_same_moment_in_utc(at: datetime.datetime, hours: int) -> None:
    zoned = at.astimezone(datetime.timezone(datetime.timedelta(hours=hours)))
    assert datetime.datetime.fromisoformat(rfc3339(zoned)) == at
