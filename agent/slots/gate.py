"""May a slot go on now? The site's hours and holds, decided purely; `Gate` brings the device's facts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from agent.holds import Holds
from agent.pace import Pace, Paused
from agent.trusted_clock import Moment
from edgeward.errors import EdgewardError
from edgeward.wire.reports import Hold, WaitReason
from edgeward.wire.schedule import ActivationTerms, Delivery, Hours, Schedule, UnknownZone


@dataclass(frozen=True)
class Stay:
    """Why a slot stays where it is, and until when (seconds since 1970, None when nobody knows)."""

    reason: WaitReason
    message: str
    until: float | None = None

    @property
    def held(self) -> bool:
        return self.reason is WaitReason.LOCAL_HOLD


class MustStay(EdgewardError):
    """Until now it might have gone on."""

    def __init__(self, stay: Stay) -> None:
        super().__init__(stay.message)
        self.stay = stay


def standing(holds: Iterable[Hold], moment: Moment) -> tuple[Hold, ...]:
    """Those that have not ended; without knowing the time none ends."""
    return tuple(hold for hold in holds if hold.until is None or not moment.known or moment.now < hold.until)


def download(delivery: Delivery, moment: Moment) -> Stay | None:
    """Why nothing may be downloaded now."""
    if delivery.schedule is None:
        return None
    return _outside(delivery.schedule, moment, WaitReason.BANDWIDTH_WINDOW, "downloads")


def activation(slot: str, terms: ActivationTerms, holds: Iterable[Hold], moment: Moment) -> Stay | None:
    """Why the model of a slot may not be switched now."""
    if held := [hold for hold in standing(holds, moment) if hold.slot in ("", slot)]:
        hold = max(held, key=lambda one: float("inf") if one.until is None else one.until)
        return Stay(WaitReason.LOCAL_HOLD, f"held by {hold.by or 'nobody known'}: {hold.reason}", hold.until)
    if terms.at is not None and moment.proven < terms.at:
        if not moment.known:
            return _unknown(terms.at)
        if moment.now < terms.at:
            return Stay(
                WaitReason.ACTIVATION_TIME, f"it may be activated from {_shown(terms.at)} on", terms.at
            )
    if terms.maintenance is None:
        return None
    return _outside(terms.maintenance, moment, WaitReason.MAINTENANCE_WINDOW, "maintenance")


def _outside(schedule: Schedule, moment: Moment, reason: WaitReason, what: str) -> Stay | None:
    try:
        hours = Hours(schedule)
    except UnknownZone:
        return Stay(
            WaitReason.ZONE_UNKNOWN,
            f"this device does not know the time zone {schedule.zone}; install tzdata (`pip install tzdata`), "
            "or give the windows in UTC",
        )
    if not moment.known:
        return _unknown(None)
    if hours.is_open(moment.now):
        return None
    opens = hours.next_opening(moment.now)
    return Stay(reason, f"the window for {what} opens at {_shown(opens)}", opens)


def _unknown(until: float | None) -> Stay:
    return Stay(
        WaitReason.CLOCK_UNKNOWN,
        "the time is not known: the controller has not answered yet, and this machine's clock is not believed; "
        "it goes on with an answer, or with the machine's clock put right",
        until,
    )


def _shown(at: float | None) -> str:
    return "no time" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


class Gate:
    """Thread-safe. Without `holds` nobody holds anything; `pace` is told what the windows allow."""

    def __init__(
        self, moment: Callable[[], Moment], holds: Holds | None = None, pace: Pace | None = None
    ) -> None:
        self._moment = moment
        self._holds = holds
        self._pace = pace
        self._delivery = Delivery()
        self._terms: Mapping[str, ActivationTerms] = {}

    def take(self, delivery: Delivery, terms: Mapping[str, ActivationTerms]) -> None:
        """What the newest desired state says."""
        self._delivery, self._terms = delivery, terms
        if self._pace is not None:
            self._pace.allow(delivery, self._paused)

    def meanwhile(self, work: Callable[[], None]) -> None:
        """`work` is done now and then while something is transferred, by the thread that transfers it."""
        if self._pace is not None:
            self._pace.meanwhile = work

    def stop(self) -> None:
        if self._pace is not None:
            self._pace.stop()

    def download(self) -> Stay | None:
        return download(self._delivery, self._moment())

    def activation(self, slot: str) -> Stay | None:
        terms = self._terms.get(slot, ActivationTerms())
        return activation(slot, terms, self._read(), self._moment())

    def holds(self) -> tuple[Hold, ...]:
        """Those that stand now."""
        return standing(self._read(), self._moment())

    @contextmanager
    def switching(self, slot: str) -> Iterator[None]:
        """For the write that makes a switch durable: a hold is set before or after it, not meanwhile.

        Raises MustStay, OSError.
        """
        if self._holds is None:
            self._check(slot)
            yield
            return
        with self._holds.locked():
            self._check(slot)
            yield

    def _check(self, slot: str) -> None:
        if stay := self.activation(slot):
            raise MustStay(stay)

    def _read(self) -> tuple[Hold, ...]:
        return () if self._holds is None else self._holds.current()

    def _paused(self) -> Paused | None:
        stay = self.download()
        return None if stay is None else Paused(stay.reason, stay.message, stay.until)
