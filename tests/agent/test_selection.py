"""Which variant is chosen, over every table that a device could make."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from agent.slots.selection import Candidate, choose, eligible, to_measure
from edgeward.wire.slots import SlotPolicy

MIB = 1 << 20
FIGURE = st.floats(0.01, 100.0)


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    made = []
    for index in range(draw(st.integers(0, 6))):
        measured = draw(st.booleans())
        p50 = draw(FIGURE)
        made.append(
            Candidate(
                f"v{index}",
                draw(st.sampled_from(["onnx", "tflite"])),
                draw(st.none() | st.floats(0.0, 1.0)),
                installed=draw(st.integers(0, 4)) > 0,
                fault=draw(st.sampled_from(["", "", "", "does not load"])),
                provider="CPU",
                p50_ms=p50 if measured else None,
                p95_ms=p50 * draw(st.floats(1.0, 3.0)) if measured else None,
                memory_bytes=draw(st.integers(MIB, 200 * MIB)) if measured else None,
            )
        )
    return made


POLICIES = st.builds(
    SlotPolicy,
    quality_tolerance=st.sampled_from([0.0, 0.01, 0.2]),
    max_latency_ms=st.none() | FIGURE,
    memory_bytes=st.none() | st.integers(MIB, 200 * MIB),
)


def keeps(candidate: Candidate, policy: SlotPolicy) -> bool:
    return (
        policy.max_latency_ms is None
        or (candidate.p95_ms is not None and candidate.p95_ms <= policy.max_latency_ms)
    ) and (
        policy.memory_bytes is None
        or (candidate.memory_bytes is not None and candidate.memory_bytes <= policy.memory_bytes)
    )


@given(candidates(), POLICIES)
def test_the_choice_keeps_every_ceiling_and_the_tolerance(items: list[Candidate], policy: SlotPolicy) -> None:
    choice = choose(items, policy)
    by_name = {item.name: item for item in items}
    assert choice == choose(list(items), policy)
    assert [row.name for row in choice.table] == [item.name for item in items]
    assert [row.name for row in choice.table if row.chosen] == ([choice.chosen] if choice.chosen else [])
    assert all(row.chosen or row.reason for row in choice.table)
    if not choice.chosen:
        assert choice.reason and choice.message
        if choice.reason in ("LatencyCeiling", "MemoryCeiling"):
            assert choice.measured is not None and choice.limit is not None
            assert choice.measured > choice.limit
        return
    chosen = by_name[choice.chosen]
    assert chosen.installed and not chosen.fault and keeps(chosen, policy)
    known = [item.quality for item in items if item.installed and not item.fault and item.quality is not None]
    assert chosen.quality is None or chosen.quality >= max(known) - policy.quality_tolerance


@given(candidates(), POLICIES)
def test_what_keeps_the_ceilings_is_never_passed_over(items: list[Candidate], policy: SlotPolicy) -> None:
    fitting = [item for item in eligible(items, policy) if item.p95_ms is not None and keeps(item, policy)]
    choice = choose(items, policy)
    if fitting:
        assert choice.chosen
        assert next(item for item in items if item.name == choice.chosen).p50_ms == min(
            item.p50_ms for item in fitting
        )


@given(candidates(), POLICIES)
def test_measuring_all_that_is_asked_for_comes_to_an_end_and_decides(
    items: list[Candidate], policy: SlotPolicy
) -> None:
    rounds = 0
    while asked := to_measure(items, policy):
        rounds += 1
        assert rounds <= len(items)
        items = [
            replace(item, p50_ms=1.0, p95_ms=1.0, memory_bytes=MIB) if item.name in asked else item
            for item in items
        ]
    choice = choose(items, policy)
    assert choice.chosen or not eligible(items, policy) or choice.reason.endswith("Ceiling")


def test_a_single_candidate_without_ceilings_needs_no_measuring() -> None:
    one = [Candidate("a", "onnx"), Candidate("b", "tflite", installed=False)]
    assert to_measure(one, SlotPolicy()) == [] and choose(one, SlotPolicy()).chosen == "a"
    assert to_measure(one, SlotPolicy(max_latency_ms=1.0)) == ["a"]
    assert to_measure(one, SlotPolicy(memory_bytes=MIB)) == ["a"]
    assert choose(one, SlotPolicy(max_latency_ms=1.0)).chosen == "", "what was not measured keeps no ceiling"


def test_a_variant_that_does_not_run_lets_those_of_lower_quality_in() -> None:
    good, poor = Candidate("good", "onnx", 0.9), Candidate("poor", "onnx", 0.5)
    assert to_measure([good, poor], SlotPolicy(max_latency_ms=1.0)) == ["good"]
    broken = replace(good, fault="does not load")
    assert to_measure([broken, poor], SlotPolicy(max_latency_ms=1.0)) == ["poor"]


def test_the_reason_names_the_variant_that_came_nearest() -> None:
    slow = Candidate("slow", "onnx", p50_ms=4.0, p95_ms=5.0, memory_bytes=10 * MIB)
    slower = Candidate("slower", "onnx", p50_ms=8.0, p95_ms=9.0, memory_bytes=10 * MIB)
    choice = choose([slower, slow], SlotPolicy(max_latency_ms=2.0))
    assert (choice.reason, choice.measured, choice.limit) == ("LatencyCeiling", 5.0, 2.0)
    assert "slow: p95 latency 5 ms, limit 2 ms" in choice.message
    large = choose([slow, slower], SlotPolicy(max_latency_ms=2.0, memory_bytes=5 * MIB))
    assert (large.reason, large.measured, large.limit) == ("MemoryCeiling", 10.0 * MIB, 5.0 * MIB)
    none = choose([Candidate("a", "tflite", installed=False)], SlotPolicy())
    assert none.reason == "NoRuntime" and "tflite" in none.message
    broken = choose([Candidate("a", "onnx", fault="x" * 999)], SlotPolicy())
    assert broken.reason == "NotRunnable" and len(broken.table[0].reason) <= 200
