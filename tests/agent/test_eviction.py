"""Who gives way when there is too much, and how coarse things get."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.outbox.eviction import (
    STRIDES,
    WIDTHS_US,
    Degree,
    DropOldest,
    Merge,
    Tally,
    Thin,
    cut,
    joined,
    mergeable,
    relief,
    step,
    tallies,
    thinned,
)
from agent.outbox.merging import merge
from agent.outbox.rows import event_time
from agent.streams.sketches import Statistics
from edgeward.intervals import runs
from edgeward.wire.lanes import LanePolicy
from edgeward.wire.rows import TrendRow, encode_rows, split_rows
from edgeward.wire.topics import LANES, Lane
from tests.agent.outboxes import EVENT_US, row
from trends.queries.pools import Pool

POLICIES: dict[Lane, LanePolicy] = {
    "alarm": LanePolicy(bytes=100, priority=40),
    "trend": LanePolicy(bytes=100, priority=30),
    "sample": LanePolicy(bytes=100, priority=20),
    "result": LanePolicy(bytes=100, priority=10),
}


def used(**lanes: int) -> dict[Lane, int]:
    return {lane: lanes.get(lane, 0) for lane in LANES}


@pytest.mark.parametrize(
    ("held", "gives_way"),
    [
        (used(result=400), None),  # a lane may use the room of the others
        (used(result=401), "result"),
        (used(result=200, trend=300), "result"),  # both exceed their own budget
        (used(result=90, trend=311), "trend"),  # a lane within its own budget keeps it
        (used(result=50, sample=120, trend=200, alarm=90), "sample"),
        (used(result=50, alarm=500), "result"),  # alarms take the room of the others
        (used(sample=50, trend=30, alarm=500), "sample"),
        (used(trend=30, alarm=500), "trend"),
        (used(alarm=500), "alarm"),  # and only then are lost
    ],
)
def test_the_lane_that_gives_way(held: dict[Lane, int], gives_way: Lane | None) -> None:
    assert relief(held, POLICIES, begun=False) == gives_way


def test_once_begun_it_goes_on_to_a_tenth_below() -> None:
    assert relief(used(result=365), POLICIES, begun=False) is None
    assert relief(used(result=365), POLICIES, begun=True) == "result"
    assert relief(used(result=360), POLICIES, begun=True) is None


@given(st.fixed_dictionaries({lane: st.integers(0, 1000) for lane in LANES}), st.booleans())
def test_alarms_are_lost_only_when_nothing_else_is_left(held: dict[Lane, int], begun: bool) -> None:
    lane = relief(held, POLICIES, begun=begun)
    if lane == "alarm":
        assert not any(size for name, size in held.items() if name != "alarm")
    if lane is not None:
        assert held[lane] > 0


@given(st.lists(st.integers(0, 20_000), unique=True, min_size=1).map(sorted))
def test_each_stride_keeps_every_nth_of_what_the_one_before_kept(numbers: list[int]) -> None:
    kept = set(numbers)
    for stride in STRIDES:
        survivors = kept - set(thinned(sorted(kept), stride))
        assert survivors == {number for number in numbers if number % stride == 0}
        kept = survivors


def test_the_ladders_end_with_the_oldest() -> None:
    assert step("alarm", Degree(), 10)[1] == DropOldest()
    degree = Degree()
    for stride in STRIDES:
        degree, todo = step("result", degree, 10)
        assert todo == Thin(stride, 0)
        degree = Degree(degree.level, 10)
    degree, todo = step("result", degree, 10)
    assert todo == DropOldest()
    assert step("result", degree, 25)[1] == Thin(STRIDES[-1], 10), "new rows first become as coarse"
    degree = Degree()
    for width in WIDTHS_US:
        degree, todo = step("trend", degree, 10)
        assert todo == Merge(width, 0)
        degree = Degree(degree.level, 10)
    assert step("trend", degree, 10)[1] == DropOldest()


# --- the books ------------------------------------------------------------------------------------

RECORDS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from("abc")), max_size=12)


def spread(records: list[tuple[int, int, str]]) -> list[Tally]:
    """Ascending records with holes of `skip - 1` between them."""
    found, at = [], 0
    for skip, length, reason in records:
        first = at + skip - 1
        found.append(Tally(first, first + length - 1, first, first + length, {reason: length}))
        at = first + length
    return found


@given(RECORDS)
def test_joined_records_say_the_same_with_no_neighbours_left(records: list[tuple[int, int, str]]) -> None:
    before = spread(records)
    after = joined(before, None, None)
    numbers = [seq for item in before for seq in range(item.first, item.last + 1)]
    assert [(item.first, item.last) for item in after] == runs(numbers)
    for item in after:
        assert sum(item.reasons.values()) == item.last - item.first + 1
    for reason in "abc":
        assert sum(item.reasons.get(reason, 0) for item in before) == sum(
            item.reasons.get(reason, 0) for item in after
        )


@settings(max_examples=200)
@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 9), min_size=1),
    st.lists(st.integers(0, 40), unique=True).map(sorted),
)
def test_what_is_cut_out_is_all_that_is_missing(reasons: dict[str, int], known: list[int]) -> None:
    total = sum(reasons.values())
    whole = Tally(5, 4 + total, 1, 2, reasons)
    left = cut(whole, runs(known))
    numbers = sorted(set(range(5, 5 + total)) - set(known))
    assert [(item.first, item.last) for item in left] == runs(numbers)
    for item in left:
        assert sum(item.reasons.values()) == item.last - item.first + 1
        assert min(item.reasons.values()) > 0
    for reason, count in reasons.items():
        assert sum(item.reasons.get(reason, 0) for item in left) <= count


def test_losses_know_their_times() -> None:
    records = tallies({3: 30, 4: 20, 5: 0, 9: 90}, "budget")
    assert records == [Tally(3, 5, 20, 30, {"budget": 3}), Tally(9, 9, 90, 90, {"budget": 1})]
    unknown = Tally(6, 8, 0, 0, {"corruption": 3})
    assert records[0] + unknown == Tally(3, 8, 20, 30, {"budget": 3, "corruption": 3})


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("shift", [0, -EVENT_US, -EVENT_US + (1 << 31), -2 * EVENT_US])
def test_the_event_time_is_read_without_decoding(lane: Lane, shift: int) -> None:
    made = row(7, lane)[1]
    at = (made.bucket if isinstance(made, TrendRow) else made.event_time) + shift
    fields = {name: getattr(made, name) for name in made.__struct_fields__}
    changed = type(made)(**{**fields, made.__struct_fields__[0]: at})
    (data,) = split_rows(encode_rows([changed]))
    assert event_time(data) == (at if abs(at) > 65535 else 0)


# --- merged trends --------------------------------------------------------------------------------


def trend(bucket_minute: int, values: list[float], **changes: object) -> TrendRow:
    statistics = Statistics([2.0, 5.0])
    statistics.add(np.array([*values, np.nan]))
    empty = not values
    fields: dict[str, object] = {
        "bucket": bucket_minute * 60_000_000, "width": 60_000_000, "stream": "s", "revision": 1, "digest": "d",
        "variant": "v", "provider": "p", "series": "output:x", "count": statistics.count,
        "missing": statistics.missing, "mean": statistics.mean, "m2": statistics.m2,
        "minimum": 0.0 if empty else statistics.minimum, "maximum": 0.0 if empty else statistics.maximum,
        "edges": [2.0, 5.0], "histogram": statistics.histogram, "sketch": statistics.sketch.encoded(),
    }  # fmt: skip
    return TrendRow(**{**fields, **changes})  # type: ignore[arg-type]


VALUES = st.lists(
    st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: float(np.float32(value))), max_size=20
)


@settings(max_examples=100)
@given(st.lists(VALUES, min_size=1, max_size=6))
def test_a_merged_row_is_the_row_of_all_values(parts: list[list[float]]) -> None:
    merged = merge([trend(61 + index, part) for index, part in enumerate(parts)], WIDTHS_US[0])
    flat = [value for part in parts for value in part]
    whole = trend(60, flat)
    assert (merged.bucket, merged.width) == (60 * 60_000_000, WIDTHS_US[0])
    assert (merged.count, merged.missing) == (len(flat), len(parts))
    assert (merged.minimum, merged.maximum) == (whole.minimum, whole.maximum)
    assert merged.histogram == whole.histogram
    assert merged.mean == pytest.approx(whole.mean, rel=1e-9, abs=1e-6)
    assert merged.m2 == pytest.approx(whole.m2, rel=1e-9, abs=1e-3)
    if flat:
        assert quantiles(merged) == quantiles(whole)


def quantiles(row: TrendRow) -> list[float | None]:
    pool = Pool()
    pool.add(row.count, row.sketch)
    return pool.quantiles((0.0, 0.5, 1.0))


def test_quantiles_of_a_part_are_not_passed_off_as_those_of_the_whole() -> None:
    assert merge([trend(1, [1.0]), trend(2, [2.0], sketch=b"")], WIDTHS_US[0]).sketch == b""


def test_only_rows_of_one_series_one_model_and_one_window_merge() -> None:
    width = WIDTHS_US[0]
    rows = [
        trend(0, [1.0]), trend(9, [2.0]), trend(10, [3.0]), trend(1, [1.0], series="output:y"),
        trend(2, [1.0], digest="e"), trend(3, [1.0], variant="w"), trend(4, [1.0], provider="q"),
        trend(5, [1.0], stream="t"), trend(6, [1.0], revision=2), trend(7, [1.0], edges=[3.0, 5.0]),
        trend(8, [1.0], width=WIDTHS_US[1]),
    ]  # fmt: skip
    groups = mergeable(list(enumerate(rows)), width)
    assert [[seq for seq, _ in group] for group in groups] == [[0, 1]]
