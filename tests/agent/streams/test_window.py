"""Windows against a reference that takes one sample at a time, over any split into messages."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.streams import window as window_module
from agent.streams.samples import Samples
from agent.streams.window import Closed, Windows
from edgeward.errors import InvalidDocument
from edgeward.wire.stream_checks import check_stream
from edgeward.wire.streams import HttpSource, Source, StreamSpec, Window

SECOND = 1_000_000


def samples(
    times: list[int], keys: tuple[str, ...] = (), first: int = 0, epoch: str = "", bad: int = -1
) -> Samples:
    """Samples at whole seconds whose value is their number by arrival."""
    numbers = np.arange(first, first + len(times))
    return Samples(
        np.array(times, np.int64) * SECOND,
        numbers.astype(float).reshape(-1, 1),
        keys,
        epoch,
        numbers.astype(np.int64) if epoch else None,
        {bad - first: "bad"} if first <= bad < first + len(times) else {},
    )


@dataclass
class Simple:
    """What the docstrings say, one sample at a time. Windows are (key, late, start, numbers, fresh numbers)."""

    spec: Window
    held: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)  # (time, number, mark before)
    marks: dict[str, int] = field(default_factory=dict)
    out: set[int] = field(default_factory=set)
    closed: list[tuple[str, bool, int | None, list[int], list[int]]] = field(default_factory=list)

    def add(self, at: int, key: str, number: int) -> None:
        key = key if self.spec.per_key else ""
        held = self.held.setdefault(key, [])
        if self.spec.size is None:
            held.append((at, number, 0))
            if len(held) == self.spec.count:
                self.give(key, None, held)
                del held[: int(self.spec.slide or self.spec.count)]
            return
        size, slide = int(self.spec.size), int(self.spec.slide or self.spec.size)
        mark = self.marks.get(key, -(10**9))
        if at // slide * slide + size <= mark:
            self.out.add(number)
            self.closed.append((key, True, None, [number], [number]))
        else:
            held.append((at, number, mark))
        self.marks[key] = max(mark, at - int(self.spec.lateness))
        self.close(key, mark, self.marks[key])

    def close(self, key: str, above: int, mark: int) -> None:
        size, slide = int(self.spec.size or 0), int(self.spec.slide or self.spec.size or 0)
        held = self.held[key]
        starts = {
            start
            for at, _, before in held
            for start in range(at // slide * slide, at - size, -slide)
            if max(before, above) < start + size <= mark
        }
        for start in sorted(starts):
            self.give(key, start, [i for i in held if start <= i[0] < start + size and i[2] < start + size])
        self.held[key] = [item for item in held if item[0] // slide * slide + size > mark]

    def give(self, key: str, start: int | None, items: list[tuple[int, int, int]]) -> None:
        numbers = [number for _, number, _ in sorted(items, key=lambda item: item[0])]
        self.closed.append((key, False, start, numbers, [n for n in numbers if n not in self.out]))
        self.out.update(numbers)

    def flush(self) -> None:
        for key, held in self.held.items():
            if self.spec.size is not None:
                self.close(key, self.marks.get(key, 0), 10**9)
            elif any(number not in self.out for _, number, _ in held):
                self.give(key, None, held)
        self.held.clear()

    def settled(self) -> int:
        return next(number for number in itertools.count() if number not in self.out)


def seen(closed: list[Closed]) -> list[tuple[str, bool, int | None, list[int], list[int]]]:
    """Comparable, with late samples one by one."""
    result: list[tuple[str, bool, int | None, list[int], list[int]]] = []
    for item in closed:
        numbers = item.samples.values[:, 0].astype(int).tolist()
        fresh = item.samples.values[item.fresh, 0].astype(int).tolist()
        if item.late:
            result += [(item.key, True, None, [number], [number]) for number in fresh]
        else:
            start = None if item.start_us is None else item.start_us // SECOND
            result.append((item.key, False, start, numbers, fresh))
    return result


def by_kind(closed: list[tuple[str, bool, int | None, list[int], list[int]]]) -> object:
    """Order matters per key, and between late ones or between windows only."""
    return {(key, late): [item for item in closed if item[:2] == (key, late)] for key, late, *_ in closed}


SPECS = st.one_of(
    st.integers(1, 6).flatmap(
        lambda count: st.builds(
            Window, count=st.just(count), slide=st.one_of(st.none(), st.integers(1, count).map(float)),
            per_key=st.booleans(), aggregate=st.just("mean"),
        )
    ),
    st.integers(1, 6).flatmap(
        lambda size: st.builds(
            Window, size=st.just(float(size)), slide=st.one_of(st.none(), st.integers(1, size).map(float)),
            lateness=st.sampled_from([0.0, 1.0, 3.0]), per_key=st.booleans(), aggregate=st.just("mean"),
        )
    ),
)  # fmt: skip
ARRIVALS = st.lists(st.tuples(st.integers(-3, 25), st.sampled_from("xy")), max_size=40)


@settings(deadline=None, max_examples=400)
@given(spec=SPECS, arrivals=ARRIVALS, cuts=st.lists(st.integers(0, 40), max_size=6), keyed=st.booleans())
def test_any_split_gives_the_windows_of_one_sample_at_a_time(
    spec: Window, arrivals: list[tuple[int, str]], cuts: list[int], keyed: bool
) -> None:
    simple, windows = Simple(spec), Windows(spec)
    got: list[tuple[str, bool, int | None, list[int], list[int]]] = []
    bounds = sorted({0, len(arrivals), *(min(cut, len(arrivals)) for cut in cuts)})
    for first, stop in itertools.pairwise(bounds):
        part = arrivals[first:stop]
        keys = tuple(key for _, key in part) if keyed else ()
        got += seen(windows.add(samples([at for at, _ in part], keys, first), 0.0))
        for number, (at, key) in enumerate(part, first):
            simple.add(at, key if keyed else "", number)
        assert windows.settled == simple.settled()
        assert windows.pending == stop - len(simple.out)
    assert by_kind(got) == by_kind(simple.closed)
    got += seen(windows.flush())
    simple.flush()
    assert by_kind(got) == by_kind(simple.closed)
    fresh = [number for *_, numbers in got for number in numbers]
    assert sorted(fresh) == list(range(len(arrivals)))
    assert (windows.settled, windows.pending, windows.next_due()) == (len(arrivals), 0, None)


def test_single_samples_come_out_together_and_untouched() -> None:
    windows = Windows(Window())
    batch = samples([3, 1, 2], ("a", "b", "a"))
    (closed,) = windows.add(batch, 0.0)
    assert closed.samples is batch and windows.settled == 3 and windows.next_due() is None
    assert windows.add(samples([]), 0.0) == []


def test_windows_in_order_are_views_of_the_message() -> None:
    batch = samples([0, 1, 2, 3])
    for spec in (Window(count=2, aggregate="mean"), Window(size=2.0, aggregate="mean")):
        windows = Windows(spec)
        closed = windows.add(batch, 0.0)
        assert closed and all(np.shares_memory(item.samples.values, batch.values) for item in closed)


def test_out_of_order_within_lateness_is_put_in_order_and_beyond_is_late() -> None:
    windows = Windows(Window(size=10.0, lateness=5.0))
    closed = windows.add(samples([3, 1, 14, 9, 2, 15, 4, 15]), 0.0)
    # 15 moves the watermark to 10; the reading of second 4 arrives after that.
    assert seen(closed) == [("", True, None, [6], [6]), ("", False, 0, [1, 4, 0, 3], [1, 4, 0, 3])]
    assert (closed[1].start_us, closed[1].end_us) == (0, 10 * SECOND)
    # Number 2 has not come out, though later ones have.
    assert (windows.settled, windows.pending) == (2, 3)


def test_late_samples_never_join_a_window_but_newer_ones_of_that_time_still_do() -> None:
    windows = Windows(Window(size=4.0, slide=2.0, aggregate="mean"))
    assert seen(windows.add(samples([1, 5]), 0.0)) == [("", False, -2, [0], [0]), ("", False, 0, [0], [])]
    # The window 0..4 has closed, 2..6 has not: second 3 lies in both.
    assert windows.add(samples([3], first=2), 0.0) == []
    assert seen(windows.add(samples([6], first=3), 0.0)) == [("", False, 2, [2, 1], [2, 1])]


@pytest.mark.parametrize("per_key", [False, True])
def test_timeouts_by_count_run_from_the_first_sample(per_key: bool) -> None:
    windows = Windows(Window(count=3, timeout=2.0, per_key=per_key))
    windows.add(samples([1], ("a",)), 10.0)
    windows.add(samples([2], ("a",), 1), 11.5)
    assert windows.next_due() == 12.0 and windows.due(11.9) == []
    assert seen(windows.due(12.0)) == [("a" if per_key else "", False, None, [0, 1], [0, 1])]
    assert windows.next_due() is None
    # A window that closed by itself leaves the wait to the sample that is over.
    windows.add(samples([3, 4], ("a", "a"), 2), 20.0)
    assert len(windows.add(samples([5, 6], ("a", "a"), 4), 21.0)) == 1
    assert windows.next_due() == 23.0


def test_each_key_waits_for_itself() -> None:
    windows = Windows(Window(count=2, timeout=1.0, per_key=True))
    windows.add(samples([1], ("a",)), 0.0)
    windows.add(samples([1], ("b",), 1), 0.5)
    windows.add(samples([1], ("a",), 2), 0.6)
    windows.add(samples([1], ("a",), 3), 0.7)
    assert [item.key for item in windows.due(1.5)] == ["b"]
    assert windows.settled == 3 and [item.key for item in windows.due(1.7)] == ["a"]


def test_timeouts_by_event_time_run_from_the_newest_sample_and_leave_the_watermark() -> None:
    windows = Windows(Window(size=10.0, timeout=2.0))
    windows.add(samples([21]), 0.0)
    windows.add(samples([22], first=1), 1.5)
    assert windows.due(3.4) == []
    assert seen(windows.due(3.5)) == [("", False, 20, [0, 1], [0, 1])]
    assert seen(windows.add(samples([9, 23], first=2), 4.0)) == [("", True, None, [2], [2])]
    assert seen(windows.due(6.0)) == [("", False, 20, [3], [3])]


def test_the_overlap_of_samples_that_came_out_does_not_wait() -> None:
    windows = Windows(Window(count=3, slide=1.0, aggregate="mean"))
    windows.add(samples([1, 2, 3]), 0.0)
    assert windows.next_due() is None and windows.due(100.0) == []
    assert seen(windows.add(samples([4], first=3), 100.0)) == [("", False, None, [1, 2, 3], [3])]


def test_no_window_spans_two_epochs_and_a_new_one_resets_the_watermark() -> None:
    windows = Windows(Window(size=10.0))
    windows.add(samples([105], epoch="e1"), 0.0)
    closed = windows.add(samples([1, 2], first=1, epoch="e2"), 0.0)
    assert seen(closed) == [("", False, 100, [0], [0])] and closed[0].samples.epoch == "e1"
    assert seen(windows.flush()) == [("", False, 0, [1, 2], [1, 2])]


def test_no_window_spans_two_shapes() -> None:
    windows = Windows(Window(count=3))
    for size in (4, 4, 8):
        image = Samples(np.zeros(1, np.int64), np.zeros((1, size, size, 3), np.uint8))
        closed = windows.add(image, 0.0)
    assert [item.samples.values.shape for item in closed] == [(2, 4, 4, 3)]


def test_problems_keys_and_numbers_follow_their_samples() -> None:
    windows = Windows(Window(count=4))
    windows.add(samples([5, 1], ("a", "b"), 0, "e", bad=0), 0.0)
    (closed,) = windows.add(samples([3, 2], ("c", "d"), 2, "e", bad=3), 0.0)
    assert closed.samples.keys == ("b", "d", "c", "a")
    assert closed.samples.seq is not None and closed.samples.seq.tolist() == [1, 3, 2, 0]
    assert closed.samples.problems == {1: "bad", 3: "bad"}


@pytest.mark.parametrize("bad", range(6))
def test_problems_are_cut_with_the_samples(bad: int) -> None:
    for spec in (Window(count=2), Window(size=2.0)):
        windows = Windows(spec)
        closed = windows.add(samples(list(range(6)), bad=bad), 0.0) + windows.flush()
        where = [(at, index) for at, item in enumerate(closed) for index in item.samples.problems]
        assert where == [(bad // 2, bad % 2)]


def test_a_sensor_whose_clock_stands_still_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "MAX_HELD", 100)
    windows = Windows(Window(size=10.0, timeout=1e6))
    got = [item for n in range(0, 1000, 10) for item in windows.add(samples([1] * 10, first=n), 0.0)]
    assert windows.pending <= 100 and sum(len(item.samples) for item in got) + windows.pending == 1000


@pytest.mark.parametrize(
    "spec", [Window(count=2, timeout=1e6, per_key=True), Window(size=9.0, timeout=1e6, per_key=True)]
)
def test_ever_new_keys_close_the_oldest_windows(monkeypatch: pytest.MonkeyPatch, spec: Window) -> None:
    monkeypatch.setattr(window_module, "MAX_KEYS", 5)
    windows = Windows(spec)
    got = [item.key for n in range(20) for item in windows.add(samples([1], (f"k{n}",), n), 0.0)]
    assert got == [f"k{n}" for n in range(15)] and windows.pending == 5 and windows.settled == 15


def test_absurd_times_do_not_overflow() -> None:
    windows = Windows(Window(size=1e300, lateness=1e300, timeout=1e300))
    ends = Samples(np.array([-(2**63), 2**63 - 1, 0], np.int64), np.zeros((3, 1)))
    closed = windows.add(ends, 0.0) + windows.flush()
    assert sorted(int(at) for item in closed for at in item.samples.event_time) == [-(2**63), 0, 2**63 - 1]


def test_slides_that_would_multiply_the_work_are_refused() -> None:
    spec = StreamSpec(
        Source(http=HttpSource()), ["a"], window=Window(size=3600.0, slide=0.5, aggregate="mean")
    )
    with pytest.raises(InvalidDocument, match=r"spec\.window\.slide: more than 1000 windows"):
        check_stream(spec)
