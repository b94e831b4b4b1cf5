"""Rows as columns, and the quick look at whole batches: each against the plain way, row by row."""

from __future__ import annotations

import datetime
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.identifiers import DeviceName
from edgeward.wire.rows import EARLIEST_US, AlarmRow, ResultRow, Row, SampleRow, TrendRow, encode_rows
from edgeward.wire.topics import Lane
from trends.checks import check_row, suspicious
from trends.columns import to_arrow
from trends.journal import Journal, Stored
from trends.schemas import SCHEMAS, TABLE_OF

NOW = 1_790_000_000_000_000

times = st.integers(EARLIEST_US, NOW)
texts = st.text(max_size=5)
numbers = st.floats(allow_nan=False, allow_infinity=False)
named = st.dictionaries(texts, numbers, max_size=3)
model = (texts, texts, texts)
ROWS: dict[Lane, st.SearchStrategy[Row]] = {
    "result": st.builds(
        ResultRow, times, texts, st.integers(0, 9), texts, texts, st.integers(-1, 99), *model, named, st.booleans()
    ),
    "alarm": st.builds(
        AlarmRow, times, texts, st.integers(0, 9), texts, texts, st.integers(-1, 99), *model, numbers, numbers
    ),
    "sample": st.builds(SampleRow, times, texts, st.integers(0, 9), texts, texts, st.integers(-1, 99), named),
    "trend": st.builds(
        TrendRow, times, st.integers(1, 10**9), texts, st.integers(0, 9), *model, texts, st.integers(0, 99),
        st.integers(0, 99), numbers, numbers, numbers, numbers, st.lists(numbers, max_size=3),
        st.lists(st.integers(0, 99), max_size=3), st.binary(max_size=9),
    ),
}  # fmt: skip
lanes = st.sampled_from(list(ROWS))
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def at(micros: int) -> datetime.datetime:
    return EPOCH + datetime.timedelta(microseconds=micros)


@given(st.data(), lanes, st.integers(1, 12))
def test_columns_hold_what_the_rows_held(data: st.DataObject, lane: Lane, at_once: int) -> None:
    batches = data.draw(st.lists(st.lists(ROWS[lane], min_size=1, max_size=4), max_size=3))
    stored = [
        Stored(index, f"site{index % 2}", "d", "e", 10 * index, len(rows), NOW + index, encode_rows(rows))
        for index, rows in enumerate(batches)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trends.columns.SLICE_ROWS", at_once)
        table = to_arrow(lane, stored)
    assert table.schema == SCHEMAS[TABLE_OF[lane]]
    found = table.to_pylist(maps_as_pydicts="strict")
    expected = []
    for entry, rows in zip(stored, batches, strict=True):
        for index, row in enumerate(rows):
            fields: dict[str, Any] = msgspec.structs.asdict(row)
            when = "bucket" if lane == "trend" else "event_time"
            fields["date"] = at(fields[when]).date().isoformat()
            fields[when] = at(fields[when])
            expected.append(
                {
                    **fields,
                    "site": entry.site, "device": "d", "epoch": "e", "seq": entry.first_seq + index,
                    "received": at(entry.received),
                }
            )  # fmt: skip
    assert found == expected


hostile_text = st.one_of(texts, st.just("x" * 257), st.just("x" * 256))
hostile_int = st.one_of(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, 3))
hostile_number = st.one_of(st.floats(), st.sampled_from([1e308, -1e308, 0.0]))
hostile_named = st.dictionaries(hostile_text, hostile_number, max_size=3)
HOSTILE: dict[Lane, st.SearchStrategy[Row]] = {
    "result": st.builds(
        ResultRow, st.one_of(times, hostile_int), hostile_text, hostile_int, texts, texts, hostile_int, *model,
        hostile_named, st.booleans(),
    ),
    "alarm": st.builds(
        AlarmRow, times, texts, hostile_int, texts, texts, hostile_int, *model, hostile_number, hostile_number
    ),
    "sample": st.builds(SampleRow, times, texts, hostile_int, texts, texts, hostile_int, hostile_named),
    "trend": st.builds(
        TrendRow, st.one_of(times, hostile_int), hostile_int, texts, hostile_int, *model, hostile_text,
        hostile_int, hostile_int, hostile_number, numbers, numbers, numbers, st.lists(hostile_number, max_size=3),
        st.lists(hostile_int, max_size=3), st.sampled_from([b"", b"x" * 65_536, b"x" * 65_537]),
    ),
}  # fmt: skip


@given(st.data(), lanes)
def test_what_one_row_is_refused_for_is_seen_in_the_whole_batch(data: st.DataObject, lane: Lane) -> None:
    rows = data.draw(st.lists(st.one_of(ROWS[lane], HOSTILE[lane]), max_size=5))
    if any(check_row(row, NOW) for row in rows):
        assert suspicious(lane, rows, NOW)


@given(st.data(), lanes)
def test_good_rows_need_no_second_look(data: st.DataObject, lane: Lane) -> None:
    small = st.floats(-1e9, 1e9)
    row = data.draw(ROWS[lane])
    plain = {
        field: data.draw(small)
        if isinstance(value, float)
        else {"a": 1.0}
        if isinstance(value, dict)
        else value
        for field, value in msgspec.structs.asdict(row).items()
    }
    if lane == "trend":
        plain["edges"] = [1.0]
    assert not suspicious(lane, [type(row)(**plain)], NOW)


def test_rows_of_a_journal_of_before_go_on_under_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    old = sqlite3.connect(path)
    old.execute(
        "CREATE TABLE journal (id INTEGER PRIMARY KEY AUTOINCREMENT, site TEXT, device TEXT, epoch TEXT,"
        " lane TEXT, seq INTEGER, received INTEGER, row BLOB NOT NULL)"
    )
    row = ResultRow(NOW, "s", 1, "k", "e", 7, "d", "v", "C", {"y": 0.5}, True)
    for seq in range(5):
        old.execute(
            "INSERT INTO journal (site, device, epoch, lane, seq, received, row) VALUES ('n','a','e','result',?,?,?)",
            (seq, NOW, msgspec.msgpack.encode(row)),
        )
    old.execute("DELETE FROM journal WHERE id <= 2")
    old.commit()
    old.close()
    for _ in range(2):  # the second time there is nothing left to take over
        journal = Journal(path)
        stored = journal.waiting("result", 100)
        assert [(entry.id, entry.first_seq, entry.count) for entry in stored] == [
            (3, 2, 1),
            (4, 3, 1),
            (5, 4, 1),
        ]
        assert to_arrow("result", stored).column("source_seq").to_pylist() == [7, 7, 7]
        journal.close()
    journal = Journal(path)
    journal.forget_rows("result", 5)
    with journal.transaction():
        journal.append(DeviceName("n", "a"), "e", "result", NOW, 5, 1, encode_rows([row]))
    assert journal.waiting("result", 1)[0].id == 6, "a table knows ids up to 5 already"
    journal.close()


@pytest.mark.parametrize(("limit", "sizes"), [(1, [2, 2, 2]), (3, [2, 2, 2]), (4, [4, 2]), (100, [6])])
def test_entries_are_moved_in_parts_of_about_the_limit(tmp_path: Path, limit: int, sizes: list[int]) -> None:
    journal = Journal(tmp_path / "journal.db")
    row = ResultRow(NOW, "s", 1, "k", "e", 7, "d", "v", "C", {}, True)
    with journal.transaction():
        for first in (0, 2, 4):
            journal.append(DeviceName("n", "a"), "e", "result", NOW, first, 2, encode_rows([row] * 2))
    assert journal.count() == 6
    last, found = 0, []
    while stored := journal.waiting("result", limit, last):
        found.append(sum(entry.count for entry in stored))
        last = stored[-1].id
    assert found == sizes
    journal.close()
