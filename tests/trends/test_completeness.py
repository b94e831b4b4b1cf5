"""The store's own account of every number: against counting by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.identifiers import DeviceName
from edgeward.wire.rows import ResultRow, encode_rows
from trends.completeness import Lane, lanes
from trends.journal import Journal
from trends.query import Queries
from trends.tables import Tables

NAME = DeviceName("north", "a")
NOW = 1_790_000_000_000_000
ROW = encode_rows([ResultRow(NOW, "s", 1, "k", "x", 1, "d" * 64, "v", "C", {}, False)])

spans = st.tuples(st.integers(0, 30), st.integers(0, 6)).map(lambda given: (given[0], given[0] + given[1]))


def account(stored: list[int], gaps: list[tuple[int, int]], epochs: tuple[str, ...] = ("e",)) -> list[Lane]:
    with TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal.db")
        tables = Tables(Path(folder) / "tables", journal)
        for epoch in epochs:
            with journal.transaction():
                for seq in stored[::2]:
                    journal.append(NAME, epoch, "result", NOW, seq, 1, ROW)
                for span in gaps:
                    journal.append_gap(NAME, epoch, "result", NOW, span, "budget")
            tables.flush()
            with journal.transaction():
                for seq in stored[1::2]:
                    journal.append(NAME, epoch, "result", NOW, seq, 1, ROW)
        found = lanes(Queries(tables, journal))
        journal.close()
        return found


@settings(max_examples=60)
@given(st.lists(st.integers(0, 30), max_size=40), st.lists(spans, max_size=4))
def test_every_number_is_counted_as_by_hand(stored: list[int], gaps: list[tuple[int, int]]) -> None:
    by_hand = Counter(stored)
    for first, last in gaps:
        by_hand.update(range(first, last + 1))
    found = account(stored, gaps)
    if not by_hand:
        assert found == []
        return
    (lane,) = found
    numbers = range(min(by_hand), max(by_hand) + 1)
    assert (lane.first, lane.last) == (numbers[0], numbers[-1])
    assert lane.stored == len(stored) and lane.in_gaps == sum(last - first + 1 for first, last in gaps)
    assert lane.missing == sum(number not in by_hand for number in numbers)
    assert (lane.twice > 0) == any(times > 1 for times in by_hand.values())


def test_lanes_of_two_epochs_are_two() -> None:
    one, two = account([0, 1, 2, 5], [(3, 4)], ("a", "b"))
    assert (one.epoch, two.epoch) == ("a", "b")
    assert one == Lane("north", "a", "a", "result", 0, 5, 4, 2, 0, 0)


def test_a_row_that_is_also_in_a_gap_is_there_twice() -> None:
    (lane,) = account([0, 1, 2, 3], [(2, 2)])
    assert (lane.missing, lane.twice) == (0, 1)


def test_a_gap_with_several_reasons_is_one_gap() -> None:
    with TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal.db")
        with journal.transaction():
            journal.append_gap(NAME, "e", "result", NOW, (0, 9), "thinned", count=6)
            journal.append_gap(NAME, "e", "result", NOW, (0, 9), "budget", count=4)
            journal.append_gap(NAME, "e", "result", NOW, (10, 19), "budget", count=7)
        (lane,) = lanes(Queries(Tables(Path(folder) / "tables", journal), journal))
        journal.close()
    assert lane == Lane("north", "a", "e", "result", 0, 19, 0, 17, 3, 0)
