"""Slots that wait: for a window, for a time, and for a person at the device."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from agent import hold_commands
from agent.holds import LOCK, Holds, placed
from agent.pace import Pace
from agent.slots.gate import Gate
from agent.slots.opened import Setup
from agent.slots.slots import Slots
from agent.state import SlotRecord, State
from agent.trusted_clock import Moment
from edgeward.clock import ManualClock, SystemClock
from edgeward.errors import EdgewardError
from edgeward.wire.desired import ModelRef, SlotTarget
from edgeward.wire.reports import Hold, Phase, SlotReport, WaitReason
from edgeward.wire.schedule import ActivationTerms, Delivery, Schedule, Window
from edgeward.wire.slots import GuardPolicy, SlotPolicy

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
HOUR = 3600.0
#: Midnight UTC, 2026-11-24.
START = 1_795_478_400.0
FROM_TWO = Schedule(windows=[msgspec.convert({"from": "02:00", "to": "03:00"}, Window)])

Build = Callable[..., Slots]


class Line:
    """Slots with a clock for hours and holds that the test moves."""

    def __init__(self, folder: Path, releaser: Any, engine: Any) -> None:
        self.folder, self.releaser, self.engine = folder, releaser, engine
        self.clock = ManualClock(START)
        self.holds = Holds(folder)
        self.pace = Pace(self.clock)
        self.changes = threading.Semaphore(0)
        self._made: list[Slots] = []

    def open(self, state: State | None = None, **more: Any) -> Slots:
        gate = Gate(lambda: Moment(self.clock.now()), self.holds, self.pace)
        slots = Slots(
            state or State(self.folder / "state.db"),
            self.releaser,
            self.engine,
            {"onnx": "onnxruntime 1"},
            SystemClock(),
            self.changes.release,
            Setup(machine="here", seconds=0.1),
            gate=gate,
            **more,
        )
        slots.start()
        self._made.append(slots)
        return slots

    def hold(self, reason: str = "audit", slot: str = "", until: float | None = None) -> None:
        new = Hold(slot, "anna", reason, self.clock.now(), until)
        self.holds.change(lambda before: placed(before, new))

    def close(self) -> None:
        for slots in self._made:
            slots.stop()


@pytest.fixture
def line(tmp_path: Path, releaser: Any, engine: Any) -> Iterator[Line]:
    made = Line(tmp_path, releaser, engine)
    yield made
    made.close()


def wish(
    slots: Slots,
    ref: ModelRef,
    terms: ActivationTerms | None = None,
    delivery: Delivery | None = None,
    **policy: Any,
) -> None:
    target = SlotTarget(ref, policy=SlotPolicy(**policy), terms=terms or ActivationTerms())
    slots.wish({"default": target}, delivery)


def report(slots: Slots) -> SlotReport:
    return slots.report()["default"]


def waits_for(slots: Slots, reason: WaitReason, until: Any) -> SlotReport:
    found: SlotReport = until(lambda: (got := report(slots)).reason == reason and got)
    return found


def runs(slots: Slots, ref: ModelRef, until: Any) -> SlotReport:
    found: SlotReport = until(
        lambda: (got := report(slots)).running == ref and got.phase is Phase.ACTIVE and got
    )
    return found


def two(line: Line, models: Any) -> tuple[ModelRef, ModelRef]:
    return (
        line.releaser.release(1, ("only", models["fast"])),
        line.releaser.release(2, ("other", models["slow"])),
    )


def cli(*arguments: str) -> str:
    """The real command in a process of its own; what it prints."""
    code = "from edgeward.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "agent", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "SUDO_USER": "anna", "COLUMNS": "300"},
    )
    assert done.returncode in (0, 1, 2), done.stderr
    return done.stdout + done.stderr


def test_a_model_is_fetched_ahead_and_switched_at_its_time(line: Line, models: Any, until: Any) -> None:
    first, second = two(line, models)
    slots = line.open()
    wish(slots, first)
    runs(slots, first, until)
    wish(slots, second, ActivationTerms(at=START + HOUR))
    got = waits_for(slots, WaitReason.ACTIVATION_TIME, until)
    assert (got.phase, got.deadline, got.running) == (Phase.STAGED, START + HOUR, first)
    assert "other" in line.releaser.fetched and line.engine.names == ["m:1"], "tested when its time has come"
    line.clock.advance(HOUR - 0.001)
    slots.retry()
    assert report(slots).phase is Phase.STAGED
    line.clock.advance(0.001)
    assert runs(slots, second, until).deadline is None


def test_a_staged_model_is_known_after_a_reboot_without_a_network(
    line: Line, models: Any, until: Any
) -> None:
    first, second = two(line, models)
    slots = line.open()
    wish(slots, first)
    runs(slots, first, until)
    terms = ActivationTerms(maintenance=FROM_TWO)
    wish(slots, second, terms)
    waits_for(slots, WaitReason.MAINTENANCE_WINDOW, until)
    slots.stop()
    fetched = line.releaser.fetched.copy()

    class Cut(type(line.releaser)):  # type: ignore[misc]  # what stands for the verifier in these tests
        """On the disk is what was fetched: only what is missing needs a network."""

        def fetch_blobs(self, manifest: Any, variant: Any, earlier: Any = ()) -> None:
            if variant.name not in fetched:
                super().fetch_blobs(manifest, variant, earlier)

    line.releaser.__class__ = Cut
    line.releaser.offline = True
    slots = line.open()
    wish(slots, second, terms)
    got = waits_for(slots, WaitReason.MAINTENANCE_WINDOW, until)
    assert (got.phase, got.deadline, got.running) == (Phase.STAGED, START + 2 * HOUR, first)
    line.clock.advance(2 * HOUR)
    runs(slots, second, until)


def test_outside_of_the_bandwidth_window_nothing_is_fetched(line: Line, models: Any, until: Any) -> None:
    line.releaser.fetch_blobs = _paced(line)
    ref, _ = two(line, models)
    slots = line.open()
    wish(slots, ref, delivery=Delivery(schedule=FROM_TWO))
    got = waits_for(slots, WaitReason.BANDWIDTH_WINDOW, until)
    assert (got.phase, got.deadline) == (Phase.PENDING, START + 2 * HOUR)
    assert line.releaser.fetched == []
    line.clock.advance(2 * HOUR)
    runs(slots, ref, until)


def test_a_window_that_is_lifted_or_a_bundle_brought_by_hand_ends_the_wait(
    line: Line, models: Any, until: Any
) -> None:
    plain = line.releaser.fetch_blobs
    line.releaser.fetch_blobs = _paced(line)
    ref, other = two(line, models)
    slots = line.open()
    shut = Delivery(schedule=FROM_TWO)
    wish(slots, ref, delivery=shut)
    waits_for(slots, WaitReason.BANDWIDTH_WINDOW, until)
    wish(slots, ref)
    runs(slots, ref, until)
    wish(slots, other, delivery=shut)
    waits_for(slots, WaitReason.BANDWIDTH_WINDOW, until)
    line.releaser.fetch_blobs = plain  # the files are at hand
    slots.retry()
    runs(slots, other, until)


def _paced(line: Line) -> Any:
    plain = line.releaser.fetch_blobs

    def fetch(*arguments: Any) -> None:
        line.pace.begin()
        plain(*arguments)

    return fetch


def test_a_hold_by_the_command_keeps_what_runs_until_it_is_released(
    line: Line, models: Any, until: Any
) -> None:
    first, second = two(line, models)
    slots = line.open()
    wish(slots, first)
    runs(slots, first, until)
    folder = str(line.folder)
    said = cli("hold", "--dir", folder, "--reason", "audit at the press")
    assert "all slots are held by anna" in said and "audit at the press" in said
    until(lambda: [hold.reason for hold in slots.holds()] == ["audit at the press"])
    assert report(slots).phase is Phase.ACTIVE, "the running model is not touched"

    wish(slots, second)
    got = waits_for(slots, WaitReason.LOCAL_HOLD, until)
    assert (got.phase, got.running, got.deadline) == (Phase.HELD, first, None)
    assert got.message.startswith("held by anna") and got.message.endswith(": audit at the press")
    assert got.since > 0 and "other" in line.releaser.fetched, "downloads go on"
    assert "held by anna" in cli("status", "--dir", folder)

    slots.stop()
    slots = line.open()
    wish(slots, second)
    assert waits_for(slots, WaitReason.LOCAL_HOLD, until).running == first, "it survives a restart"

    assert "nothing is held here for slot press" in cli("release-hold", "--dir", folder, "--slot", "press")
    assert "released: all slots are held by anna" in cli("release-hold", "--dir", folder)
    runs(slots, second, until)
    assert slots.holds() == []
    assert "nothing is held here" in cli("release-hold", "--dir", folder)


def test_the_command_refuses_what_makes_no_sense(line: Line) -> None:
    folder = str(line.folder)
    assert "is no time" in cli("hold", "--dir", folder, "--reason", "x", "--until", "soon")
    assert "is over" in cli("hold", "--dir", folder, "--reason", "x", "--until", "2020-01-01T00:00")
    assert "--reason" in cli("hold", "--dir", folder, "--reason", " ")
    assert "is no agent's folder" in cli("hold", "--dir", folder + "/nowhere", "--reason", "x")
    assert line.holds.current() == ()


def test_a_hold_for_a_slot_that_is_not_there_says_so(line: Line, models: Any, until: Any) -> None:
    """A slip of the pen must not look like a hold of the press."""
    ref, _ = two(line, models)
    slots = line.open()
    wish(slots, ref)
    runs(slots, ref, until)
    folder = str(line.folder)
    said = cli("hold", "--dir", folder, "--slot", "pres", "--reason", "audit")
    assert "slot pres is held by anna" in said and "no slot pres yet, only default" in said
    assert "only" not in cli("hold", "--dir", folder, "--slot", "default", "--reason", "audit")


def test_a_hold_that_cannot_be_written_down_says_that_nothing_is_held(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("agent.holds.write_atomic", full)
    with pytest.raises(EdgewardError, match=r"nothing was changed.*No space left.*make room") as caught:
        hold_commands.hold(line.folder, "audit")
    assert caught.value.exit_code == 1 and line.holds.current() == ()


def test_a_hold_for_another_slot_does_not_matter(line: Line, models: Any, until: Any) -> None:
    ref, _ = two(line, models)
    line.hold(slot="press")
    slots = line.open()
    wish(slots, ref)
    runs(slots, ref, until)
    assert [hold.slot for hold in slots.holds()] == ["press"]


def test_a_hold_ends_by_itself_and_then_the_window_counts(line: Line, models: Any, until: Any) -> None:
    ref, _ = two(line, models)
    line.hold(until=START + HOUR)
    slots = line.open()
    wish(slots, ref, ActivationTerms(maintenance=FROM_TWO))
    assert waits_for(slots, WaitReason.LOCAL_HOLD, until).deadline == START + HOUR
    line.clock.advance(HOUR)
    got = waits_for(slots, WaitReason.MAINTENANCE_WINDOW, until)
    assert (got.phase, got.deadline) == (Phase.STAGED, START + 2 * HOUR)
    assert slots.holds() == []
    line.hold("again")
    until(lambda: report(slots).phase is Phase.HELD)
    line.clock.advance(HOUR)
    line.holds.change(lambda before: ())
    runs(slots, ref, until)


@pytest.mark.parametrize("how", ["held", "closed"])
def test_what_comes_during_the_self_test_wins(line: Line, models: Any, until: Any, how: str) -> None:
    first, second = two(line, models)
    tested: list[str] = []

    def during(slot: str, opened: Any) -> str:
        """Asked once the self-test has passed, before anything is switched."""
        if opened.package.ref == second and not tested:
            tested.append(slot)
            if how == "held":
                line.hold()
            else:
                line.clock.advance(HOUR)
        return ""

    slots = line.open(problem=during)
    wish(slots, first)
    runs(slots, first, until)
    line.clock.advance(2.5 * HOUR)
    wish(slots, second, ActivationTerms(maintenance=FROM_TWO) if how == "closed" else None)
    until(lambda: tested)
    reason = WaitReason.LOCAL_HOLD if how == "held" else WaitReason.MAINTENANCE_WINDOW
    got = waits_for(slots, reason, until)
    assert got.phase is (Phase.HELD if how == "held" else Phase.STAGED) and got.running == first
    assert slots._state.slots()["default"].running == first
    until(lambda: len(line.engine._runners) == 1)  # the candidate's worker is gone
    line.holds.change(lambda before: ())
    line.clock.advance(23 * HOUR)
    runs(slots, second, until)


def test_no_hold_is_set_while_a_switch_becomes_durable(line: Line, models: Any, until: Any) -> None:
    """Once `edgeward agent hold` returns, no switch follows: it waits for the one under way."""
    ref, _ = two(line, models)
    taken: list[bool] = []

    class Watched(State):
        def set_slot(self, name: str, record: SlotRecord) -> None:
            lock = os.open(line.folder / LOCK, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken.append(False)
            except BlockingIOError:
                taken.append(True)
            finally:
                os.close(lock)
            super().set_slot(name, record)

    slots = line.open(Watched(line.folder / "state.db"))
    wish(slots, ref)
    runs(slots, ref, until)
    assert taken == [True]


def test_the_guard_goes_back_in_spite_of_a_hold_and_a_closed_window(
    line: Line, models: Any, until: Any
) -> None:
    first, second = two(line, models)
    slots = line.open()
    for ref in (first, second):
        wish(slots, ref, guard=GuardPolicy(minimum=10))
        runs(slots, ref, until)
    line.hold()
    wish(slots, second, ActivationTerms(maintenance=FROM_TWO), guard=GuardPolicy(minimum=10))
    model = slots.active("default")
    assert model is not None
    model.health.note(1_000_000, 10)
    model.health.failed = 90
    until(lambda: (now := slots.active("default")) is not None and now.ref == first)
    got = until(lambda: (now := report(slots)).phase is Phase.QUARANTINED and now)
    assert got.reason == "GuardErrorRate" and [hold.reason for hold in slots.holds()] == ["audit"]


def test_a_change_of_the_hours_alone_touches_nothing_that_runs(line: Line, models: Any, until: Any) -> None:
    ref, _ = two(line, models)
    slots = line.open()
    wish(slots, ref)
    runs(slots, ref, until)
    wish(slots, ref, ActivationTerms(maintenance=FROM_TWO), Delivery(schedule=FROM_TWO, rate=4096))
    assert report(slots).phase is Phase.ACTIVE and line.engine.names == ["m:1"]


def test_guard_and_holds_do_not_wait_for_a_download_under_the_cap(
    line: Line, models: Any, until: Any
) -> None:
    first, second = two(line, models)
    third = line.releaser.release(3, ("third", models["fast"]))
    slots = line.open()
    guard = GuardPolicy(minimum=10)
    for ref in (first, second):
        wish(slots, ref, guard=guard)
        runs(slots, ref, until)
    plain = line.releaser.fetch_blobs
    line.releaser.fetch_blobs = lambda *arguments: (line.pace.take(4096 * 100_000), plain(*arguments))
    wish(slots, third, delivery=Delivery(rate=4096), guard=guard)
    until(lambda: report(slots).phase is Phase.DOWNLOADING)
    told = line.changes
    while told.acquire(blocking=False):
        pass
    line.hold()
    until(lambda: line.clock.advance(0.3) or told.acquire(blocking=False))
    model = slots.active("default")
    assert model is not None
    model.health.note(1_000_000, 10)
    model.health.failed = 90
    until(lambda: line.clock.advance(0.3) or report(slots).running == first)
    assert report(slots).phase is Phase.DOWNLOADING
    line.clock.advance(200_000)
    assert waits_for(slots, WaitReason.LOCAL_HOLD, until).running == first


def under_the_cap(line: Line, version: int) -> Callable[[], None]:
    """Have that version's files take a day and more; what is returned lets that time pass."""
    plain, left = line.releaser.fetch_blobs, [4096 * 100_000]

    def fetch(manifest: Any, *arguments: Any) -> None:
        if manifest.version == version and left:
            line.pace.take(left[0])
            left.clear()
        plain(manifest, *arguments)

    line.releaser.fetch_blobs = fetch
    return lambda: line.clock.advance(200_000)


def test_a_newer_wish_does_not_wait_for_a_download_that_nobody_wants_any_more(
    line: Line, models: Any, until: Any
) -> None:
    first, second = two(line, models)
    under_the_cap(line, 1)
    slots = line.open()
    capped = Delivery(rate=4096)
    wish(slots, first, delivery=capped)
    until(lambda: line.clock.advance(0.3) or report(slots).phase is Phase.DOWNLOADING)
    wish(slots, second, delivery=capped)
    until(lambda: line.clock.advance(0.3) or report(slots).running == second)
    assert "only" not in line.releaser.fetched


def test_a_slot_whose_hour_has_come_does_not_wait_for_another_ones_download(
    line: Line, models: Any, until: Any
) -> None:
    first, second = two(line, models)
    finish = under_the_cap(line, 1)
    slots = line.open()
    press = SlotTarget(second, terms=ActivationTerms(at=START + HOUR))
    slots.wish({"press": press}, Delivery(rate=4096))
    until(lambda: slots.report()["press"].phase is Phase.STAGED)
    slots.wish({"press": press, "default": SlotTarget(first)}, Delivery(rate=4096))
    until(lambda: line.clock.advance(0.3) or report(slots).phase is Phase.DOWNLOADING)
    assert slots.report()["press"].phase is Phase.STAGED
    line.clock.advance(HOUR)
    until(lambda: line.clock.advance(0.3) or slots.report()["press"].running == second)
    assert report(slots).phase is Phase.DOWNLOADING
    finish()
    runs(slots, first, until)


def test_what_has_served_for_a_minute_is_in_no_boot_loop_whatever_is_downloaded(
    line: Line, models: Any, until: Any
) -> None:
    first, second = two(line, models)
    slots = line.open()
    wish(slots, first, isolation="in-process")
    runs(slots, first, until)
    slots.stop()
    state, line.pace = State(line.folder / "state.db"), Pace(line.clock)
    under_the_cap(line, 2)
    slots = line.open(state)
    wish(slots, second, delivery=Delivery(rate=4096))
    until(lambda: line.clock.advance(0.3) or report(slots).phase is Phase.DOWNLOADING)
    assert state.attempts()["slot/default"].open
    slots._boot._healthy_at = 0.0  # a minute later
    until(lambda: line.clock.advance(0.3) or "slot/default" not in state.attempts())
    assert report(slots).phase is Phase.DOWNLOADING
