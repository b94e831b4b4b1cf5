"""The slot's transition table: every way through it keeps its rules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agent import lifecycle
from agent.lifecycle import RETRY_MAX, TABLE, Event, SlotState, Verdict, due, step, wish
from agent.lifecycle_diagram import placed
from agent.runtime import recovery
from edgeward.wire.desired import ModelRef
from edgeward.wire.reports import Phase
from edgeward.wire.slots import SlotPolicy

ONE = ModelRef("m", 1, "1" * 64)
VERDICT = Verdict("GuardErrorRate", 5.0, "11 of 20 failed", 0.55, 0.5)


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("event", list(Event))
def test_only_what_the_table_holds_can_happen(phase: Phase, event: Event) -> None:
    state = SlotState(ONE, phase=phase, since=1.0)
    if (phase, event) in TABLE:
        after = step(state, event, 2.0, reason="R", message="m", measured=1.0, limit=2.0)
        assert after.phase is TABLE[(phase, event)]
        assert (after.reason, after.message, after.measured, after.limit) == ("R", "m", 1.0, 2.0)
        assert after.since == (1.0 if after.phase is phase else 2.0)
    else:
        with pytest.raises(ValueError, match="no step"):
            step(state, event, 2.0)


def test_only_a_passed_self_test_or_a_recovery_makes_active() -> None:
    ways = {(phase, event) for (phase, event), after in TABLE.items() if after is Phase.ACTIVE}
    assert ways == {
        (Phase.SELF_TEST, Event.PASSED),
        (Phase.SHADOW, Event.PASSED),
        (Phase.DEGRADED, Event.RECOVERED),
    }
    assert {phase for (phase, _), after in TABLE.items() if after is Phase.SHADOW} == {Phase.SELF_TEST}
    assert all(event is Event.WISHED for (phase, event), _ in TABLE.items() if phase is Phase.QUARANTINED), (
        "what was refused comes back by a new wish only"
    )


def test_a_crash_loop_degrades_with_its_figures_until_it_is_over() -> None:
    active = lifecycle.holds(ONE, SlotPolicy(), 0, 1.0)
    looping = lifecycle.crash_loop(active, 5, 2.0)
    assert (looping.phase, looping.reason) == (Phase.DEGRADED, "CrashLoop")
    assert (looping.measured, looping.limit) == (5.0, float(recovery.LOOP_LOSSES))
    assert lifecycle.holds(ONE, SlotPolicy(), 5, 2.0) == looping, "known also to a wish that comes later"
    over = lifecycle.recovered(looping, 3.0)
    assert (over.phase, over.measured, over.since) == (Phase.ACTIVE, None, 3.0)


def test_a_quarantined_digest_is_refused_at_once() -> None:
    assert wish(ONE, {ONE.digest: VERDICT}, 1.0).phase is Phase.QUARANTINED
    refused = wish(ONE, {ONE.digest: VERDICT}, 1.0)
    assert (refused.reason, refused.measured, refused.limit, refused.since) == (
        "GuardErrorRate",
        0.55,
        0.5,
        5.0,
    )
    assert refused.message == "refused on this device before: 11 of 20 failed"
    fresh = wish(ONE, {"other": VERDICT}, 1.0, SlotPolicy(threads=3))
    assert fresh.phase is Phase.PENDING and fresh.policy.threads == 3


def test_a_peer_that_says_when_to_come_again_is_left_alone_until_then() -> None:
    state = SlotState(ONE, phase=Phase.DOWNLOADING)
    assert step(state, Event.UNAVAILABLE, 10.0, asked=7.0).retry_at == 17.0
    assert step(replace(state, failures=5), Event.UNAVAILABLE, 10.0, asked=7.0).retry_at == 42.0
    assert step(state, Event.UNAVAILABLE, 10.0, asked=1e9).retry_at == 10.0 + lifecycle.ASKED_MAX
    assert step(state, Event.FETCHED, 10.0, asked=7.0).retry_at == 0.0
    long = step(replace(state, phase=Phase.DOWNLOADING), Event.UNAVAILABLE, 10.0, asked=3000.0)
    assert not due(long, 20.0), "it is not taken for a wrong clock's"


def test_a_wait_that_a_wrong_clock_set_is_not_waited_out() -> None:
    ten_years = 10 * 365 * 86400.0
    pending = step(SlotState(ONE, phase=Phase.DOWNLOADING, failures=3), Event.UNAVAILABLE, ten_years)
    assert not due(pending, ten_years) and due(pending, pending.retry_at)
    assert due(pending, 5.0), "the clock has been put right"
    assert not due(SlotState(ONE, phase=Phase.ACTIVE), ten_years)


def test_weeks_without_a_network_are_waited_out() -> None:
    state = SlotState(ONE, phase=Phase.DOWNLOADING, failures=100_000)
    assert step(state, Event.UNAVAILABLE, 1.0).retry_at == 1.0 + RETRY_MAX


class Walk(RuleBasedStateMachine):
    """Any sequence of events, allowed or not."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.tested = False
        self.waits: list[float] = []
        self.state = wish(ONE, {}, self.now)

    @rule(event=st.sampled_from(list(Event)), seconds=st.floats(0, 1000))
    def happens(self, event: Event, seconds: float) -> None:
        self.now += seconds
        before = self.state
        if (before.phase, event) not in TABLE:
            with pytest.raises(ValueError, match="no step"):
                step(before, event, self.now)
            return
        self.state = step(before, event, self.now)
        if event is Event.WISHED:
            self.tested = False
        if event is Event.PASSED:
            self.tested = True
        if event is Event.UNAVAILABLE:
            self.waits.append(self.state.retry_at - self.now)

    @invariant()
    def nothing_acts_untested(self) -> None:
        assert self.state.phase not in (Phase.ACTIVE, Phase.DEGRADED) or self.tested

    @invariant()
    def waits_grow_up_to_a_limit(self) -> None:
        assert self.waits == sorted(self.waits) and all(0 < wait <= RETRY_MAX + 1e-6 for wait in self.waits)

    @invariant()
    def the_wish_stays_what_it_was(self) -> None:
        assert self.state.target == ONE


TestWalk = Walk.TestCase


def test_the_documented_diagram_is_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "lifecycle.md").read_text()
    assert placed(text) == text, "run: python -m agent.lifecycle_diagram docs/lifecycle.md"
    for (phase, event), after in TABLE.items():
        if event is not Event.WISHED:
            line = next(line for line in text.splitlines() if line.startswith(f"    {phase} --> {after}:"))
            assert event in line


def test_a_full_disk_is_looked_at_again_within_half_a_minute() -> None:
    state = SlotState(ONE, phase=Phase.DOWNLOADING, failures=100)
    after = step(state, Event.UNAVAILABLE, 10.0, patience=lifecycle.DISK_RETRY_MAX)
    assert after.retry_at == 40.0
