"""Windows by count and by event time, tumbling and sliding, per key or over all samples. Pure.

Each sample comes out for the first time in exactly one window (`Closed.fresh`) or as late; what comes
out again belongs to an overlapping window. `settled` counts how many samples, in the order in which they
were added, are out without a gap: so far a numbering source may be told that they are accounted for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.streams.samples import Samples, join
from edgeward.wire.streams import Window

Indices = npt.NDArray[np.intp]
Times = npt.NDArray[np.int64]

#: Keys with open windows; beyond, the window that was opened first is closed before its time.
MAX_KEYS = 10_000


@dataclass(frozen=True)
class Closed:
    """A window's samples in the order of their event times; `fresh` selects those that are in no earlier one.

    `start_us` and `end_us` bound a window by event time (microseconds since 1970, end exclusive). `late`
    samples arrived after their windows were closed.
    """

    key: str
    samples: Samples
    fresh: Indices | slice = field(default_factory=lambda: slice(None))
    late: bool = False
    start_us: int | None = None
    end_us: int | None = None


@dataclass
class _Group:
    """What is held for one key. `arrival` numbers samples as they were added, `seen` were in a window already."""

    samples: Samples
    arrival: Times
    seen: npt.NDArray[np.bool_]
    touched: float
    newest: int | None = None
    closed_end: int | None = None

    def add(self, samples: Samples, arrival: Times, now: float) -> None:
        if not self.open:
            self.touched = now
        self.samples = join([self.samples, samples]) if len(self.samples) else samples
        self.arrival = np.concatenate([self.arrival, arrival])
        self.seen = np.concatenate([self.seen, np.zeros(len(samples), np.bool_)])

    @property
    def open(self) -> int:
        """Samples that were in no window yet."""
        return len(self.seen) - int(self.seen.sum())

    def keep(self, indices: Indices) -> None:
        self.samples = self.samples.take(indices)
        self.arrival = self.arrival[indices]
        self.seen = self.seen[indices]

    def window(self, key: str, indices: Indices, start: int | None = None, end: int | None = None) -> Closed:
        """Close a window over these samples; they count as seen."""
        times = self.samples.event_time[indices]
        if len(times) > 1 and (np.diff(times) < 0).any():
            indices = indices[np.argsort(times, kind="stable")]
        fresh = np.flatnonzero(~self.seen[indices])
        self.seen[indices] = True
        return Closed(key, self.samples.take(indices), fresh, False, start, end)


class Windows:
    """`now` is monotonic seconds; it decides when to wait no longer, never to which window a sample belongs."""

    def __init__(self, spec: Window) -> None:
        self._spec = spec
        self._size = None if spec.size is None else round(spec.size * 1e6)
        length = spec.count if self._size is None else self._size
        slide = spec.slide if self._size is None else spec.slide and spec.slide * 1e6
        self._slide = length if slide is None else max(1, round(slide))
        self._lateness = round(spec.lateness * 1e6)
        self._added = 0
        self._groups: dict[str, _Group] = {}
        self._simple = self._size is None and self._slide == spec.count and not spec.per_key
        self._line: list[Samples] = []
        self._in_line = 0
        self._opened = 0.0

    @property
    def pending(self) -> int:
        """Samples that have not come out yet."""
        return self._in_line + sum(group.open for group in self._groups.values())

    @property
    def settled(self) -> int:
        if self._simple:
            return self._added - self._in_line
        waiting = [int(group.arrival[~group.seen].min()) for group in self._groups.values() if group.open]
        return min(waiting, default=self._added)

    def add(self, samples: Samples, now: float) -> list[Closed]:
        """Take samples in; the windows that they close."""
        if not len(samples):
            return []
        if self._simple:
            return self._add_simply(samples, now)
        arrival = np.arange(self._added, self._added + len(samples))
        self._added += len(samples)
        closed: list[Closed] = []
        for key, indices in self._by_key(samples):
            part = samples if indices is None else samples.take(indices)
            closed += self._add_to(key, part, arrival if indices is None else arrival[indices], now)
        return closed

    def due(self, now: float) -> list[Closed]:
        """The windows that wait no longer."""
        if self._simple:
            late = self._in_line and now - self._opened >= self._spec.timeout
            return self._close_line() if late else []
        closed: list[Closed] = []
        for key, group in list(self._groups.items()):
            if group.open and now - group.touched >= self._spec.timeout:
                closed += self._close(key, group)
        return closed

    def next_due(self) -> float | None:
        """When `due` has something at the earliest, without further samples."""
        if self._simple:
            return self._opened + self._spec.timeout if self._in_line else None
        touched = [group.touched for group in self._groups.values() if group.open]
        return min(touched) + self._spec.timeout if touched else None

    def flush(self) -> list[Closed]:
        """Everything that has not come out yet."""
        if self._simple:
            return self._close_line() if self._in_line else []
        closed: list[Closed] = []
        for key, group in list(self._groups.items()):
            if group.open:
                closed += self._close(key, group)
        self._groups.clear()
        return closed

    # tumbling by count over all samples: slices, nothing else

    def _add_simply(self, samples: Samples, now: float) -> list[Closed]:
        if not self._in_line:
            self._opened = now
        self._added += len(samples)
        self._line.append(samples)
        self._in_line += len(samples)
        count = self._spec.count
        if self._in_line < count:
            return []
        whole = join(self._line)
        closed = [_in_order(whole.part(at, at + count)) for at in range(0, len(whole) - count + 1, count)]
        rest = len(whole) % count
        self._line = [whole.part(len(whole) - rest, len(whole))] if rest else []
        self._in_line, self._opened = rest, now
        return closed

    def _close_line(self) -> list[Closed]:
        whole = join(self._line)
        self._line, self._in_line = [], 0
        return [_in_order(whole)]

    # everything else: samples are held by key

    def _by_key(self, samples: Samples) -> list[tuple[str, Indices | None]]:
        if not self._spec.per_key or not samples.keys:
            return [("", None)]
        found: dict[str, list[int]] = {}
        for index, key in enumerate(samples.keys):
            found.setdefault(key, []).append(index)
        if len(found) == 1:
            return [(samples.keys[0], None)]
        return [(key, np.array(indices, dtype=np.intp)) for key, indices in found.items()]

    def _add_to(self, key: str, samples: Samples, arrival: Times, now: float) -> list[Closed]:
        closed: list[Closed] = []
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) >= MAX_KEYS:
                oldest = next(iter(self._groups))
                if self._groups[oldest].open:
                    closed += self._close(oldest, self._groups[oldest])
                del self._groups[oldest]
            empty = samples.part(0, 0)
            group = self._groups[key] = _Group(empty, arrival[:0], np.zeros(0, np.bool_), now)
        if self._size is None:
            group.add(samples, arrival, now)
            return closed + self._full(key, group, now)
        return closed + self._add_by_time(key, group, samples, arrival, now)

    def _full(self, key: str, group: _Group, now: float) -> list[Closed]:
        closed = []
        count = self._spec.count
        while len(group.samples) >= count:
            closed.append(group.window(key, np.arange(count)))
            group.keep(np.arange(self._slide, len(group.samples)))
            group.touched = now
        return closed

    def _last_end(self, times: Any) -> Any:
        """The end of the last window that holds a time: `[k * slide, k * slide + size)`."""
        assert self._size is not None
        return times // self._slide * self._slide + self._size

    def _add_by_time(
        self, key: str, group: _Group, samples: Samples, arrival: Times, now: float
    ) -> list[Closed]:
        """In the order of arrival, so that a sample which closes a window decides what is late after it."""
        closed: list[Closed] = []
        times = samples.event_time
        newest = np.maximum.accumulate(times)
        before = None
        if group.newest is not None:
            newest = np.maximum(newest, group.newest)
            before = self._mark(group.newest)
        marks = self._mark(newest)
        steps = np.flatnonzero(np.diff(marks, prepend=marks[0] - 1 if before is None else before)).tolist()
        start = 0
        for stop in [step + 1 for step in steps] + (
            [len(times)] if not steps or steps[-1] + 1 < len(times) else []
        ):
            closed += self._take_part(key, group, samples, arrival, now, start, stop)
            group.newest = int(newest[stop - 1])
            closed += self._pass(key, group, group.newest - self._lateness)
            start = stop
        return closed

    def _mark(self, newest: Any) -> Any:
        """Changes whenever the watermark passes the end of a window."""
        return (newest - self._lateness - self._size) // self._slide

    def _take_part(
        self, key: str, group: _Group, samples: Samples, arrival: Times, now: float, start: int, stop: int
    ) -> list[Closed]:
        part = samples.part(start, stop)
        numbers = arrival[start:stop]
        closed = []
        if group.closed_end is not None:
            late = self._last_end(part.event_time) <= group.closed_end
            if late.any():
                closed.append(Closed(key, part.take(np.flatnonzero(late)), late=True))
                part, numbers = part.take(np.flatnonzero(~late)), numbers[~late]
        if len(part):
            group.add(part, numbers, now)
            group.touched = now
        return closed

    def _pass(self, key: str, group: _Group, watermark: int) -> list[Closed]:
        """Close every window that ends at or before the watermark."""
        assert self._size is not None
        end = (watermark - self._size) // self._slide * self._slide + self._size
        if group.closed_end is not None and end <= group.closed_end:
            return []
        closed = self._windows_until(key, group, end)
        group.closed_end = end
        if len(group.samples):
            group.keep(np.flatnonzero(self._last_end(group.samples.event_time) > end))
        return closed

    def _windows_until(self, key: str, group: _Group, end: int) -> list[Closed]:
        assert self._size is not None
        times = group.samples.event_time
        if not len(times):
            return []
        last = times // self._slide
        overlap = -(-self._size // self._slide)
        numbers = np.unique(np.concatenate([last - back for back in range(overlap)]))
        closed = []
        for start in (numbers * self._slide).tolist():
            stop = start + self._size
            if stop > end or (group.closed_end is not None and stop <= group.closed_end):
                continue
            inside = np.flatnonzero((times >= start) & (times < stop))
            if len(inside):
                closed.append(group.window(key, inside, start, stop))
        return closed

    def _close(self, key: str, group: _Group) -> list[Closed]:
        """All that is held, as far as it has not come out."""
        if self._size is None:
            closed = [group.window(key, np.arange(len(group.samples)))]
            group.keep(np.zeros(0, np.intp))
            return closed
        end = int(self._last_end(group.samples.event_time).max())
        closed = self._windows_until(key, group, end)
        group.closed_end = max(end, group.closed_end or end)
        group.keep(np.zeros(0, np.intp))
        return closed


def _in_order(samples: Samples) -> Closed:
    times = samples.event_time
    if len(times) > 1 and (np.diff(times) < 0).any():
        samples = samples.take(np.argsort(times, kind="stable"))
    return Closed("", samples)
