"""Who may download, for how long, which part, and when the others come again: decided without I/O."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.api.ranges import Part, Unsatisfiable, part_of
from controller.downloads import RETRY_MAX, Busy, Downloads, Limits, Pace, reserved_seconds, retry_after
from edgeward.clock import ManualClock

ETAG = '"abc"'


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        (None, Part(0, 10, 10, False)),
        ("bytes=0-", Part(0, 10, 10, True)),
        ("bytes=3-", Part(3, 10, 10, True)),
        ("bytes=3-3", Part(3, 4, 10, True)),
        ("bytes=3-99", Part(3, 10, 10, True)),
        ("Bytes=-4", Part(6, 10, 10, True)),
        ("bytes=-99", Part(0, 10, 10, True)),
        ("bytes=9-", Part(9, 10, 10, True)),
        # ignored, RFC 9110 14.2: the answer is the whole file
        ("bytes=5-3", Part(0, 10, 10, False)),
        ("bytes=1-2,4-5", Part(0, 10, 10, False)),
        ("bytes=", Part(0, 10, 10, False)),
        ("bytes=-", Part(0, 10, 10, False)),
        ("lines=1-2", Part(0, 10, 10, False)),
        ("bytes=x-2", Part(0, 10, 10, False)),
        ("bytes=٣-", Part(0, 10, 10, False)),
        ("bytes=" + "9" * 5000 + "-", Part(0, 10, 10, False)),
    ],
)
def test_a_range_selects(asked: str | None, part: Part) -> None:
    assert part_of(10, ETAG, asked, None) == part


@pytest.mark.parametrize(
    ("size", "asked"), [(10, "bytes=10-"), (10, "bytes=-0"), (0, "bytes=0-"), (0, "bytes=-5")]
)
def test_a_range_behind_the_end_cannot_be_had(size: int, asked: str) -> None:
    with pytest.raises(Unsatisfiable):
        part_of(size, ETAG, asked, None)


@pytest.mark.parametrize(
    ("condition", "partial"),
    [(ETAG, True), ('"other"', False), (f"W/{ETAG}", False), ("Tue, 24 Nov 2026 12:00:00 GMT", False)],
)
def test_if_range_must_match_strongly(condition: str, partial: bool) -> None:
    assert part_of(10, ETAG, "bytes=5-", condition).partial is partial


@given(st.integers(0, 50), st.text("bytes=0123456789-, ", max_size=20))
def test_no_range_leaves_the_file(size: int, asked: str) -> None:
    try:
        part = part_of(size, ETAG, asked, None)
    except Unsatisfiable:
        return
    assert 0 <= part.start <= part.end <= size
    assert part.length > 0 or size == 0


# slots


def downloads(**limits: float) -> tuple[Downloads, ManualClock]:
    clock = ManualClock()
    return Downloads(Limits(**limits), clock, random.Random(1).random), clock  # type: ignore[arg-type]


def test_slots_are_counted_in_all_and_for_each_holder() -> None:
    slots, _ = downloads(downloads=3, per_holder=2)
    with slots.slot("a"), slots.slot("a"):
        with pytest.raises(Busy, match="a has 2 downloads"), slots.slot("a"):
            pass
        with slots.slot("b"), pytest.raises(Busy, match="3 downloads are running"), slots.slot("c"):
            pass
        with slots.slot("c"):
            assert slots.open == 3
    with pytest.raises(RuntimeError), slots.slot("a"):
        raise RuntimeError
    assert slots.open == 0, "also after a failure"


def test_those_sent_away_come_back_at_the_rate_at_which_slots_become_free() -> None:
    slots, clock = downloads(downloads=4, per_holder=1)
    for _ in range(40):
        with slots.slot("x"):
            clock.advance(2.0)  # what a download takes
    waits: list[float] = []
    running = [slots.slot(name) for name in "abcd"]
    for one in running:
        one.__enter__()
    for number in range(200):
        with pytest.raises(Busy) as caught, slots.slot(f"waiting {number}"):
            pass
        assert caught.value.retry_after is not None
        waits.append(caught.value.retry_after)
    # 200 at 4 slots and 2 s each need 100 s: they are spread over it, not sent into the same second.
    assert 80 <= max(waits) <= 160
    busiest = max(waits.count(second) for second in set(waits))
    assert busiest <= 16
    clock.advance(1000)
    with pytest.raises(Busy) as caught, slots.slot("later"):
        pass
    assert caught.value.retry_after is not None and caught.value.retry_after <= 3, "those are gone by now"


@given(st.floats(0, 1e6), st.integers(0, 10_000), st.integers(1, 1000), st.floats(0, 1, exclude_max=True))
def test_retry_after_is_whole_seconds_within_bounds(mean: float, ahead: int, slots: int, draw: float) -> None:
    wait = retry_after(mean, ahead, slots, draw)
    assert 1 <= wait <= RETRY_MAX and wait == int(wait)


def test_those_refused_together_do_not_come_back_together() -> None:
    assert [retry_after(10.0, 0, 1, draw) for draw in (0.0, 0.5, 0.99)] == [5, 10, 15]


# pace


def test_a_drip_is_cut_off_after_one_window_and_a_slow_link_is_not() -> None:
    limits = Limits(minimum_rate=512, window=30, deadline=3600)
    drip, slow = Pace(limits, 0.0), Pace(limits, 0.0)
    assert drip.problem(29.0, 29) == ""
    assert "took 1 B/s over 30 s" in drip.problem(30.0, 30)
    for second in range(0, 3600, 3):
        assert slow.problem(float(second), second * 600) == ""
    assert "not finished within 3600 s" in slow.problem(3601.0, 3601 * 600)


def test_what_the_buffers_swallow_at_first_counts_for_one_window_only() -> None:
    pace = Pace(Limits(minimum_rate=512, window=30), 0.0)
    assert pace.problem(30.0, 4 << 20) == ""
    assert "B/s" in pace.problem(60.0, (4 << 20) + 30)


# downloads that run elsewhere


def elsewhere(**limits: float) -> tuple[Downloads, ManualClock]:
    clock = ManualClock()
    return Downloads(Limits(**limits), clock, draw=lambda: 0.5), clock  # type: ignore[arg-type]


def test_a_download_elsewhere_counts_for_as_long_as_its_size_takes() -> None:
    limits = Limits(reserved_rate=1e6, reserved_least=1.0, reserved_most=60.0)
    assert [reserved_seconds(limits, size) for size in (0, 10**5, 10**7, 10**10)] == [1.0, 1.0, 10.0, 60.0]
    slots, clock = elsewhere(downloads=2, reserved_rate=1e6)
    slots.reserve("a", 10**7)
    slots.reserve("b", 2 * 10**7)
    with pytest.raises(Busy) as busy:
        slots.reserve("c", 10)
    assert busy.value.retry_after is not None and busy.value.retry_after >= 1
    clock.advance(10.0)
    slots.reserve("c", 10)
    assert slots.open == 2
    clock.advance(20.0)
    with slots.slot("d"):
        assert slots.open == 1, "all of them have ended"


def test_who_asks_again_gives_up_the_oldest_of_its_own_and_nobody_elses() -> None:
    slots, _ = elsewhere(downloads=4, per_holder=2)
    for _ in range(10):  # a device whose connection breaks again and again
        slots.reserve("a", 10**9)
        assert slots.open <= 2
    slots.reserve("b", 10**9)
    with slots.slot("a"):  # a delta, from the controller itself
        assert slots.open == 3
        with slots.slot("a"), pytest.raises(Busy, match="a has 2 downloads"):
            slots.reserve("a", 1)
    assert slots.open == 1, "b's"
    for holder in ("c", "d", "e"):
        slots.reserve(holder, 10**9)
    with pytest.raises(Busy, match="4 downloads are running"):
        slots.reserve("f", 1)
    slots.reserve("b", 1)


def test_at_most_so_many_begin_in_a_second_however_small_they_are() -> None:
    slots, clock = elsewhere(downloads=8)
    begun = 0
    for number in range(1000):  # within 10 s
        try:
            slots.reserve(f"device {number}", 100)
            begun += 1
        except Busy:
            pass
        clock.advance(0.01)
    assert begun <= 8 * 10
