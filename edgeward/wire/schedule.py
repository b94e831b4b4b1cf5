"""When something may happen: weekly windows on a site's wall clock, and when a model may enter a slot.

Pure: whoever asks brings the time, in seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

import msgspec
from msgspec import Meta

from edgeward.errors import InvalidDocument
from edgeward.wire.spec import SpecStruct

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

#: No week lies further ahead: one opening may be lost to a change of the clocks, not two.
REACH_DAYS = 15
#: Beyond these no calendar goes.
_EARLIEST, _LATEST = -62_000_000_000.0, 253_300_000_000.0

#: Below this a peer would cut the transfer as a reader who does not read (docs/delivery.md).
LOWEST_RATE = 4096


class Window(SpecStruct, frozen=True):
    """From `from` on each of `days` until the next `to`, which is on the following day unless it is later.

    Times are `HH:MM` on the wall clock. Each is the first instant at which that clock shows it or more: a time
    that the clock skips is the moment of the skip, and of one that it shows twice the first counts. A window
    that is skipped as a whole does not open on that day.
    """

    from_: Annotated[str, Meta(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]\Z")] = msgspec.field(name="from")
    to: Annotated[str, Meta(pattern=r"^(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)\Z")]
    days: Annotated[list[Day], Meta(min_length=1)] = msgspec.field(default_factory=lambda: list(DAYS))


class Schedule(SpecStruct, frozen=True):
    """Open while one of `windows` is, by the wall clock of `zone` (a name of the IANA time zone database)."""

    windows: Annotated[list[Window], Meta(min_length=1, max_length=64)]
    zone: str = "UTC"


class Delivery(SpecStruct, frozen=True):
    """How artifacts come to the devices of a site: within `schedule` only (None: at any time), and not faster
    than `rate` bytes per second and device."""

    schedule: Schedule | None = None
    rate: Annotated[int, Meta(ge=LOWEST_RATE)] | None = None


class ActivationTerms(SpecStruct, frozen=True):
    """When a verified model may take over a slot: not before `at` (seconds since 1970), and within
    `maintenance` only."""

    at: float | None = None
    maintenance: Schedule | None = None


class UnknownZone(LookupError):
    """The time zone is not in this machine's database."""


def check_schedule(schedule: Schedule | None, field: str) -> None:
    """What types alone cannot say. Raises InvalidDocument naming what is below `field`."""
    if schedule is None:
        return
    try:
        find_zone(schedule.zone)
    except UnknownZone:
        raise InvalidDocument(
            f"there is no time zone {schedule.zone!r}",
            field=f"{field}.zone",
            hint="a name of the IANA database, as Europe/Berlin; UTC where the windows shall not move",
        ) from None


def find_zone(name: str) -> tzinfo:
    """Raises UnknownZone. UTC needs no database."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError) as error:
        raise UnknownZone(name) from error


class Hours:
    """A schedule that can be asked. Raises UnknownZone."""

    def __init__(self, schedule: Schedule) -> None:
        self._zone = find_zone(schedule.zone)
        self._windows = [
            (
                {DAYS.index(day) for day in window.days},
                _minutes(window.from_),
                _minutes(window.to) + (24 * 60 if _minutes(window.to) <= _minutes(window.from_) else 0),
            )
            for window in schedule.windows
        ]

    def is_open(self, now: float) -> bool:
        return self._span(now) is not None

    def closes_at(self, now: float) -> float | None:
        """The end of what is open now; None when it is closed, or never closes."""
        span = self._span(now)
        if span is None or span[1] - now > (REACH_DAYS - 2) * 86400.0:
            return None
        return span[1]

    def next_opening(self, now: float) -> float | None:
        """The next instant at which it opens; None while it is always open."""
        return min((start for start, _ in self._spans(now) if start > now), default=None)

    def _span(self, now: float) -> tuple[float, float] | None:
        return next((span for span in self._spans(now) if span[0] <= now < span[1]), None)

    def _spans(self, now: float) -> list[tuple[float, float]]:
        """The spans around `now` in which it is open, in order and apart from each other."""
        joined: list[tuple[float, float]] = []
        for start, end in sorted(self._each(now)):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        return joined

    def _each(self, now: float) -> Iterator[tuple[float, float]]:
        if not _EARLIEST < now < _LATEST:
            return
        today = datetime.fromtimestamp(now, self._zone).date()
        for offset in range(-2, REACH_DAYS + 1):
            day = today + timedelta(days=offset)
            for days, begin, end in self._windows:
                if day.weekday() in days:
                    span = (self._instant(day, begin), self._instant(day, end))
                    if span[0] < span[1]:
                        yield span

    def _instant(self, day: date, minutes: int) -> float:
        """The first instant at which the wall clock shows `minutes` after the midnight of `day`, or more."""
        wanted = datetime(day.year, day.month, day.day) + timedelta(minutes=minutes)
        found = wanted.replace(tzinfo=self._zone).timestamp()
        if datetime.fromtimestamp(found, self._zone).replace(tzinfo=None, fold=0) == wanted:
            return found
        # Skipped (PEP 495: fold=1 reads it by the offset after the gap, which lies before it).
        low, high = wanted.replace(tzinfo=self._zone, fold=1).timestamp(), found
        while high - low > 1.0:
            middle = (low + high) // 2
            shown = datetime.fromtimestamp(middle, self._zone).replace(tzinfo=None, fold=0)
            low, high = (middle, high) if shown < wanted else (low, middle)
        return high


def _minutes(text: str) -> int:
    hours, _, minutes = text.partition(":")
    return int(hours) * 60 + int(minutes)
