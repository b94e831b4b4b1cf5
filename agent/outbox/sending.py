"""Which rows go up next: fresh ones and the backlog side by side, a bounded number of batches in flight.

Without I/O and without a clock: the uplink asks, sends and says what came of it. Each sequence has a live
cursor, which follows the newest rows, and one for the backlog below, which starts at the oldest. Whoever has
something to send gets its share (smooth weighted round robin), so that neither waits for the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from agent.outbox.rows import Sequence as Numbers
from edgeward.intervals import Interval, missing, union
from edgeward.wire.topics import Lane

#: Shares of fresh rows and of the backlog in each lane, and of the lanes.
LIVE, BACKLOG = 4, 1
WEIGHTS: dict[Lane, int] = {"alarm": 16, "trend": 4, "result": 2, "sample": 1}
#: Fresh rows that may wait; what is more becomes backlog, since the newest come first.
LIVE_ROWS = 20_000
#: Alarms go up although the window is full: so many batches more.
SPARE = 2

Key = tuple[str, Lane]


@dataclass(frozen=True)
class Flight:
    """A batch without an ack. `size` is its bytes on the wire, `under_way` those of all flights at that moment."""

    key: Key
    first: int
    last: int
    size: int
    under_way: int
    sent: float
    deadline: float
    tries: int = 0


@dataclass(frozen=True)
class Want:
    """Send what lies in `first .. below - 1`, from the lowest open number on; `flight` is the one it repeats."""

    key: Key
    first: int
    below: int
    live: bool
    flight: Flight | None = None


@dataclass
class _Cursor:
    """`back` is the next number of the backlog, which ends at `begin`; `live` the next of the fresh rows."""

    back: int
    begin: int
    live: int


class Schedule:
    """Of one connection; a new one begins with an empty one."""

    def __init__(self) -> None:
        self._cursors: dict[Key, _Cursor] = {}
        self._credit: dict[tuple[Key, bool], int] = {}
        self.flights: list[Flight] = []

    def next(self, sequences: Iterable[Numbers], now: float, window: int) -> Want | None:
        """What to send now; None when nothing is due or `window` batches are in flight."""
        late = min(self.flights, key=lambda flight: flight.deadline, default=None)
        if late is not None and late.deadline <= now:
            return Want(late.key, late.first, late.last + 1, live=False, flight=late)
        queues: dict[tuple[Key, bool], Want] = {}
        room = len(self.flights) < window
        spare = len(self.flights) < window + SPARE
        for numbers in sequences:
            if room or (spare and numbers.lane == "alarm"):
                for want in self._wants(numbers):
                    queues[want.key, want.live] = want
        return self._choose(queues)

    def _wants(self, numbers: Numbers) -> Iterable[Want]:
        key = (numbers.epoch, numbers.lane)
        cursor = self._cursors.get(key)
        if cursor is None:
            cursor = self._cursors[key] = _Cursor(numbers.floor, numbers.next_seq, numbers.next_seq)
        if numbers.next_seq - cursor.live > LIVE_ROWS:
            cursor.begin = cursor.live = numbers.next_seq - LIVE_ROWS // 2
        flying = self._flying(key)
        spans = missing(flying, cursor.live, numbers.next_seq - 1)
        if spans:
            yield Want(key, spans[0][0], spans[0][1] + 1, live=True)
        spans = missing(flying, max(cursor.back, numbers.floor), cursor.begin - 1)
        if spans:
            yield Want(key, spans[0][0], spans[0][1] + 1, live=False)

    def _flying(self, key: Key) -> list[Interval]:
        flying: list[Interval] = []
        for flight in self.flights:
            if flight.key == key:
                flying = union(flying, flight.first, flight.last)
        return flying

    def _choose(self, queues: dict[tuple[Key, bool], Want]) -> Want | None:
        """Smooth weighted round robin: shares hold over every stretch of time, not only over the whole."""
        if not queues:
            return None
        weights = {queue: WEIGHTS[queue[0][1]] * (LIVE if queue[1] else BACKLOG) for queue in queues}
        # Who had nothing to send saves nothing up.
        self._credit = {queue: self._credit.get(queue, 0) + weights[queue] for queue in queues}
        chosen = max(queues, key=lambda queue: self._credit[queue])
        self._credit[chosen] -= sum(weights.values())
        return queues[chosen]

    # what came of it

    def sent(self, want: Want, span: Interval, size: int, now: float, wait: float) -> Flight:
        """Numbers `span` are about to go up as `size` bytes; without an ack they go again after `wait` seconds."""
        first, last = span
        under_way = size + sum(flight.size for flight in self.flights if flight is not want.flight)
        tries = 0
        if want.flight is not None:
            tries = want.flight.tries + 1
            if self._end(want.flight) and last < want.flight.last:  # the rest follows at once
                self.flights.append(replace(want.flight, first=last + 1, sent=now, deadline=now))
        else:
            self._advance(want, last + 1)
        flight = Flight(want.key, first, last, size, under_way, now, now + wait, tries)
        self.flights.append(flight)
        return flight

    def refused(self, flight: Flight, now: float) -> None:
        """The link did not take it: it is due, and no silence of the link."""
        if self._end(flight):
            self.flights.append(replace(flight, sent=now, deadline=now))

    def nothing(self, want: Want) -> None:
        """There is nothing to send in it any more."""
        if want.flight is not None:
            self._end(want.flight)
        else:
            self._advance(want, want.below)

    def _end(self, flight: Flight) -> bool:
        """False when an ack has ended it meanwhile."""
        known = flight in self.flights
        if known:
            self.flights.remove(flight)
        return known

    def _advance(self, want: Want, to: int) -> None:
        cursor = self._cursors[want.key]
        if want.live:
            cursor.live = max(cursor.live, to)
        else:
            cursor.back = max(cursor.back, to)

    def acknowledged(self, key: Key, seq: int, ranges: Sequence[Interval]) -> list[Flight]:
        """The flights that have arrived, each as a whole."""
        settled = union(list(ranges), 0, seq) if seq >= 0 else list(ranges)
        arrived = [
            flight
            for flight in self.flights
            if flight.key == key and not missing(settled, flight.first, flight.last)
        ]
        self.flights = [flight for flight in self.flights if flight not in arrived]
        return arrived
