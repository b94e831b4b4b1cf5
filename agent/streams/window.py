"""Samples grouped into windows, by count or by event time, each sample accounted exactly once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from agent.streams.keys import MAX_KEYS, Recent, groups
from agent.streams.samples import Samples, join
from edgeward.wire.streams import Window

Ints = npt.NDArray[np.int64]
Places = npt.NDArray[np.intp]

MAX_HELD = 1_000_000
_FAR = 2**60  # microseconds: sums and differences of two such times still fit into 64 bits


@dataclass(frozen=True, slots=True)
class Closed:
    """A window that is complete, or samples that came too late for one.

    `samples` are in the order of their event times (late ones in the order of arrival). `fresh` selects
    those that come out for the first time: in tumbling windows all, in sliding ones what no earlier window
    had. By event time the window covers `start_us` up to, not including, `end_us`; else both are None.
    """

    key: str
    samples: Samples
    late: bool = False
    start_us: int | None = None
    end_us: int | None = None
    fresh: slice | Places = field(default_factory=lambda: slice(None))


class Windows:
    """The open windows of one stream. `now` is monotonic seconds, event times are microseconds.

    By count, sliding windows overlap by `count - slide` samples and none is late. By event time, window
    number k begins at k * slide (tumbling: slide = size). Where the watermark stood when a sample arrived
    decides which windows still take it, so the result does not depend on how messages are cut. A sample
    for which all windows have closed comes out at once as late. Samples with a problem do not move the
    watermark.

    After `timeout` what is open closes, even if it is not full, and is forgotten, overlap included. The
    watermark stays: later samples of that time open the window again. The same happens when the sensor
    begins a new epoch or the shape of the values changes, since neither can lie within one window; a new
    epoch also resets the watermarks (its clock may have been put right). The group that waits longest for
    a sample closes early when more than MAX_KEYS keys or MAX_HELD samples are held: a sensor whose clock
    stands still would fill the memory.

    With `count` 1 and no aggregate, windows mean nothing beyond a single sample: all samples of a call
    come out together, in one Closed without a key.

    `settled` is how many of the samples added so far, in the order of arrival, have come out without a
    gap. A runner may commit a numbering sensor's position up to sample number `settled`, no further.
    """

    def __init__(self, spec: Window) -> None:
        self._timeout = spec.timeout
        self._per_key = spec.per_key
        self._by_time = spec.size is not None
        self._size = spec.count if spec.size is None else _micros(spec.size)
        self._slide = self._size
        if spec.slide is not None:
            self._slide = min(self._size, _micros(spec.slide) if self._by_time else int(spec.slide))
        self._lateness = min(round(spec.lateness * 1e6), _FAR)
        self._single = not self._by_time and spec.count == 1 and spec.aggregate == "none"
        self._groups: OrderedDict[str, _Group] = OrderedDict()
        # When each group with something to come began to wait; the next to run out stands first.
        self._waits: OrderedDict[str, float] = OrderedDict()
        self._marks: Recent[int] = Recent()
        self._held = 0
        self._account = _Account()
        self._like: Samples | None = None

    @property
    def pending(self) -> int:
        """How many samples have not come out yet."""
        return self._account.added - self._account.came_out

    @property
    def settled(self) -> int:
        return self._account.settled

    def breaks(self, samples: Samples) -> bool:
        """Whether these cannot lie in one window with those before, so that `add` closes what is open."""
        return self._like is not None and len(samples) > 0 and not _fit(self._like, samples)

    def add(self, samples: Samples, now: float) -> list[Closed]:
        """Take in samples; gives the windows that they close, and those among them that are late."""
        if len(samples) == 0:
            return []
        closed: list[Closed] = []
        if self._like is not None and self.breaks(samples):
            closed += self.flush()
            if self._like.epoch != samples.epoch:
                self._marks.clear()
        self._like = samples.part(0, 0)
        first = self._account.add(len(samples))
        if self._single:
            self._account.out(np.arange(first, first + len(samples)))
            return [*closed, Closed("", samples)]
        for key, where in groups(samples.keys if self._per_key else (), len(samples)):
            part = samples if where is None else samples.take(where)
            numbers = first + (np.arange(len(samples)) if where is None else where)
            group = self._groups.setdefault(key, _Group())
            self._groups.move_to_end(key)
            self._held -= group.rows
            closed += (self._by_event_time if self._by_time else self._by_count)(
                key, group, part, numbers, now
            )
            self._held += group.rows
            if group.rows == 0:
                del self._groups[key]
        while self._groups and (len(self._groups) > MAX_KEYS or self._held > MAX_HELD):
            closed += self._close(next(iter(self._groups)))
        return closed

    def due(self, now: float) -> list[Closed]:
        """The windows whose timeout has passed."""
        closed: list[Closed] = []
        while (at := self.next_due()) is not None and at <= now:
            closed += self._close(next(iter(self._waits)))
        return closed

    def next_due(self) -> float | None:
        """When `due` gives something next, in monotonic seconds; None while nothing waits."""
        return next(iter(self._waits.values())) + self._timeout if self._waits else None

    def flush(self) -> list[Closed]:
        """Everything that is open."""
        return [window for key in list(self._groups) for window in self._close(key)]

    def _close(self, key: str) -> list[Closed]:
        group = self._groups.pop(key)
        self._held -= group.rows
        if self._waits.pop(key, None) is None:
            return []
        if self._by_time:
            return list(self._closed_by(key, group, None))
        samples, numbers = group.join()
        self._account.out(numbers[group.old :])
        return [_ordered(key, samples, group.old)]

    def _by_count(self, key: str, group: _Group, part: Samples, numbers: Places, now: float) -> list[Closed]:
        group.append(part, numbers)
        closed: list[Closed] = []
        if group.rows >= self._size:
            samples, numbers = group.join()
            count = (group.rows - self._size) // self._slide + 1
            came_out = group.old
            for begin in range(0, count * self._slide, self._slide):
                window = samples.part(begin, begin + self._size)
                closed.append(_ordered(key, window, max(came_out - begin, 0)))
                came_out = begin + self._size
            self._account.out(numbers[group.old : came_out])
            group.keep(slice(count * self._slide, None))
            group.old = came_out - count * self._slide
        if group.rows == group.old:
            self._waits.pop(key, None)
        elif closed or key not in self._waits:
            self._waits[key] = now
            self._waits.move_to_end(key)
        return closed

    def _by_event_time(
        self, key: str, group: _Group, part: Samples, numbers: Places, now: float
    ) -> list[Closed]:
        at = np.clip(part.event_time, -_FAR, _FAR)
        mark = self._marks.get(key, -2 * _FAR)
        believed = at
        if part.problems:
            # What is wrong with a sample may be its time: it must not make the others late.
            believed = at.copy()
            believed[list(part.problems)] = -_FAR
        newest = np.maximum.accumulate(believed) - self._lateness
        before = np.maximum(np.concatenate(([mark], newest[:-1])), mark)
        mark = max(mark, int(newest[-1]))
        self._marks[key] = mark
        # The first window that covers a sample, or the first that is still open for it.
        starts = (np.maximum(at, before) - self._size) // self._slide * self._slide + self._slide
        late = starts > at
        closed: list[Closed] = []
        if late.any():
            closed.append(Closed(key, part.take(np.flatnonzero(late)), late=True))
            self._account.out(numbers[late])
            here = np.flatnonzero(~late)
            part, numbers, starts = part.take(here), numbers[here], starts[here]
        if len(part):
            group.append(part, numbers, starts)
        if group.rows:
            closed += self._closed_by(key, group, mark)
        self._waits.pop(key, None)
        if group.rows:
            self._waits[key] = now
        return closed

    def _closed_by(self, key: str, group: _Group, mark: int | None) -> Iterator[Closed]:
        """The windows that end at `mark` or before it (None: all), in their order; the group keeps the rest."""
        if mark is not None and group.earliest + self._size > mark:
            return
        samples, numbers = group.join()
        starts = group.starts[0]
        at = np.clip(samples.event_time, -_FAR, _FAR)
        order = np.argsort(at, kind="stable")
        times, begins = at[order], np.sort(starts)
        came_out = group.came_out[0]
        before = came_out.copy()
        place = 0
        while place < len(begins):
            start = int(begins[place])
            while mark is None or start + self._size <= mark:
                low, high = np.searchsorted(times, (start, start + self._size))
                inside = order[low:high]
                inside = inside[starts[inside] <= start]
                if len(inside) == 0:
                    break
                new = ~came_out[inside]
                came_out[inside] = True
                fresh = slice(None) if new.all() else np.flatnonzero(new)
                yield Closed(key, _pick(samples, inside), False, start, start + self._size, fresh)
                start += self._slide
            else:
                break
            place = int(np.searchsorted(begins, start))
        self._account.out(numbers[came_out & ~before])
        if mark is not None:
            last = at // self._slide * self._slide
            group.starts[0] = np.maximum(
                starts, (mark - self._size) // self._slide * self._slide + self._slide
            )
            group.keep(np.flatnonzero(last + self._size > mark))


class _Group:
    """The samples held for one key, in the order of arrival.

    `old` counts how many of the first have come out (by count); by event time `starts` has the first
    window still open for each sample and `came_out` whether it has come out.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.old = 0
        self.earliest = 4 * _FAR
        self.parts: list[Samples] = []
        self.numbers: list[Places] = []
        self.starts: list[Ints] = []
        self.came_out: list[npt.NDArray[np.bool_]] = []

    def append(self, part: Samples, numbers: Places, starts: Ints | None = None) -> None:
        self.parts.append(part)
        self.numbers.append(numbers)
        self.rows += len(part)
        if starts is not None:
            self.starts.append(starts)
            self.came_out.append(np.zeros(len(part), np.bool_))
            self.earliest = min(self.earliest, int(starts.min()))

    def join(self) -> tuple[Samples, Places]:
        """All samples and their numbers; the parts are joined for good."""
        if len(self.parts) > 1:
            self.parts = [join(self.parts)]
            self.numbers = [np.concatenate(self.numbers)]
            if self.starts:
                self.starts = [np.concatenate(self.starts)]
                self.came_out = [np.concatenate(self.came_out)]
        return self.parts[0], self.numbers[0]

    def keep(self, where: slice | Places) -> None:
        """Let go of all but some; only after `join`."""
        (part,) = self.parts
        self.parts = [part.part(where.start, len(part)) if isinstance(where, slice) else part.take(where)]
        self.numbers = [self.numbers[0][where]]
        self.rows = len(self.numbers[0])
        if self.starts:
            self.starts = [self.starts[0][where]]
            self.came_out = [self.came_out[0][where]]
            self.earliest = int(self.starts[0].min(initial=4 * _FAR))


class _Account:
    """Which samples, numbered by arrival, have come out."""

    def __init__(self) -> None:
        self.added = 0
        self.came_out = 0
        self.settled = 0
        self._flags = np.zeros(0, np.bool_)  # of the samples from `settled` on

    def add(self, count: int) -> int:
        """The number of the first of `count` new samples."""
        self.added += count
        return self.added - count

    def out(self, numbers: Places) -> None:
        self.came_out += len(numbers)
        if self.came_out == self.added:
            self.settled, self._flags = self.added, self._flags[:0]
            return
        if (missing := self.added - self.settled - len(self._flags)) > 0:
            self._flags = np.concatenate((self._flags, np.zeros(missing + len(self._flags), np.bool_)))
        self._flags[numbers - self.settled] = True
        # One still waits, so there is a False.
        gap = int(np.argmin(self._flags))
        self.settled += gap
        self._flags = self._flags[gap:]


def _micros(seconds: float) -> int:
    return int(min(max(1, round(seconds * 1e6)), _FAR))


def _fit(one: Samples, other: Samples) -> bool:
    """Whether both can lie in one window."""
    return (
        one.epoch == other.epoch
        and one.values.shape[1:] == other.values.shape[1:]
        and one.values.dtype == other.values.dtype
        and (one.seq is None) == (other.seq is None)
    )


def _pick(samples: Samples, indices: Places) -> Samples:
    """The samples at `indices`, as views where they are a stretch."""
    first = int(indices[0])
    if int(indices[-1]) - first + 1 == len(indices) and bool((np.diff(indices) == 1).all()):
        return samples.part(first, first + len(indices))
    return samples.take(indices)


def _ordered(key: str, samples: Samples, old: int) -> Closed:
    """A window by count, the first `old` samples of which have come out, put in order by event time."""
    at = samples.event_time
    if bool((at[1:] >= at[:-1]).all()):
        return Closed(key, samples, fresh=slice(old or None, None))
    order = np.argsort(at, kind="stable")
    return Closed(key, samples.take(order), fresh=np.flatnonzero(order >= old) if old else slice(None))
