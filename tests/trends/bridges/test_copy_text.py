"""What COPY reads is what the row held, whatever it held."""

from __future__ import annotations

import csv
import io
import json
import math

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from trends.bridges.copy_text import copy_csv

texts = st.one_of(
    st.none(), st.text(max_size=12), st.sampled_from(["", '"', "a,b", "\n", "\\x", "\0", "NULL"])
)
maps = st.one_of(
    st.none(),
    st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), max_size=4),
)


@given(
    st.lists(
        st.tuples(texts, maps, st.one_of(st.none(), st.floats()), st.one_of(st.none(), st.binary(max_size=6)))
    )
)
def test_a_table_is_read_back(
    rows: list[tuple[str | None, dict[str, float] | None, float | None, bytes | None]],
) -> None:
    kinds = [pa.string(), pa.map_(pa.string(), pa.float64()), pa.float64(), pa.binary()]
    columns = [
        pa.array([list(value.items()) if isinstance(value, dict) else value for value in column], kind)
        for column, kind in zip(zip(*rows, strict=True) if rows else [[], [], [], []], kinds, strict=True)
    ]
    table = pa.table(columns, names=["t", "m", "f", "b"])
    # A slice, too: its maps begin in the middle of their buffers.
    for part, expected in ((table, rows), (table.slice(len(rows) // 2), rows[len(rows) // 2 :])):
        found = list(csv.reader(io.StringIO(copy_csv(part).decode(), newline="")))
        assert len(found) == len(expected)
        for (text, numbers, number, raw), (t, m, f, b) in zip(found, expected, strict=True):
            assert text == (t or "").replace("\0", "\ufffd")
            assert m is None or json.loads(numbers) == {
                name.replace("\0", "\ufffd"): value for name, value in m.items()
            }
            assert f is None or float(number) == f or (math.isnan(f) and math.isnan(float(number)))
            assert raw == ("" if b is None else f"\\x{b.hex()}")


def test_null_and_an_empty_text_differ() -> None:
    assert copy_csv(pa.table({"a": ["", None]})) == b'""\n\n'


def test_lists_are_array_literals() -> None:
    assert copy_csv(pa.table({"a": [[1.5, None, 2.0], []]})) == b'"{1.5,NULL,2.0}"\n"{}"\n'
