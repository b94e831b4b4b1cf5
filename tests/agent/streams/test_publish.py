"""What goes up, against a reference that looks at one result at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.streams import keys as keys_module
from agent.streams.publish import Selection
from edgeward.wire.package import Decision
from edgeward.wire.streams import Publish

DECISION = Decision("score", 0.5)
Result = tuple[str, float, float, bool]  # key, score, other output, alarm


def naive(spec: Publish) -> Callable[[Result], bool]:
    counts: dict[str, int] = {}
    levels: dict[str, tuple[float, float]] = {}
    flags: dict[str, bool] = {}

    def far(one: float, other: float) -> bool:
        if math.isnan(one) or math.isnan(other):
            return math.isnan(one) != math.isnan(other)
        return one != other and abs(one - other) > spec.tolerance

    def choose(result: Result) -> bool:
        key, score, other, alarm = result
        if spec.results in ("all", "none"):
            return spec.results == "all"
        if spec.results == "uncertain":
            return math.isnan(score) or abs(score - DECISION.threshold) <= spec.margin
        if spec.results == "every":
            counts[key] = counts.get(key, 0) + 1
            return counts[key] % spec.every == 1 or spec.every == 1
        level = levels.get(key)
        chosen = level is None or flags[key] != alarm or far(score, level[0]) or far(other, level[1])
        flags[key] = alarm
        if chosen:
            levels[key] = (score, other)
        return chosen

    return choose


NUMBER = st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.6, 1.0, 5.0, math.nan, math.inf, -math.inf])
RESULTS = st.lists(st.tuples(st.sampled_from("xy"), NUMBER, NUMBER, st.booleans()), max_size=60)


@settings(deadline=None, max_examples=400)
@given(
    kind=st.sampled_from(["all", "every", "changes", "uncertain", "none"]), results=RESULTS,
    tolerance=st.sampled_from([0.0, 0.25, 1.0]), every=st.integers(1, 4), keyed=st.booleans(), steady=st.booleans(),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)  # fmt: skip
def test_any_split_chooses_like_one_result_at_a_time(
    kind: str, results: list[Result], tolerance: float, every: int, keyed: bool, steady: bool, cuts: list[int]
) -> None:
    spec = Publish(results=kind, every=every, tolerance=tolerance)  # type: ignore[arg-type]
    results = [
        (key if keyed else "", score, 0.0 if steady else other, alarm and not steady)
        for key, score, other, alarm in results
    ]
    selection, reference = Selection(spec, DECISION), naive(spec)
    got: list[bool] = []
    bounds = sorted({0, len(results), *(min(cut, len(results)) for cut in cuts)})
    for first, stop in itertools.pairwise(bounds):
        part = results[first:stop]
        outputs = {"score": np.array([r[1] for r in part]), "other": np.array([r[2] for r in part])}
        keys = tuple(r[0] for r in part) if keyed else ()
        got += selection.choose(keys, outputs, np.array([r[3] for r in part], bool)).tolist()
    assert got == [reference(result) for result in results]


def test_a_long_quiet_stretch_ends_with_the_first_move() -> None:
    selection = Selection(Publish(results="changes", tolerance=0.5), None)
    drift = np.arange(1000) * 0.01
    chosen = selection.choose((), {"score": drift}, np.zeros(1000, bool))
    assert np.flatnonzero(chosen)[:3].tolist() == [0, 51, 102]


def test_nothing_is_certain_without_a_decision_or_its_output() -> None:
    outputs = {"score": np.array([0.5])}
    for decision in (None, Decision("another", 0.5)):
        selection = Selection(Publish(results="uncertain"), decision)
        assert selection.choose((), outputs, np.zeros(1, bool)).tolist() == [True]


def test_another_set_of_outputs_is_a_change() -> None:
    selection = Selection(Publish(results="changes"), None)
    off = np.zeros(1, bool)
    assert selection.choose((), {"a": np.zeros(1)}, off).all()
    assert not selection.choose((), {"a": np.zeros(1)}, off).any()
    assert selection.choose((), {"a": np.zeros(1), "b": np.zeros(1)}, off).all()


@pytest.mark.parametrize("kind", ["every", "changes"])
def test_the_memory_of_keys_is_bounded(kind: str) -> None:
    selection = Selection(Publish(results=kind), None)  # type: ignore[arg-type]
    count = keys_module.MAX_KEYS + 10
    keys = tuple(f"k{number}" for number in range(count))
    assert selection.choose(keys, {"a": np.zeros(count)}, np.zeros(count, bool)).all()
    assert max(len(selection._since), len(selection._last)) == keys_module.MAX_KEYS


def test_whether_a_shadow_disagrees_is_known_later() -> None:
    assert (
        not Selection(Publish(results="disagreeing"), DECISION)
        .choose((), {"score": np.zeros(2)}, np.zeros(2, bool))
        .any()
    )


@pytest.mark.parametrize("kind", ["all", "every", "changes", "uncertain", "disagreeing", "none"])
def test_no_results_are_no_choice(kind: str) -> None:
    selection = Selection(Publish(results=kind), DECISION)  # type: ignore[arg-type]
    assert selection.choose((), {"score": np.zeros(0)}, np.zeros(0, bool)).shape == (0,)
