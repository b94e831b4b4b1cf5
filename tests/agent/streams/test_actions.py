"""The decision table of actions, line by line and against a reference."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.streams import keys as keys_module
from agent.streams.actions import Gate
from edgeward.wire.streams import Action


def decide(action: Action, steps: str, seconds: float = 1.0) -> list[str]:
    """`T` and `f` are windows of one key, `seconds` apart."""
    gate = Gate(action)
    return [gate.decide("k", step == "T", index * seconds) for index, step in enumerate(steps)]


@pytest.mark.parametrize(
    ("action", "steps", "expected"),
    [
        (Action("a"), "fTTf", "idle run run idle"),
        (Action("a", windows=3), "TTfTTTT", "counting counting idle counting counting run run"),
        (Action("a", hold=2.0), "TTTT", "run held run held"),
        (Action("a", hold=2.0), "TfTT", "run idle run held"),
        (Action("a", hold=3.0), "TfT", "run idle held"),
        (Action("a", once=True), "TTfT", "run once idle run"),
        (Action("a", once=True, hold=2.0), "TTTfT", "run held once idle run"),
        (Action("a", windows=2, once=True), "TTTfTT", "counting run once idle counting run"),
        (Action("a", rate=20.0), "T" * 4, "run run run run"),
        (Action("a", once=True, rate=0.5), "TfTT", "run idle rate rate"),
    ],
)
def test_the_table(action: Action, steps: str, expected: str) -> None:
    assert decide(action, steps) == expected.split()


def test_rate_counts_over_all_keys_and_fills_up_evenly() -> None:
    gate = Gate(Action("a", rate=2.0))
    verdicts = [gate.decide(f"k{n}", True, 0.0) for n in range(3)]
    assert verdicts == ["run", "run", "rate"]
    assert [gate.decide("k", True, at) for at in (29.0, 30.0, 31.0)] == ["rate", "run", "rate"]
    assert [gate.decide("k", True, at) for at in (1e6, 1e6, 1e6)] == ["run", "run", "rate"]


def test_a_rate_below_one_allows_one_run_at_a_time() -> None:
    gate = Gate(Action("a", rate=0.5))
    assert [gate.decide("k", True, at) for at in (0.0, 119.0, 120.0)] == ["run", "rate", "run"]


def test_keys_do_not_count_for_one_another() -> None:
    gate = Gate(Action("a", windows=2, once=True, hold=10.0))
    assert [gate.decide(key, True, 0.0) for key in "xyxy"] == ["counting", "counting", "run", "run"]


def test_state_is_bounded_and_forgotten_when_idle() -> None:
    gate = Gate(Action("a", once=True))
    for number in range(keys_module.MAX_KEYS + 5):
        gate.decide(f"k{number}", True, 0.0)
    assert len(gate._states) == keys_module.MAX_KEYS
    assert (
        gate.decide("k0", True, 0.0) == "run" and gate.decide(f"k{keys_module.MAX_KEYS}", True, 0.0) == "once"
    )
    for number in range(keys_module.MAX_KEYS + 5):
        gate.decide(f"k{number}", False, 0.0)
    assert len(gate._states) == 0


@settings(deadline=None)
@given(
    windows=st.integers(1, 3), hold=st.sampled_from([0.0, 1.5, 4.0]), once=st.booleans(),
    steps=st.lists(st.tuples(st.sampled_from("xy"), st.booleans()), max_size=40),
)  # fmt: skip
def test_against_the_history(windows: int, hold: float, once: bool, steps: list[tuple[str, bool]]) -> None:
    gate = Gate(Action("a", windows=windows, hold=hold, once=once))
    past: dict[str, list[tuple[float, bool, str]]] = {"x": [], "y": []}
    for at, (key, holds) in enumerate(steps):
        verdict = gate.decide(key, holds, float(at))
        history = past[key]
        history.append((float(at), holds, verdict))
        recent = []  # since it was last false
        for item in reversed(history):
            if not item[1]:
                break
            recent.append(item)
        runs = [when for when, _, what in history[:-1] if what == "run"]
        if not holds:
            expected = "idle"
        elif len(recent) < windows:
            expected = "counting"
        elif runs and at - runs[-1] < hold:
            expected = "held"
        elif once and any(what == "run" for _, _, what in recent[1:]):
            expected = "once"
        else:
            expected = "run"
        assert verdict == expected
