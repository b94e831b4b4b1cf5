"""Whatever a network does to the batches, the sink's set is the source's set, each row once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trends.sequence import decide


@settings(max_examples=100)
@given(st.data())
def test_sink_equals_source_under_loss_duplication_and_reordering(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 60))
    expected: int | None = None
    stored: list[int] = []
    acked = 0
    in_flight: list[tuple[int, int, int]] = []
    for _ in range(200):
        if acked == total:
            break
        step = data.draw(st.sampled_from(["send", "deliver", "drop", "repeat", "forget"]))
        if step == "send":
            first = data.draw(st.integers(acked, total - 1))
            in_flight.append((first, data.draw(st.integers(1, total - first)), acked))
        elif step == "forget" and acked == 0 and not stored:
            expected = None
        elif in_flight:
            index = data.draw(st.integers(0, len(in_flight) - 1))
            batch = in_flight[index] if step == "repeat" else in_flight.pop(index)
            if step == "drop":
                continue
            decision = decide(expected, *batch)
            if decision.verdict == "take":
                first = batch[0] + decision.skip
                stored += range(first, first + decision.take)
            assert decision.lost is None
            expected = decision.expected
            acked = max(acked, expected or 0)
    decision = decide(expected, acked, total - acked, acked) if acked < total else None
    if decision is not None:
        stored += range(acked + decision.skip, acked + decision.skip + decision.take)
    assert stored == list(range(total))


def test_an_unknown_epoch_starts_at_the_floor() -> None:
    assert decide(None, 5, 3, 5).verdict == "take"
    assert decide(None, 8, 3, 5).verdict == "ahead"
    assert decide(None, 4, 3, 5).take == 2


def test_what_the_store_lost_is_named() -> None:
    decision = decide(3, 10, 5, 10)
    assert (decision.verdict, decision.lost, decision.expected) == ("take", (3, 9), 15)


def test_overlap_takes_only_the_new_part() -> None:
    decision = decide(7, 5, 4, 5)
    assert (decision.skip, decision.take, decision.expected) == (2, 2, 9)
    assert decide(9, 5, 4, 5).verdict == "duplicate"
