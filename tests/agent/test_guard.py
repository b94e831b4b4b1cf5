"""What makes a running model give way: against a naive count of everything in the window."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.slots.guard import Guard, Health, judge, mark, percentile
from edgeward.wire.slots import GuardPolicy


def after(
    *, answered: int = 0, failed: int = 0, not_finite: int = 0, alarms: int = 0, ms: float = 1.0
) -> Health:
    health = Health()
    if answered:
        health.note(round(ms * 1e6), answered)
    health.failed, health.not_finite, health.alarms = failed, not_finite, alarms
    return health


EMPTY = mark(Health(), 0.0)


@pytest.mark.parametrize(
    ("policy", "health", "reason", "measured"),
    [
        (GuardPolicy(), after(answered=100), "", 0),
        (GuardPolicy(), after(answered=10, failed=9), "", 0),
        (GuardPolicy(), after(answered=9, failed=11), "GuardErrorRate", 0.55),
        (GuardPolicy(), after(answered=10, failed=10), "", 0),
        (GuardPolicy(error_rate=None), after(failed=100), "", 0),
        (GuardPolicy(), after(answered=100, not_finite=51), "GuardNanRate", 0.51),
        (GuardPolicy(), after(answered=100, alarms=100), "", 0),
        (GuardPolicy(alarm_rate=0.2), after(answered=100, alarms=21), "GuardAlarmRate", 0.21),
        (GuardPolicy(latency_ms=5.0), after(answered=100, ms=4.0), "", 0),
        (
            GuardPolicy(latency_ms=5.0),
            after(answered=100, ms=8.0),
            "GuardLatency",
            pytest.approx(8.0, rel=0.1),
        ),
        (GuardPolicy(minimum=1000), after(failed=999), "", 0),
    ],
)
def test_each_limit_has_its_reason_and_figures(
    policy: GuardPolicy, health: Health, reason: str, measured: float
) -> None:
    found = judge(policy, EMPTY, mark(health, 60.0))
    assert (found.reason if found else "") == reason
    if found:
        assert found.measured == measured and found.measured > found.limit and "in 60 s" in found.message


@given(st.lists(st.floats(0.02, 50_000), min_size=1, max_size=50), st.sampled_from([0.5, 0.95, 1.0]))
def test_a_percentile_is_right_to_a_tenth(latencies: list[float], rank: float) -> None:
    health = Health()
    for latency in latencies:
        health.note(round(latency * 1e6))
    got = percentile(EMPTY.classes, mark(health, 1.0).classes, rank)
    exact = sorted(latencies)[max(0, -(-int(rank * 1000 * len(latencies)) // 1000) - 1)]
    assert exact * 0.999 <= got <= exact * 1.1001


@given(st.lists(st.tuples(st.floats(0.1, 20), st.integers(0, 30), st.booleans()), max_size=60))
@settings(max_examples=200, deadline=None)
def test_the_window_slides_over_what_happened(steps: list[tuple[float, int, bool]]) -> None:
    guard, health, now = Guard(GuardPolicy(window=60.0, minimum=20, error_rate=0.5)), Health(), 0.0
    guard.look(health, now)
    looks, told = [0.0], list[tuple[float, bool]]()
    for seconds, number, failed in steps:
        now += seconds
        if failed:
            health.failed += number
        elif number:
            health.note(1000, number)
        told += [(now, failed)] * number
        breach = guard.look(health, now)
        looks.append(now)
        # It judges since a look that is a window ago, or up to 20 s (the widest step) and a mark's distance more.
        old = [at for at in looks if at <= now - 60.0]
        starts = [at for at in old if at >= old[-1] - 21.0] or [0.0]
        verdicts = set()
        for start in starts:
            seen = [failed for at, failed in told if at > start]
            verdicts.add(len(seen) >= 20 and sum(seen) / len(seen) > 0.5)
        assert (breach is not None) in verdicts


def test_what_came_before_the_first_look_counts() -> None:
    guard, health = Guard(GuardPolicy()), Health()
    health.failed += 100
    assert guard.look(health, 5.0) is not None


def test_what_is_over_is_forgotten() -> None:
    guard, health = Guard(GuardPolicy(window=60.0)), Health()
    guard.look(health, 0.0)
    health.failed += 100
    assert guard.look(health, 1.0) is not None
    for second in range(2, 70):
        health.note(1000, 1)
        found = guard.look(health, float(second))
    assert found is None
