"""Windows against a reference that takes one sample at a time and keeps everything."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.streams import window as module
from agent.streams.samples import Samples
from agent.streams.window import Closed, Windows
from edgeward.wire.streams import Window

SECOND = 1_000_000


def samples(times: list[int], keys: list[str] | None = None, first: int = 0) -> Samples:
    """Values name the sample: its number in the order of arrival."""
    count = len(times)
    return Samples(
        np.array(times, np.int64) * SECOND,
        np.arange(first, first + count, dtype=np.float64).reshape(-1, 1),
        tuple(keys or ()),
        "e",
        np.arange(first, first + count),
    )


def numbers(closed: Closed) -> list[int]:
    return closed.samples.values[:, 0].astype(int).tolist()


def fresh(closed: Closed) -> list[int]:
    return closed.samples.values[closed.fresh, 0].astype(int).tolist()


class Reference:
    """By event time, one key: every sample ever, and every window that was closed."""

    def __init__(self, size: int, slide: int, lateness: int) -> None:
        self.size, self.slide, self.lateness = size, slide, lateness
        self.all: list[tuple[int, int]] = []
        self.newest: int | None = None
        self.end: int | None = None
        self.out: list[tuple[Any, ...]] = []

    def add(self, time: int, number: int) -> None:
        last_end = time // self.slide * self.slide + self.size
        if self.end is not None and last_end <= self.end:
            self.out.append(("late", number))
        else:
            self.all.append((time, number))
        self.newest = time if self.newest is None else max(self.newest, time)
        self._close_until(self.newest - self.lateness)

    def _close_until(self, watermark: int) -> None:
        end = (watermark - self.size) // self.slide * self.slide + self.size
        if self.end is not None and end <= self.end:
            return
        starts = sorted({time // self.slide - back for time, _ in self.all for back in range(self.size)})
        for start in (number * self.slide for number in starts):
            if start + self.size <= end and (self.end is None or start + self.size > self.end):
                inside = sorted(item for item in self.all if start <= item[0] < start + self.size)
                if inside:
                    self.out.append((start, [number for _, number in inside]))
        self.end = end

    def flush(self) -> None:
        if self.all:
            last = max(time // self.slide * self.slide + self.size for time, _ in self.all)
            if self.end is None or last > self.end:
                self._close_until(last)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 6), st.data(), st.integers(0, 4),
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8), max_size=8),
)  # fmt: skip
def test_event_time_windows_are_those_of_the_reference(
    size: int, data: st.DataObject, lateness: int, batches: list[list[int]]
) -> None:
    slide = data.draw(st.integers(1, size))
    windows = Windows(Window(size=size, slide=slide, lateness=lateness, timeout=100, aggregate="mean"))
    reference = Reference(size, slide, lateness)
    out: list[Closed] = []
    first = 0
    for batch in batches:
        out += windows.add(samples(batch, first=first), 0.0)
        for index, time in enumerate(batch):
            reference.add(time, first + index)
        first += len(batch)
    out += windows.flush()
    reference.flush()
    got = [
        item
        for closed in out
        for item in (
            [("late", number) for number in numbers(closed)]
            if closed.late
            else [((closed.start_us or 0) // SECOND, numbers(closed))]
        )
    ]
    key = repr
    assert sorted(got, key=key) == sorted(reference.out, key=key)
    assert sorted(number for closed in out for number in fresh(closed)) == list(range(first))
    assert windows.pending == 0 and windows.settled == first


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.data(), st.booleans(), st.lists(st.integers(0, 12), max_size=10))
def test_count_windows_hold_each_keys_samples_in_order(
    count: int, data: st.DataObject, per_key: bool, sizes: list[int]
) -> None:
    slide = data.draw(st.integers(1, count))
    spec = Window(count=count, slide=slide, per_key=per_key, timeout=100, aggregate="mean")
    windows = Windows(spec)
    arrived: dict[str, list[int]] = {}
    out: list[Closed] = []
    first = 0
    for size in sizes:
        keys = [data.draw(st.sampled_from("ab")) for _ in range(size)]
        out += windows.add(samples(list(range(first, first + size)), keys, first), 0.0)
        for index, key in enumerate(keys):
            arrived.setdefault(key if per_key else "", []).append(first + index)
        first += size
        done = {number for closed in out for number in fresh(closed)}
        assert windows.settled == next((n for n in range(first) if n not in done), first)
    for key, held in arrived.items():
        expected = [held[at : at + count] for at in range(0, len(held) - count + 1, slide)]
        assert [numbers(closed) for closed in out if closed.key == key] == expected
    out += windows.flush()
    assert sorted(number for closed in out for number in fresh(closed)) == list(range(first))
    assert windows.settled == first


def test_an_idle_window_waits_no_longer_than_its_timeout() -> None:
    for spec in (
        Window(count=10, timeout=2),
        Window(count=10, timeout=2, per_key=True),
        Window(size=10, timeout=2),
    ):
        windows = Windows(spec)
        assert windows.next_due() is None
        assert windows.add(samples([1, 2]), 5.0) == []
        assert windows.next_due() == 7.0
        assert windows.due(6.9) == []
        (closed,) = windows.due(7.0)
        assert numbers(closed) == [0, 1] and windows.due(20.0) == [] and windows.settled == 2


def test_samples_behind_a_window_that_was_closed_are_late() -> None:
    windows = Windows(Window(size=10, lateness=5, timeout=60))
    assert windows.add(samples([1, 12, 3]), 0.0) == []
    (closed,) = windows.add(samples([15], first=3), 0.0)
    assert numbers(closed) == [0, 2] and (closed.start_us, closed.end_us) == (0, 10 * SECOND)
    (late,) = windows.add(samples([4], first=4), 0.0)
    assert late.late and numbers(late) == [4]


def test_samples_within_a_window_are_ordered_by_event_time() -> None:
    (closed,) = Windows(Window(count=3)).add(samples([7, 5, 6]), 0.0)
    assert numbers(closed) == [1, 2, 0]


def test_problems_travel_with_their_samples() -> None:
    marked = Samples(np.arange(5), np.zeros((5, 1)), problems={1: "one", 4: "four"})
    first, second = Windows(Window(count=2)).add(marked, 0.0)
    assert first.samples.problems == {1: "one"} and second.samples.problems == {}
    windows = Windows(Window(count=5, per_key=True))
    (closed,) = windows.add(marked, 0.0)
    assert closed.samples.problems == {1: "one", 4: "four"}


def test_more_keys_than_may_be_open_close_the_oldest(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MAX_KEYS", 2)
    windows = Windows(Window(count=5, per_key=True, timeout=100))
    windows.add(samples([1], ["a"]), 0.0)
    windows.add(samples([2], ["b"], 1), 0.0)
    (closed,) = windows.add(samples([3], ["c"], 2), 0.0)
    assert (closed.key, numbers(closed)) == ("a", [0])
