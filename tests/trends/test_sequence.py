"""Whatever a network does to the batches, the sink's set is the source's set, each row once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.intervals import clip, contains, missing, runs, size, union
from trends.losses import share
from trends.sequence import MAX_INTERVALS, Settled, decide

SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)).map(lambda at: (at[0], at[0] + at[1])))


@settings(max_examples=200)
@given(SPANS, st.integers(0, 50), st.integers(0, 10))
def test_intervals_are_sets(spans: list[tuple[int, int]], first: int, length: int) -> None:
    known: list[tuple[int, int]] = []
    numbers: set[int] = set()
    for span in spans:
        known = union(known, *span)
        numbers |= set(range(span[0], span[1] + 1))
    assert known == runs(sorted(numbers)) and size(known) == len(numbers)
    asked = set(range(first, first + length + 1))
    assert missing(known, first, first + length) == runs(sorted(asked - numbers))
    assert clip(known, first, first + length) == runs(sorted(asked & numbers))
    assert contains(known, first) == (first in numbers)


@settings(max_examples=150)
@given(st.data())
def test_sink_equals_source_under_loss_duplication_and_reordering(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 60))
    known: Settled | None = None
    stored: list[int] = []
    in_flight: list[tuple[int, int, int]] = []

    def floor() -> int:
        return 0 if known is None else known.expected

    def deliver(batch: tuple[int, int, int]) -> None:
        nonlocal known
        decision = decide(known, *batch)
        for first, last in decision.take:
            stored.extend(range(first, last + 1))
        assert not decision.lost
        known = decision.after

    for _ in range(200):
        if floor() == total:
            break
        step = data.draw(st.sampled_from(["send", "deliver", "drop", "repeat"]))
        if step == "send":
            first = data.draw(st.integers(floor(), total - 1))
            in_flight.append((first, data.draw(st.integers(1, total - first)), floor()))
        elif in_flight:
            index = data.draw(st.integers(0, len(in_flight) - 1))
            batch = in_flight[index] if step == "repeat" else in_flight.pop(index)
            if step != "drop":
                deliver(batch)
    if floor() < total:
        deliver((floor(), total - floor(), floor()))
    assert sorted(stored) == list(range(total))
    assert known == Settled(total)


def test_an_unknown_epoch_starts_at_the_floor() -> None:
    assert decide(None, 5, 3, 5).take == [(5, 7)]
    assert decide(None, 8, 3, 5).after == Settled(5, [(8, 10)]), "fresh rows are taken before the backlog"
    assert decide(None, 4, 3, 5).take == [(5, 6)]


def test_what_the_store_lost_is_named() -> None:
    decision = decide(Settled(3, [(6, 7)]), 10, 5, 10)
    assert (decision.verdict, decision.lost, decision.after) == ("take", [(3, 5), (8, 9)], Settled(15))


def test_overlap_takes_only_the_new_part() -> None:
    decision = decide(Settled(7, [(9, 9)]), 5, 8, 5)
    assert (decision.take, decision.after) == ([(7, 8), (10, 12)], Settled(13))
    assert decide(Settled(9), 5, 4, 5).verdict == "duplicate"


def test_a_device_that_skips_about_grows_no_table_without_end() -> None:
    known = Settled(0)
    for number in range(MAX_INTERVALS):
        known = decide(known, 2 * number + 1, 1, 0).after
    refused = decide(known, 10_001, 1, 0)
    assert refused.verdict == "ahead" and refused.after == known and not refused.take
    assert decide(known, 0, 1, 0).after.expected == 2, "its lowest rows are always taken"


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 50), min_size=1, max_size=5), st.data())
def test_the_share_of_a_loss_is_exact_in_sum(reasons: dict[str, int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, sum(reasons.values())))
    shares = share(reasons, count)
    assert sum(shares.values()) == count
    assert all(1 <= shares[reason] <= reasons[reason] for reason in shares)
