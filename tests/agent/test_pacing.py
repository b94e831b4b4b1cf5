"""What is sent next and how much of it: cursors, windows, time-outs, and the pace of a link."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.outbox.pacing import (
    FIRST_TIMEOUT,
    MAX_SIZE,
    MAX_TIMEOUT,
    MAX_WINDOW,
    MIN_SIZE,
    Pace,
    acknowledged,
    backoff,
    timed_out,
)
from agent.outbox.rows import Sequence
from agent.outbox.sending import LIVE_ROWS, SPARE, Schedule, Want
from edgeward.intervals import missing, union
from edgeward.mqtt import Broker, Link
from edgeward.wire.topics import Lane

KEY: tuple[str, Lane] = ("e", "result")


def lane(floor: int, next_seq: int, name: Lane = "result", epoch: str = "e") -> Sequence:
    return Sequence(epoch, name, floor, next_seq)


def send(
    schedule: Schedule, want: Want | None, rows: int, now: float = 0.0, wait: float = 5.0
) -> tuple[int, int]:
    assert want is not None
    span = (want.first, min(want.below, want.first + rows) - 1)
    schedule.sent(want, span, 1000, now, wait)
    return span


# --- the schedule ---------------------------------------------------------------------------------


def test_fresh_rows_get_four_fifths_and_the_backlog_goes_on() -> None:
    schedule = Schedule()
    schedule.next([lane(0, 100_000)], 0.0, 16)  # what is there at the beginning is backlog
    fresh = backlog = 0
    for number in range(100):
        want = schedule.next([lane(0, 100_000 + (number + 1) * 50)], 0.0, 10_000)
        first, _ = send(schedule, want, 10)
        fresh += first >= 100_000
        backlog += first < 100_000
    assert (fresh, backlog) == (80, 20)


def test_the_backlog_has_it_all_when_nothing_is_fresh() -> None:
    schedule = Schedule()
    spans = [send(schedule, schedule.next([lane(3, 50)], 0.0, 16), 10) for _ in range(5)]
    assert spans == [(3, 12), (13, 22), (23, 32), (33, 42), (43, 49)]
    assert schedule.next([lane(3, 50)], 0.0, 16) is None


def test_a_live_cursor_that_falls_behind_leaves_rows_to_the_backlog() -> None:
    schedule = Schedule()
    schedule.next([lane(0, 10)], 0.0, 16)
    numbers = lane(0, 10 + LIVE_ROWS + 1)
    spans = [send(schedule, schedule.next([numbers], 0.0, 16), 10) for _ in range(6)]
    assert max(spans)[0] >= LIVE_ROWS // 2, "the newest come first"
    assert (0, 9) in spans


def test_no_more_batches_are_in_flight_than_the_window_but_for_alarms() -> None:
    schedule = Schedule()
    both = [lane(0, 1000), lane(0, 1000, "alarm")]
    results = [lane(0, 1000)]
    for _ in range(3):
        send(schedule, schedule.next(results, 0.0, 3), 10)
    assert schedule.next(results, 0.0, 3) is None
    for _ in range(SPARE):
        want = schedule.next(both, 0.0, 3)
        assert want is not None and want.key[1] == "alarm"
        send(schedule, want, 10)
    assert schedule.next(both, 0.0, 3) is None


def test_lanes_share_and_alarms_have_most() -> None:
    schedule, sent = Schedule(), Counter[str]()
    lanes = [lane(0, 10**6, name) for name in ("alarm", "result", "trend", "sample")]
    for _ in range(230):
        want = schedule.next(lanes, 0.0, 10_000)
        send(schedule, want, 10)
        assert want is not None
        sent[want.key[1]] += 1
    assert sent == {"alarm": 160, "trend": 40, "result": 20, "sample": 10}


def test_a_batch_without_an_ack_goes_again_and_its_rest_follows_at_once() -> None:
    schedule = Schedule()
    send(schedule, schedule.next([lane(0, 30)], 0.0, 4), 30, wait=2.0)
    assert schedule.next([lane(0, 30)], 1.9, 4) is None
    want = schedule.next([lane(0, 30)], 2.0, 4)
    assert want is not None and want.flight is not None and (want.first, want.below) == (0, 30)
    schedule.sent(want, (0, 9), 1000, 2.0, 4.0)
    rest = schedule.next([lane(0, 30)], 2.0, 4)
    assert rest is not None and (rest.first, rest.below) == (10, 30)
    schedule.sent(rest, (10, 29), 1000, 2.0, 4.0)
    assert [flight.tries for flight in schedule.flights] == [1, 1]


def test_an_ack_may_come_between_a_question_and_its_answer() -> None:
    schedule = Schedule()
    send(schedule, schedule.next([lane(0, 10)], 0.0, 4), 10, wait=2.0)
    again = schedule.next([lane(0, 10)], 2.0, 4)
    assert again is not None and again.flight is not None
    schedule.acknowledged(KEY, 9, [])
    schedule.nothing(again)
    flight = schedule.sent(again, (0, 4), 100, 2.0, 2.0)
    assert schedule.flights == [flight], "what an ack has ended leaves no rest"


def test_what_the_link_did_not_take_is_due_at_once() -> None:
    schedule = Schedule()
    want = schedule.next([lane(0, 10)], 0.0, 4)
    assert want is not None
    schedule.refused(schedule.sent(want, (0, 9), 100, 1.0, 5.0), 1.0)
    again = schedule.next([lane(0, 10)], 1.0, 4)
    assert again is not None and again.flight is not None and again.flight.deadline == again.flight.sent


def test_an_ack_out_of_order_ends_the_flights_that_it_covers_as_a_whole() -> None:
    schedule = Schedule()
    for _ in range(3):
        send(schedule, schedule.next([lane(0, 30)], 0.0, 4), 10)
    assert [flight.first for flight in schedule.acknowledged(KEY, -1, [(10, 19), (25, 29)])] == [10]
    assert not schedule.acknowledged(("f", "result"), 29, [])
    assert [flight.first for flight in schedule.acknowledged(KEY, 9, [(20, 29)])] == [0, 20]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 20),
            st.sampled_from([0.0, 1.0, 5.0]),
            st.booleans(),
            st.booleans(),
            st.integers(0, 30),
        ),
        max_size=60,
    )
)
def test_everything_arrives_whatever_is_lost(turns: list[tuple[int, float, bool, bool, int]]) -> None:
    """Chaos as drawn, then a link that loses nothing."""
    schedule, now = Schedule(), 0.0
    produced, settled = 50, [(-2, -1)]
    for more, seconds, arrives, heard, renewed in [*turns, *[(0, 6.0, True, True, 1)] * 300]:
        produced += more
        now += seconds
        if renewed == 0:
            schedule = Schedule()
        want = schedule.next([lane(settled[0][1] + 1, produced)], now, 3)
        if want is None:
            continue
        open_ = missing(settled, want.first, want.below - 1)
        if not open_:
            schedule.nothing(want)
            continue
        first, last = open_[0][0], min(open_[0][1], open_[0][0] + 14)
        schedule.sent(want, (first, last), 100, now, 5.0)
        assert len({(flight.first, flight.last) for flight in schedule.flights}) == len(schedule.flights)
        if arrives:
            settled = union(settled, first, last)
        if heard:
            schedule.acknowledged(KEY, settled[0][1], settled[1:])
    assert settled == [(-2, produced - 1)]


# --- the pace -------------------------------------------------------------------------------------


def test_a_good_link_gets_larger_batches_and_more_of_them_up_to_a_limit() -> None:
    pace = Pace()
    for _ in range(500):
        pace = acknowledged(pace, 0.02, 50_000, 200_000)
    assert (pace.size, round(pace.window), pace.level) == (MAX_SIZE, MAX_WINDOW, 1)


def test_a_poor_link_gets_small_batches_that_are_compressed_hard() -> None:
    pace = Pace()
    for _ in range(60):
        pace = acknowledged(pace, 8.0, 20_000, 40_000)
    assert (pace.size, pace.window, pace.level) == (MIN_SIZE, 1.0, 15)
    assert pace.timeout >= 8.0


def test_silence_halves_and_recovery_is_slow() -> None:
    pace = timed_out(Pace(size=400_000, window=8.0))
    assert (pace.size, pace.window) == (200_000, 4.0)
    after = acknowledged(pace, 0.1, 1000, 1000)
    assert pace.size < after.size < 400_000 and 4.0 < after.window < 5.0
    for _ in range(40):
        pace = timed_out(pace)
    assert (pace.size, pace.window) == (MIN_SIZE, 1.0)


def test_a_batch_that_was_sent_twice_tells_no_round_trip() -> None:
    assert acknowledged(Pace(), None, 1000, 1000) == Pace()
    assert Pace().timeout == FIRST_TIMEOUT


def test_the_level_stays_put_around_a_limit() -> None:
    pace = Pace(level=3, rate=256e3, rtt=1.0)
    for seconds in (0.95, 1.05) * 20:
        pace = acknowledged(pace, seconds, 256_000, 256_000)
        assert pace.level == 3


@given(st.lists(st.one_of(st.none(), st.floats(0.0, 1000.0)), max_size=60))
def test_the_pace_stays_within_its_limits(rounds: list[float | None]) -> None:
    pace = Pace()
    for seconds in rounds:
        pace = timed_out(pace) if seconds is None else acknowledged(pace, seconds, 1000, 5000)
        assert MIN_SIZE <= pace.size <= MAX_SIZE and 1.0 <= pace.window <= MAX_WINDOW
        assert 0 < pace.timeout <= MAX_TIMEOUT and pace.level in (1, 3, 9, 15)


@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_the_backoff_is_full_jitter_below_an_exponential_limit(tries: int, chance: float) -> None:
    wait = backoff(0.5, tries, 30.0, chance)
    assert 0.0 <= wait <= min(30.0, 0.5 * 2**tries)
    assert backoff(0.5, tries, 30.0, 1.0) == min(30.0, 0.5 * 2.0 ** min(tries, 32))


def test_no_two_clients_come_back_in_step() -> None:
    links = [
        Link(Broker("mqtt://127.0.0.1:1"), f"c{number}", max_reconnect_delay=30.0) for number in range(40)
    ]
    lowest = {link._client._reconnect_min_delay for link in links}
    highest = {link._client._reconnect_max_delay for link in links}
    assert len(lowest) == len(highest) == 40
    assert max(lowest) - min(lowest) > 0.5 and max(highest) <= 30.0 and min(highest) >= 15.0
