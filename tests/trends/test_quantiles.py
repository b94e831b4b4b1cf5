"""Quantiles of merged sketches: right, from older tables and rows, and safe from made-up bytes."""

from __future__ import annotations

import struct
from pathlib import Path

import datasketches
import msgspec
import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.wire.rows import TrendRow, decode_rows, encode_rows, join_rows
from trends.columns import to_arrow
from trends.journal import Journal, Stored
from trends.quantiles import MAX_BYTES, read_sketch
from trends.queries.pools import Pool
from trends.query import Queries
from trends.schemas import SCHEMAS
from trends.tables import Tables

START = 1_700_000_000 * 1_000_000 // 3_600_000_000 * 3_600_000_000


def quantiles(parts: list[tuple[int, bytes | None]], at: tuple[float, ...]) -> list[float] | None:
    """None where they are not known."""
    pool = Pool()
    for count, data in parts:
        pool.add(count, data)
    found = [value for value in pool.quantiles(at) if value is not None]
    return found if len(found) == len(at) else None


def sketch(values: np.ndarray) -> bytes:
    made = datasketches.kll_floats_sketch(200)
    made.update(values.astype(np.float32))
    return bytes(made.serialize())


@pytest.mark.parametrize("count", [1, 2, 5, 199, 200, 1000, 100_000])
def test_a_sketch_holds_all_values_by_weight(count: int) -> None:
    weighted = read_sketch(sketch(np.arange(count)))
    assert weighted is not None and sum(weight for _, weight in weighted) == count
    if count < 200:
        assert sorted(weighted) == [(float(value), 1) for value in range(count)]


def test_merged_quantiles_are_those_of_all_values() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=60_000)
    parts = [(len(part), sketch(part)) for part in np.split(np.sort(values), [10, 11, 500, 30_000])]
    got = quantiles(parts, (0.5, 0.95, 0.99))
    assert got is not None
    # Four times the error that datasketches states; how it picks values is random.
    for rank, value in zip((0.5, 0.95, 0.99), got, strict=True):
        assert abs(float((values <= value).mean()) - rank) < 0.055


def test_few_values_are_exact() -> None:
    parts = [(3, sketch(np.array([1.0, 9.0, 3.0]))), (1, sketch(np.array([2.0])))]
    assert quantiles(parts, (0.0, 0.5, 0.75, 0.99, 1.0)) == [1.0, 2.0, 3.0, 9.0, 9.0]


def test_a_part_without_its_sketch_makes_the_quantiles_unknown() -> None:
    good = (2, sketch(np.array([1.0, 2.0])))
    for part in ((1, None), (1, b""), (3, good[1])):
        assert quantiles([good, part], (0.5,)) is None
    assert quantiles([], (0.5,)) is None


GOOD = sketch(np.arange(1000))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD[:-1],
        GOOD[:-4],
        GOOD[:30],
        GOOD[:2] + b"\x07" + GOOD[3:],  # another family
        b"\x07" + GOOD[1:],
        GOOD[:18] + b"\x00" + GOOD[19:],  # no levels
        GOOD[:18] + b"\xff" + GOOD[19:],
        GOOD[:8] + struct.pack("<Q", 999) + GOOD[16:],
        GOOD[:20]
        + struct.pack("<I", 10**9)
        + GOOD[24:],  # levels out of order, and so that the sum is right:
        struct.pack("<BBBBHBBQHBBIIff4f", 5, 1, 15, 0, 200, 8, 0, 6, 200, 2, 0, 2, 0, 0, 1, 1, 2, 3, 4),
        GOOD[:-4] + struct.pack("<f", float("nan")),
        sketch(np.array([1.0]))[:-4] + struct.pack("<f", float("inf")),
        sketch(np.array([1.0]))[:-1],
        # Ends the process in datasketches 5.2.
        bytes.fromhex("05010f00c80008002c01000000000000c891020085000000e900010043a3073afbb47f3f561b033e"),
    ],
)
def test_what_is_no_sketch_is_refused(data: bytes) -> None:
    assert read_sketch(data) is None


def test_a_sketch_of_absurd_size_is_not_read() -> None:
    count = MAX_BYTES // 4
    layout = struct.pack("<BBBBHBBQHBBIff", 5, 1, 15, 0, 200, 8, 0, count, 200, 1, 0, 0, 0, 1)
    assert read_sketch(layout + bytes(4 * count)) is None
    fits = struct.pack("<BBBBHBBQHBBIff", 5, 1, 15, 0, 200, 8, 0, 100, 200, 1, 0, 0, 0, 1)
    assert read_sketch(fits + bytes(400)) is not None


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.integers(0, 40), st.integers(0, 255), max_size=5), st.integers(0, len(GOOD)))
def test_no_bytes_end_the_process(changes: dict[int, int], length: int) -> None:
    data = bytearray(GOOD)
    for place, value in changes.items():
        data[place] = value
    for candidate in (bytes(data), bytes(data[:length])):
        weighted = read_sketch(candidate)
        assert weighted is None or len(weighted) <= MAX_BYTES // 4


def row(index: int, values: np.ndarray, encoded: bytes) -> TrendRow:
    mean = float(values.mean())
    m2 = float(((values - mean) ** 2).sum())
    return TrendRow(START + index * 60_000_000, 60_000_000, "s", 1, "d" * 64, "v", "CPU", "output:score", len(values), 0,
                    mean, m2, float(values.min()), float(values.max()), [], [], encoded)  # fmt: skip


def old_form(row: TrendRow) -> bytes:
    return msgspec.msgpack.encode(list(msgspec.structs.astuple(row))[:-1])


def test_rows_of_older_agents_have_no_sketch_and_older_stores_ignore_it() -> None:
    made = row(0, np.arange(3.0), b"sketch")
    old = zstandard.ZstdCompressor().compress(b"\x91" + old_form(made))
    (got,) = decode_rows("trend", old)
    assert isinstance(got, TrendRow) and got.sketch == b""
    fields = [(name, int if name == "bucket" else object) for name in TrendRow.__struct_fields__[:-1]]
    older = msgspec.defstruct("TrendRow", fields, array_like=True)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=older).bucket == START
    assert decode_rows("trend", encode_rows([made])) == [made]


class Store:
    """A trend store into which rows are put as their journal would hold them."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder / "journal.db")
        self.tables = Tables(folder / "tables", self.journal)
        self.queries = Queries(self.tables, self.journal)
        self._count = 0

    def put(self, *rows: bytes) -> None:
        """Straight into the table, as one commit."""
        first = self._count + 1
        self._count += len(rows)
        stored = [
            Stored(first + i, "north", "turbine-1", "e", first + i, 1, 0, join_rows([data]))
            for i, data in enumerate(rows)
        ]
        opened, _ = self.tables.snapshot("trends")
        self.tables._move("trends", to_arrow("trend", stored), self._count, opened)

    def rollup(self, width: str = "1h") -> list[dict[str, object]]:
        answer: list[dict[str, object]] = self.queries.rollup(
            series="output:score", width=width, group_by=["device"]
        ).to_pylist()
        return answer


def test_a_roll_up_has_quantiles_of_all_buckets(tmp_path: Path) -> None:
    store = Store(tmp_path)
    parts = [np.array([1.0, 2.0]), np.array([10.0]), np.array([3.0, 4.0])]
    store.put(*(msgspec.msgpack.encode(row(i, part, sketch(part))) for i, part in enumerate(parts)))
    (hour,) = store.rollup()
    assert (hour["p50"], hour["p95"], hour["p99"], hour["count"]) == (3.0, 10.0, 10.0, 5)
    assert [minute["p50"] for minute in store.rollup("1m")] == [1.0, 10.0, 3.0]
    assert "parts" not in hour
    nothing = store.queries.rollup(series="output:none", width="1h", group_by=[])
    assert nothing.num_rows == 0 and {"p50", "p95", "p99"} <= set(nothing.column_names)


def test_a_table_of_an_older_store_is_read_and_gets_the_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    part = np.array([1.0, 2.0, 3.0])
    schema = SCHEMAS["trends"]
    with monkeypatch.context() as older:
        older.setitem(SCHEMAS, "trends", schema.remove(schema.get_field_index("sketch")))
        store.put(old_form(row(0, part, b"")))
    opened, _ = store.tables.snapshot("trends")
    assert opened is not None and "sketch" not in opened.to_pyarrow_dataset().schema.names
    (hour,) = store.rollup()
    assert hour["count"] == 3 and hour["p50"] is None
    store.put(msgspec.msgpack.encode(row(1, part, sketch(part))))
    opened, _ = store.tables.snapshot("trends")
    assert opened is not None and opened.to_pyarrow_dataset().schema.field("sketch").type == pa.binary()
    assert [minute["p50"] for minute in store.rollup("1m")] == [None, 2.0]
    (hour,) = store.rollup()
    assert hour["count"] == 6 and hour["p50"] is None, "of half of the values they would mislead"
