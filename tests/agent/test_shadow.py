"""What a run without acting shows: pure figures and verdicts, held against brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.slots.drift import MINIMUM, REFERENCE, ScoreBins, drift, edges_of
from agent.slots.guard import Health, mark
from agent.slots.guard import judge as guard_judge
from agent.slots.shadow import (
    Budget,
    Comparison,
    Scores,
    Side,
    Tally,
    broken,
    finite,
    gap,
    judge,
    rest,
    scores,
    shift,
    too_hot,
)
from agent.streams.sketches import PSI_EPSILON
from edgeward.errors import PackageError
from edgeward.wire.package import Decision, TensorSpec
from edgeward.wire.slots import GuardPolicy, ShadowPolicy

FLOATS = TensorSpec("y", "float32", [-1, 1])
LABELS = TensorSpec("label", "int64", [-1])
TEXT = TensorSpec("class", "bytes", [-1])
WIDE = TensorSpec("p", "float32", [-1, 3])


def between(*outputs: TensorSpec, one: Decision | None = None, other: Decision | None = None) -> Comparison:
    return Comparison.of(Side(outputs, one), Side(outputs, other), 0.05)


def column(*values: float) -> dict[str, Any]:
    return {"y": np.array(values, np.float32).reshape(-1, 1)}


@pytest.mark.parametrize(
    ("ours", "theirs", "agree"),
    [
        ([10.0], [10.4], True),
        ([10.0], [10.6], False),
        ([0.1], [0.14], True),
        ([0.1], [0.16], False),
        ([1.0, 2.0], [1.0, 3.0], False),
        ([1.0, 2.0], [1.0], False),
        ([np.inf], [np.inf], True),
        ([1.0], [np.nan], False),
        ([np.nan], [np.nan], True),
    ],
)
def test_numbers_agree_within_the_tolerance(ours: list[float], theirs: list[float], agree: bool) -> None:
    assert between(FLOATS).agree(column(*ours), column(*theirs)) is agree


def test_decisions_agree_on_the_verdict_each_with_its_own_threshold() -> None:
    compare = between(FLOATS, one=Decision("y", 0.5), other=Decision("y", 50.0))
    assert compare.agree(column(0.6, 0.1), column(60.0, 10.0))
    assert not compare.agree(column(0.6, 0.1), column(60.0, 51.0))
    below = between(FLOATS, one=Decision("y", 0.5), other=Decision("y", 0.5, "below"))
    assert below.agree(column(0.6), column(0.4)) and not below.agree(column(0.6), column(0.6))


def test_labels_are_equal_or_not_and_probabilities_name_the_same_class() -> None:
    compare = between(LABELS, WIDE)
    one = {"label": np.array([3]), "p": np.zeros((1, 3))}
    assert compare.agree(one, one | {"p": np.ones((1, 3))})
    assert not compare.agree(one, one | {"label": np.array([4])})
    text = between(TEXT)
    assert text.agree({"class": np.array([b"a"], object)}, {"class": np.array(["a"])})
    assert not text.agree({"class": np.array([b"a"], object)}, {"class": np.array(["b"])})
    shares = between(WIDE)
    assert shares.agree({"p": np.array([[0.6, 0.3, 0.1]])}, {"p": np.array([[0.4, 0.35, 0.25]])})
    assert not shares.agree({"p": np.array([[0.6, 0.3, 0.1]])}, {"p": np.array([[0.4, 0.45, 0.15]])})
    assert not shares.agree({"p": np.array([[6.0, 3.0, 1.0]])}, {"p": np.array([[4.0, 3.0, 1.0]])})


def test_models_with_nothing_in_common_are_not_compared() -> None:
    other = Side([TensorSpec("z", "float32", [-1])])
    with pytest.raises(PackageError, match=r"z.*are none of.*y"):
        Comparison.of(Side([FLOATS]), other, 0.1)
    Comparison.of(
        Side([FLOATS], Decision("y", 1.0)), Side([TensorSpec("z", "float32", [-1])], Decision("z", 1.0)), 0.1
    )
    half = TensorSpec("h", "bfloat16", [-1])
    with pytest.raises(PackageError, match="none of"):
        between(half)


def test_the_score_is_the_decisions_output_or_the_first_numbers() -> None:
    outputs = {"label": np.array([1, 2]), "p": np.array([[0.1, 0.9], [0.2, np.nan]])}
    assert scores(outputs, Side([LABELS, WIDE])).tolist() == [0.9]
    assert scores(outputs, Side([LABELS, WIDE], Decision("label", 1.0))).tolist() == [1.0, 2.0]
    assert scores(outputs, Side([TEXT])).tolist() == []
    assert not finite(outputs) and finite({"label": np.array([1])})


def brute_psi(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any], edges: list[float]) -> float:
    figure = 0.0
    for low, high in zip([-np.inf, *edges], [*edges, np.inf], strict=True):
        shares = [max(float(((v > low) & (v <= high)).mean()), PSI_EPSILON) for v in (one, other)]
        figure += (shares[1] - shares[0]) * float(np.log(shares[1] / shares[0]))
    return figure


NUMBERS = st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=120)


@given(NUMBERS, NUMBERS)
def test_the_shift_of_few_scores_is_exact(one: list[float], other: list[float]) -> None:
    first, second = np.array(one, np.float32), np.array(other, np.float32)
    a, b = Scores(), Scores()
    a.add(first.astype(float))
    b.add(second.astype(float))
    edges = a.tenths()
    assert shift(a, b) == pytest.approx(brute_psi(first, second, edges), abs=1e-9)
    assert shift(a, a) == pytest.approx(0.0, abs=1e-9)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=4))
def test_tallies_merge_to_what_one_would_have_counted(parts: list[tuple[list[float], list[float]]]) -> None:
    whole, merged = Tally(), Tally()
    for ours, theirs in parts:
        one = Tally()
        for tally in (whole, one):
            tally.seen += len(theirs)
            tally.failed += 1
            tally.agreed += min(len(ours), len(theirs))
            tally.skipped += 2
            tally.not_finite += 3
            tally.health.note(len(ours) * 100_000, len(theirs))
            tally.incumbent.add(np.array(ours, float))
            tally.candidate.add(np.array(theirs, float))
        merged.merge(one)
    for name in ("seen", "agreed", "failed", "skipped", "not_finite"):
        assert getattr(whole, name) == getattr(merged, name)
    assert whole.latency(0.95) == merged.latency(0.95)
    assert merged.incumbent.count == whole.incumbent.count
    assert merged.candidate.mean == pytest.approx(whole.candidate.mean)
    if whole.incumbent.count < 150 and whole.candidate.count < 150:
        theirs, ours = shift(whole.incumbent, whole.candidate), shift(merged.incumbent, merged.candidate)
        assert ours == pytest.approx(theirs, abs=1e-9)


def test_the_shift_of_many_scores_is_close() -> None:
    random = np.random.default_rng(1)
    first, second = random.normal(0, 1, 20_000), random.normal(1, 1, 20_000)
    a, b = Scores(), Scores()
    a.add(first)
    b.add(second)
    exact = brute_psi(first.astype(np.float32), second.astype(np.float32), a.tenths())
    assert shift(a, b) == pytest.approx(exact, rel=0.15) and exact > 0.5
    c = Scores()
    c.add(random.normal(0, 1, 20_000))
    assert (shift(a, c) or 0.0) < 0.02


@pytest.mark.parametrize("moved", [4.0, 6.0])
def test_a_constant_that_becomes_another_has_moved_whichever_way(moved: float) -> None:
    a, b = Scores(), Scores()
    a.add(np.full(200, 5.0))
    b.add(np.full(200, moved))
    assert (shift(a, b) or 0.0) > 1.0 and shift(a, a) == 0.0
    assert edges_of([5.0, 5.0]) == [float(np.nextafter(np.float32(5), np.float32(0))), 5.0]


def tally(seen: int = 200, agreed: int | None = None, failed: int = 0, not_finite: int = 0, ms: float = 1.0,
          moved: float = 0.0) -> Tally:  # fmt: skip
    made = Tally(seen, seen if agreed is None else agreed, failed, not_finite)
    if seen:
        made.health.note(round(ms * 1e6), seen)
        values = np.linspace(0, 1, seen)
        made.incumbent.add(values)
        made.candidate.add(values + moved)
    return made


@pytest.mark.parametrize(
    ("policy", "seen", "elapsed", "passed", "reason", "measured", "limit"),
    [
        ({}, tally(), 1.0, True, "ShadowPassed", 1.0, 0.95),
        ({}, tally(199), 1.0, None, "", None, None),
        ({}, tally(agreed=190), 1.0, True, "ShadowPassed", 0.95, 0.95),
        ({}, tally(agreed=189), 1.0, False, "ShadowDisagrees", 0.945, 0.95),
        ({"min_agreement": None}, tally(agreed=0), 1.0, True, "ShadowPassed", 0.0, None),
        ({}, tally(100, failed=1), 1.0, False, "ShadowErrors", pytest.approx(1 / 101), 0.0),
        ({"max_error_rate": 0.01}, tally(100, failed=2), 1.0, None, "", None, None),
        ({"max_error_rate": 0.01}, tally(100, failed=3), 1.0, False, "ShadowErrors", pytest.approx(3 / 103), 0.01),
        ({"max_error_rate": 0.01}, tally(100, failed=2), 3600.0, False, "ShadowErrors", pytest.approx(2 / 102), 0.01),
        ({}, tally(100, not_finite=1), 1.0, False, "ShadowErrors", 0.01, 0.0),
        ({}, tally(moved=0.5), 1.0, False, "ShadowScoreShift", None, 0.25),
        ({"max_score_shift": None}, tally(moved=0.5), 1.0, True, "ShadowPassed", 1.0, 0.95),
        ({"inferences": 50}, tally(50, moved=0.5), 1.0, True, "ShadowPassed", 1.0, 0.95),
        ({"max_latency_ms": 5.0}, tally(ms=10.0), 1.0, False, "ShadowLatency", pytest.approx(10, rel=0.1), 5.0),
        ({"max_latency_ms": 5.0}, tally(ms=4.0), 1.0, True, "ShadowPassed", 1.0, 0.95),
        ({}, tally(0), 3599.0, None, "", None, None),
        ({}, tally(0), 3600.0, False, "ShadowTooFew", 0.0, 200.0),
        ({"on_deadline": "activate"}, tally(0), 3600.0, True, "ShadowTooFew", 0.0, 200.0),
        ({"on_deadline": "activate"}, tally(10, agreed=5), 3600.0, False, "ShadowDisagrees", 0.5, 0.95),
        ({"on_deadline": "activate"}, tally(10), 3600.0, True, "ShadowTooFew", 10.0, 200.0),
    ],
    ids=range(20),
)  # fmt: skip
def test_each_verdict_has_its_reason_and_figures(
    policy: dict[str, Any], seen: Tally, elapsed: float, passed: bool | None, reason: str, measured: Any,
    limit: float | None,
) -> None:  # fmt: skip
    found = judge(ShadowPolicy(**policy), seen, Budget(), elapsed, finite=True)
    assert (found.passed, found.reason, found.limit) == (passed, reason, limit)
    if reason == "ShadowScoreShift":
        assert (found.measured or 0) > 0.25
    else:
        assert found.measured == measured


def test_nan_is_an_answer_where_the_slot_allows_it() -> None:
    assert judge(ShadowPolicy(), tally(not_finite=9), Budget(), 1.0, finite=False).passed


def test_the_budget_ends_it_at_once() -> None:
    policy = ShadowPolicy(memory_bytes=100 << 20)
    assert broken(policy, Budget(memory_bytes=100 << 20)) is None
    found = broken(policy, Budget(memory_bytes=101 << 20))
    assert found and (found.reason, found.measured, found.limit) == (
        "ShadowMemory", float(101 << 20), float(100 << 20),
    )  # fmt: skip
    lost = broken(policy, Budget(1, "crashed (SIGSEGV)"))
    assert lost and lost.reason == "ShadowWorkerLost" and lost.lasting and "SIGSEGV" in lost.message
    hung = broken(policy, Budget(1, "did not answer within 1 s"))
    assert hung and not hung.lasting
    assert judge(policy, tally(), Budget(1, "crashed"), 1.0, finite=True).passed is False


def test_heat_pauses_until_it_is_cooler_and_the_unknown_is_not_judged() -> None:
    assert not too_hot(None, 99.0, False) and not too_hot(80.0, None, True)
    assert too_hot(80.0, 80.1, False) and not too_hot(80.0, 80.0, False)
    assert too_hot(80.0, 76.0, True) and not too_hot(80.0, 75.0, True)


@given(st.floats(1e-4, 100), st.integers(1, 8), st.floats(0.01, 1))
def test_rest_keeps_the_share_of_a_core(spent: float, cores: int, cpu: float) -> None:
    pause = rest(spent, cores, cpu)
    assert (pause >= 0 and spent * cores / (spent + pause) <= cpu * 1.0001) or (pause == 0 and cores <= cpu)


def test_the_sample_has_its_share() -> None:
    random = np.random.default_rng(7)
    assert {gap(float(value), 1.0) for value in random.random(100)} == {1}
    gaps = [gap(float(value), 0.1) for value in random.random(20_000)]
    assert min(gaps) == 1 and np.mean(gaps) == pytest.approx(10, rel=0.05)


# --- the guard's output drift


def bins(*parts: np.ndarray[Any, Any]) -> ScoreBins:
    made = ScoreBins()
    for part in parts:
        made.add(part)
    return made


@given(st.integers(0, 2**32 - 1), st.floats(-2, 2), st.integers(1, 700))
def test_the_drift_is_what_brute_force_finds(seed: int, moved: float, size: int) -> None:
    random = np.random.default_rng(seed)
    values = np.concatenate([random.normal(0, 1, REFERENCE), random.normal(moved, 1, 1000)]).astype(
        np.float32
    )
    made = bins(*[values[at : at + size] for at in range(0, len(values), size)])
    found = drift(made.proportions, (), made.counts)
    assert found and found[1] == 1000
    edges = edges_of(np.quantile(values[:REFERENCE].astype(float), np.arange(1, 10) / 10).tolist())
    assert found[0] == pytest.approx(brute_psi(values[:REFERENCE], values[REFERENCE:], edges), abs=1e-9)


def test_too_few_scores_say_nothing_and_what_is_not_finite_is_left_out() -> None:
    first = np.linspace(0, 1, REFERENCE)
    assert bins(first[:-1]).proportions == ()
    few = bins(first, np.full(MINIMUM - 1, 9.0), np.array([np.nan, np.inf]))
    assert sum(few.counts) == MINIMUM - 1 and drift(few.proportions, (), few.counts) is None
    enough = bins(first, np.full(MINIMUM, 9.0))
    assert drift(enough.proportions, (), enough.counts) is not None


def test_the_guard_judges_the_drift_of_its_window_only() -> None:
    health = Health()
    health.scores = ScoreBins()
    random = np.random.default_rng(3)

    def answer(number: int, moved: float) -> None:
        health.note(1_000_000, number)
        health.note_scores(random.normal(moved, 1, number))

    policy = GuardPolicy(output_drift=0.25)
    start = mark(Health(), 0.0)
    answer(REFERENCE, 0.0)
    answer(1000, 0.0)
    before = mark(health, 1.0)
    assert guard_judge(policy, start, before) is None
    answer(1000, 1.0)
    after = mark(health, 61.0)
    found = guard_judge(policy, before, after)
    assert found and found.reason == "GuardOutputDrift" and found.measured > 0.25 and found.limit == 0.25
    assert "1000 scores" in found.message
    assert guard_judge(GuardPolicy(), before, after) is None
    answer(1000, 0.0)
    assert guard_judge(policy, after, mark(health, 121.0)) is None
