"""Conditions against a reference that evaluates one row at a time."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward import conditions
from edgeward.conditions import compile_condition
from edgeward.errors import InvalidDocument
from edgeward.wire.stream_checks import check_stream
from edgeward.wire.streams import Action, HttpSource, Source, StreamSpec

Tree = tuple[Any, ...]
COLUMNS = ("a", "score[1]", "`pump.flow`")
POWER = {"||": 1, "&&": 2, "==": 3, "!=": 3, "<": 3, "<=": 3, ">": 3, ">=": 3, "in": 3, "+": 4, "-": 4, "*": 5,
         "/": 5, "%": 5, "!": 6, "neg": 6}  # fmt: skip


def text(tree: Tree, above: int = 0) -> str:
    """With no more parentheses than the precedence needs."""
    kind, *parts = tree
    if kind in ("number", "name", "truth"):
        return str(parts[0])
    if kind in ("abs", "has", "min", "max"):
        return f"{kind}({', '.join(text(part) for part in parts)})"
    own = POWER[kind]
    if kind == "in":
        result = f"{text(parts[0], own + 1)} in [{', '.join(text(part) for part in parts[1:])}]"
    elif kind in ("!", "neg"):
        result = ("!" if kind == "!" else "-") + text(parts[0], own + 1)
    else:
        result = f"{text(parts[0], own + (own == 3))} {kind} {text(parts[1], own + 1)}"
    return f"({result})" if own < above else result


def value(tree: Tree, row: dict[str, float]) -> Any:
    kind, *parts = tree
    if kind == "number":
        return float(parts[0])
    if kind == "truth":
        return parts[0] == "true"
    if kind == "name":
        return row[parts[0].strip("`")]
    values = [value(part, row) for part in parts]
    if kind in ("&&", "||", "!"):
        truths = [bool(item) and not math.isnan(item) for item in values]
        return {"&&": all, "||": any, "!": lambda items: not items[0]}[kind](truths)
    first, *others = values
    if kind == "neg":
        return -first
    if kind in ("abs", "min", "max"):
        if any(math.isnan(item) for item in values):
            return math.nan
        return abs(first) if kind == "abs" else {"min": min, "max": max}[kind](values)
    if kind == "has":
        return not math.isnan(first)
    if kind == "in":
        return any(first == other for other in others)
    other = others[0]
    if POWER[kind] == 3 and (math.isnan(first) or math.isnan(other)):
        return False
    if kind in ("/", "%"):
        if other == 0 or math.isnan(first) or math.isnan(other):
            return math.nan
        return first / other if kind == "/" else (math.nan if math.isinf(first) else math.fmod(first, other))
    return {
        "==": lambda: first == other, "!=": lambda: first != other, "<": lambda: first < other,
        "<=": lambda: first <= other, ">": lambda: first > other, ">=": lambda: first >= other,
        "+": lambda: first + other, "-": lambda: first - other, "*": lambda: first * other,
    }[kind]()  # fmt: skip


NAMES = st.sampled_from(COLUMNS).map(lambda name: ("name", name))
NUMBERS = st.recursive(
    st.one_of(NAMES, st.sampled_from(["0", "1", "2.5", ".5", "3.", "1e2"]).map(lambda n: ("number", n))),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["+", "-", "*", "/", "%"]), inner, inner),
        st.tuples(st.sampled_from(["neg", "abs"]), inner),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner),
    ),
    max_leaves=6,
)
TRUTHS = st.recursive(
    st.one_of(
        NAMES,
        st.sampled_from(["true", "false"]).map(lambda t: ("truth", t)),
        st.tuples(st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), NUMBERS, NUMBERS),
        st.tuples(st.just("in"), NUMBERS, NUMBERS, NUMBERS),
        st.tuples(st.just("has"), NUMBERS),
    ),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["&&", "||"]), inner, inner), st.tuples(st.just("!"), inner)
    ),
    max_leaves=6,
)
READING = st.sampled_from([0.0, 1.0, -1.0, 2.5, -7.0, 100.0, math.nan, math.inf])


@settings(deadline=None, max_examples=500)
@given(tree=TRUTHS, rows=st.lists(st.tuples(READING, READING, READING), min_size=1, max_size=5))
def test_columns_give_what_single_rows_give(tree: Tree, rows: list[tuple[float, float, float]]) -> None:
    names = [name.strip("`") for name in COLUMNS]
    condition = compile_condition(text(tree))
    got = condition.evaluate(dict(zip(names, np.array(rows).T, strict=True)))
    expected = []
    for row in rows:
        single = value(tree, dict(zip(names, row, strict=True)))
        expected.append(bool(single) and not math.isnan(single))
    assert got.dtype == np.bool_ and got.tolist() == expected, condition.text


@settings(deadline=None, max_examples=300)
@given(st.text("ab10.()[]!&|=<>+-*/%,` intruemx\t", max_size=60))
def test_any_text_compiles_or_is_refused_in_words(junk: str) -> None:
    try:
        condition = compile_condition(junk, field="f")
    except InvalidDocument as error:
        assert error.field == "f"
    else:
        assert condition.evaluate({name: np.ones(2) for name in (*condition.names, "rows")}).shape == (2,)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("", "expected a value at 'the end', character 1"),
        ("a >", "expected a value at 'the end', character 4"),
        ("a > 1 b", "expected an operator or the end at 'b', character 7"),
        ("a > 1 ? 2", r"unknown sign at '\?', character 7"),
        ("(a > 1", r"expected '\)'"),
        ("a = 1", "unknown sign at '='"),
        ("1 < a < 2", "comparisons do not chain"),
        ("1 < a in [1]", "comparisons do not chain"),
        ("a + 1", "expected a condition, not a number"),
        ("1", "expected a condition, not a number"),
        ("a && 1", "expected a condition, not a number at '&&'"),
        ("!(a + 1)", "expected a condition, not a number at '!'"),
        ("(a > 1) + 1 > 2", r"expected a number, not a condition at '\+'"),
        ("-true", "expected a number, not a condition"),
        ("(a > 1) in [1]", "expected a number, not a condition at 'in'"),
        ("a in 1", r"expected '\['"),
        ("a in []", "expected a value"),
        ("in > 1", "expected a value at 'in'"),
        ("abs(1, 2) > 1", r"expected one value for abs\(\)"),
        ("has(1, 2)", r"expected one value for has\(\)"),
        ("has(a) > 1", "expected a number, not a condition"),
        ("eval(a) > 1", "unknown function; there are abs, has, min, max at 'eval'"),
        ("__import__('os')", 'unknown sign at "\'"'),
        ("a.b > 1", r"unknown sign at '\.'"),
        ("a[b] > 1", "expected the number of a column"),
        ("a[1.5] > 1", "expected the number of a column"),
        ("1x > 1", "unknown sign at '1'"),
        ("(" * 41 + "a" + ")" * 41, "nested deeper than 40"),
        ("!" * 41 + "a", "nested deeper than 40"),
        ("||".join("a" * 151), "more than 300 names, numbers and signs"),
        ("a" * 1001, "longer than 1000 characters"),
    ],
)
def test_wrong_conditions_say_where(wrong: str, problem: str) -> None:
    with pytest.raises(InvalidDocument, match=problem):
        compile_condition(wrong)


def test_the_longest_chain_is_evaluated() -> None:
    longest = compile_condition("+".join("a" * 148) + " > 147")
    assert longest.evaluate({"a": np.ones(3)}).tolist() == [True] * 3
    assert compile_condition("!" * 38 + "a").evaluate({"a": np.ones(1)}).tolist() == [True]
    assert conditions.MAX_TOKENS == 300


def test_names_are_the_columns_read() -> None:
    condition = compile_condition("score[ 01 ] > 0.8 && min(temperature, `in`) > 6 || alarm")
    assert condition.names == {"score[1]", "temperature", "in", "alarm"}


def test_scalars_and_other_columns_give_the_number_of_rows() -> None:
    assert compile_condition("a > 1").evaluate({"a": 2.0}).tolist() == [True]
    assert compile_condition("a > 1").evaluate({"a": 2.0, "b": np.zeros(3)}).tolist() == [True] * 3
    assert compile_condition("true").evaluate({"b": np.zeros(0)}).tolist() == []
    flags = {"alarm": np.array([True, False])}
    assert compile_condition("alarm == false").evaluate(flags).tolist() == [False, True]
    assert compile_condition("-alarm < 0").evaluate(flags).tolist() == [True, False]


def test_numbers_of_any_type_are_doubles() -> None:
    columns = {"a": np.array([200], np.uint8), "b": np.array([100], np.uint8)}
    assert compile_condition("a + b == 300 && b - a == -100 && b / a == 0.5").evaluate(columns).tolist() == [
        True
    ]


def test_a_name_that_does_not_exist_is_named() -> None:
    with pytest.raises(InvalidDocument, match=r"'socre' in 'socre > 1' is neither .* \(there are score\)"):
        compile_condition("socre > 1").evaluate({"score": np.ones(2)})


def test_the_resource_is_refused_with_the_field() -> None:
    actions = [Action("one", publish="t"), Action("two", when="score >", publish="t")]
    with pytest.raises(InvalidDocument, match=r"spec\.actions\[1\]\.when: expected a value") as caught:
        check_stream(StreamSpec(Source(http=HttpSource()), ["a"], actions=actions))
    assert caught.value.field == "spec.actions[1].when"


def test_checking_a_condition_needs_no_numpy() -> None:
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "from edgeward.wire import stream_checks\n"
        "stream_checks.compile_condition('score > 1 && alarm')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
