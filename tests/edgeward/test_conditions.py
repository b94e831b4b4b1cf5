"""Conditions over columns agree with what they say for each row, and nothing else gets through."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.conditions import MAX_DEPTH, compile_condition
from edgeward.errors import InvalidDocument

numbers = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 2))


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> tuple[str, Any]:
    """A condition's text and a plain function of one row that means the same."""
    if depth == 0 or draw(st.booleans()):
        left, right = draw(terms(2)), draw(terms(2))
        sign = draw(st.sampled_from(["==", "!=", "<", "<=", ">", ">="]))
        compare = {
            "==": lambda a, b: a == b, "!=": lambda a, b: a != b, "<": lambda a, b: a < b,
            "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
        }[sign]  # fmt: skip
        return f"{left[0]} {sign} {right[0]}", lambda row: compare(left[1](row), right[1](row))
    one, other = draw(expressions(depth - 1)), draw(expressions(depth - 1))
    match draw(st.sampled_from(["&&", "||", "!", "()"])):
        case "&&":
            return f"({one[0]}) && ({other[0]})", lambda row: one[1](row) and other[1](row)
        case "||":
            return f"({one[0]}) || ({other[0]})", lambda row: one[1](row) or other[1](row)
        case "!":
            return f"!({one[0]})", lambda row: not one[1](row)
        case _:
            return f"({one[0]})", one[1]


@st.composite
def terms(draw: st.DrawFn, depth: int) -> tuple[str, Any]:
    if depth == 0 or draw(st.booleans()):
        if draw(st.booleans()):
            name = draw(st.sampled_from(["a", "b", "out[1]"]))
            return name, lambda row: row[name]
        number = abs(draw(numbers))
        return repr(number), lambda row: number
    one, other = draw(terms(depth - 1)), draw(terms(depth - 1))
    match draw(st.sampled_from(["+", "-", "*", "neg", "abs", "max"])):
        case "neg":
            return f"-({one[0]})", lambda row: -one[1](row)
        case "abs":
            return f"abs({one[0]})", lambda row: abs(one[1](row))
        case "max":
            return f"max({one[0]}, {other[0]})", lambda row: max(one[1](row), other[1](row))
        case "+":
            return f"({one[0]} + {other[0]})", lambda row: one[1](row) + other[1](row)
        case "-":
            return f"({one[0]} - {other[0]})", lambda row: one[1](row) - other[1](row)
        case _:
            return f"({one[0]} * {other[0]})", lambda row: one[1](row) * other[1](row)


@settings(max_examples=200, deadline=None)
@given(expressions(), st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=5))
def test_a_condition_over_columns_says_what_it_says_for_each_row(
    expression: tuple[str, Any], rows: list[tuple[float, float, float]]
) -> None:
    text, meant = expression
    names = ["a", "b", "out[1]"]
    columns = {name: np.array([row[index] for row in rows]) for index, name in enumerate(names)}
    condition = compile_condition(text)
    got = np.broadcast_to(condition.evaluate(columns), (len(rows),)).tolist()
    assert got == [meant(dict(zip(names, row, strict=True))) for row in rows]
    assert condition.names <= set(names)


def test_precedence_and_the_rest_of_the_language() -> None:
    columns = {
        "x": np.array([1.0, 2.0, math.nan]),
        "score": np.array([0.9, 0.1, 0.9]),
        "alarm": np.array([True, False, True]),
    }

    def says(text: str) -> list[bool]:
        return np.broadcast_to(compile_condition(text).evaluate(columns), (3,)).tolist()

    assert says("1 + 2 * 3 == 7 && 10 - 2 - 3 == 5") == [True] * 3
    assert says("alarm") == [True, False, True]
    assert says("!alarm || score < 0.5") == [False, True, False]
    assert says("x in [2, 5]") == [False, True, False]
    assert says("x > 0 || x <= 0") == [True, True, False], "NaN compares false"
    assert says("x != 1") == [False, True, True]
    assert says("x / 0 > 5") == [True, True, False]
    assert says("-7 % 4 == -3 && --x == x") == [True, True, False]
    assert says("min(x, score, 3) < 0.5") == [False, True, False]
    assert says("1e-3 < .5 && true && !false") == [True] * 3
    assert compile_condition("score > 0.8 && out[2] > temp.inner").names == {"score", "out[2]", "temp.inner"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "did not expect 'the end'"),
        ("score >", "did not expect 'the end'"),
        ("score > 0.8 &", "'&' at character 13"),
        ("score ) 1", "did not expect '\\)'"),
        ("__import__('os')", "\"'os'"),
        ("score > 'x'", "no part of a condition"),
        ("a.__class__", None),
        ("abs(1, 2) > 0", "abs at character 1 takes 1 values, got 2"),
        ("f(1)", "did not expect '\\('"),
        ("x in 3", "expected '\\['"),
        ("x in []", "did not expect '\\]'"),
        ("out[x] > 1", "expected a column number"),
        ("a < b < c", "did not expect '<'"),
        ("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1), "nested deeper"),
        ("1 +" * 500 + "1", "at most 1000"),
    ],
)
def test_what_is_no_condition_is_refused_with_the_place(text: str, says: str | None) -> None:
    if says is None:
        # An attribute is no more than a name: it must be a column, or the stream is refused.
        assert compile_condition(text).names == {text}
        return
    with pytest.raises(InvalidDocument, match=says):
        compile_condition(text)


@given(st.text(max_size=60))
def test_any_text_is_a_condition_or_refused(text: str) -> None:
    try:
        condition = compile_condition(text)
    except InvalidDocument:
        return
    condition.evaluate(dict.fromkeys(condition.names, 1.0))
