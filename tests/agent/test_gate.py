"""When a model may be fetched and switched: the decisions, by themselves."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.holds import FILE, Holds, lifted, placed
from agent.slots.gate import Stay, activation, download, standing
from agent.state import State
from agent.trusted_clock import PATIENCE, Moment, TrustedClock
from edgeward.clock import ManualClock
from edgeward.errors import EdgewardError
from edgeward.wire.reports import Hold, WaitReason
from edgeward.wire.schedule import ActivationTerms, Delivery, Schedule, Window

NIGHT = Schedule(windows=[msgspec.convert({"from": "22:00", "to": "05:00"}, Window)], zone="Europe/Berlin")
HOLD = Hold("", "anna", "audit", 1.0)


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


NOON, EVENING, OPENS = at("2026-11-24T11:00"), at("2026-11-24T22:00"), at("2026-11-24T21:00")


def test_a_window_says_when_it_opens() -> None:
    shut = download(Delivery(schedule=NIGHT), Moment(NOON))
    assert shut == Stay(
        WaitReason.BANDWIDTH_WINDOW, "the window for downloads opens at 2026-11-24 21:00 UTC", OPENS
    )
    assert download(Delivery(schedule=NIGHT), Moment(EVENING)) is None
    assert download(Delivery(rate=4096), Moment(NOON)) is None
    shut = activation("s", ActivationTerms(maintenance=NIGHT), (), Moment(NOON))
    assert shut is not None and (shut.reason, shut.until) == (WaitReason.MAINTENANCE_WINDOW, OPENS)
    assert activation("s", ActivationTerms(maintenance=NIGHT), (), Moment(EVENING)) is None


def test_hold_goes_before_time_and_time_before_the_window() -> None:
    terms = ActivationTerms(at=NOON + 60, maintenance=NIGHT)
    reasons = []
    for holds, now in (((HOLD,), NOON), ((), NOON), ((), NOON + 60), ((), EVENING)):
        stay = activation("s", terms, holds, Moment(now))
        reasons.append(stay and stay.reason)
    assert reasons == [
        WaitReason.LOCAL_HOLD, WaitReason.ACTIVATION_TIME, WaitReason.MAINTENANCE_WINDOW, None,
    ]  # fmt: skip


def test_a_hold_is_for_its_slot_and_until_its_end() -> None:
    holds = (Hold("press", "anna", "audit", 1.0, until=100.0), Hold("", "ben", "visitors", 1.0, until=50.0))
    told = activation("press", ActivationTerms(), holds, Moment(10.0))
    assert told == Stay(WaitReason.LOCAL_HOLD, "held by anna: audit", 100.0)
    assert activation("other", ActivationTerms(), holds, Moment(10.0)) == Stay(
        WaitReason.LOCAL_HOLD, "held by ben: visitors", 50.0
    )
    assert activation("other", ActivationTerms(), holds, Moment(50.0)) is None
    assert standing(holds, Moment(60.0)) == holds[:1] and standing(holds, Moment(100.0)) == ()


def test_without_knowing_the_time_nothing_opens_and_no_hold_ends() -> None:
    lost = Moment(EVENING, known=False, proven=NOON)
    for stay in (
        download(Delivery(schedule=NIGHT), lost),
        activation("s", ActivationTerms(maintenance=NIGHT), (), lost),
        activation("s", ActivationTerms(at=NOON + 60), (), lost),
    ):
        assert stay is not None and stay.reason is WaitReason.CLOCK_UNKNOWN
    assert activation("s", ActivationTerms(at=NOON), (), lost) is None, "that has passed for certain"
    assert activation("s", ActivationTerms(), (), lost) is None and download(Delivery(), lost) is None
    ended = (Hold("", "anna", "audit", 1.0, until=NOON + 60),)
    assert standing(ended, lost) == ended


def test_a_zone_that_the_device_does_not_know_keeps_it_closed_and_says_so() -> None:
    nowhere = Schedule(windows=NIGHT.windows, zone="Europe/Nowhere")
    for stay in (
        download(Delivery(schedule=nowhere), Moment(EVENING)),
        activation("s", ActivationTerms(maintenance=nowhere), (), Moment(EVENING)),
    ):
        assert stay is not None and stay.reason is WaitReason.ZONE_UNKNOWN and "tzdata" in stay.message


# --- what is known of the time --------------------------------------------------------------------


@pytest.fixture
def clocks(tmp_path: Path) -> Any:
    machine = ManualClock(NOON)
    state = State(tmp_path / "state.db")
    state.keep_time_floor(NOON - 86400)
    return machine, TrustedClock(machine, state)


def test_a_clock_that_runs_ahead_is_not_believed_before_the_controller_could_answer(clocks: Any) -> None:
    machine, clock = clocks
    machine.set_wall(NOON + 10 * 365 * 86400)
    assert not clock.moment().known
    machine.advance(1.0)
    clock.answered(NOON, machine.monotonic() - 0.5)
    moment = clock.moment()
    assert moment.known and NOON - 60 <= moment.now <= NOON + 120


def test_without_a_controller_a_sound_clock_is_believed_after_a_minute(clocks: Any) -> None:
    machine, clock = clocks
    machine.advance(PATIENCE - 1)
    assert not clock.moment().known
    machine.advance(1)
    assert clock.moment() == Moment(NOON + PATIENCE, True, clock.moment().proven)


def test_1970_is_never_believed(clocks: Any) -> None:
    machine, clock = clocks
    machine.set_wall(0.0)
    machine.advance(10 * PATIENCE)
    assert not clock.moment().known
    clock.answered(NOON, machine.monotonic())
    assert clock.moment().known and abs(clock.moment().now - NOON) <= 60


# --- the file of holds ----------------------------------------------------------------------------


def test_holds_are_one_per_slot_and_durable(tmp_path: Path) -> None:
    holds = Holds(tmp_path)
    assert holds.current() == ()
    press = Hold("press", "ben", "calibration", 2.0)
    for one in (HOLD, press, msgspec.structs.replace(press, reason="again")):
        holds.change(lambda before, one=one: placed(before, one))  # type: ignore[misc]  # bound to the loop's
    found = Holds(tmp_path).current()
    assert [(one.slot, one.reason) for one in found] == [("", "audit"), ("press", "again")]
    assert holds.current() == found, "a file that was replaced is read anew"
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert [one.slot for one in holds.change(lambda before: lifted(before, "press"))] == [""]
    assert holds.change(lambda before: lifted(before, None)) == () == Holds(tmp_path).current()


@pytest.mark.parametrize("damage", [b"", b"[", b'[{"slot": 1}]', b"\x00" * 50])
def test_a_damaged_file_holds_everything_until_it_is_put_right(tmp_path: Path, damage: bytes) -> None:
    holds = Holds(tmp_path)
    holds.change(lambda before: placed(before, HOLD))
    (tmp_path / FILE).write_bytes(damage)
    (hold,) = holds.current()
    assert (hold.slot, hold.until) == ("", None) and "cannot be read" in hold.reason
    assert hold.since == (tmp_path / FILE).stat().st_mtime
    with pytest.raises(EdgewardError, match="damaged"):
        holds.change(lambda before: placed(before, HOLD))
    (tmp_path / FILE).unlink()
    assert holds.current() == ()
