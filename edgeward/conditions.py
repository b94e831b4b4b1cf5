"""Conditions over a window's columns: a subset of CEL, evaluated for all rows at once.

`||`, `&&`, `!`, `==`, `!=`, `<`, `<=`, `>`, `>=`, `x in [1, 2]`, `+`, `-`, `*`, `/`, `%`, unary `-`,
parentheses, `abs(x)`, `min(x, ...)`, `max(x, ...)`, `has(x)` (x is a number), numbers, `true`, `false`,
and names: a column, or `name[i]` for column i of an output (the column called "name[i]"). A name that is
not a word stands between backquotes, as in CEL. Precedence is CEL's; comparisons do not chain. All numbers
are doubles: `/` never truncates and `%` takes the sign of its left side.

What is not a number compares false, with `!=` and `in` too, and division by zero gives not-a-number, so
a missing reading never fires an action; only `!` makes true of such a comparison. Types are checked when
the text is compiled: `&&`, `||` and `!` take conditions, arithmetic takes numbers. A column used as a
condition (`alarm`) is true where it is neither zero nor not-a-number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeward.errors import InvalidDocument

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_LENGTH = 1000
MAX_TOKENS = 300
MAX_DEPTH = 40

Columns = Mapping[str, Any]
_Evaluate = Callable[[Columns], Any]

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])"
    r"|(?P<name>[A-Za-z_]\w*)|`(?P<quoted>[^`]+)`|(?P<sign>\|\||&&|==|!=|<=|>=|[<>!+\-*/%()\[\],]))",
    re.ASCII,
)
_FUNCTIONS = ("abs", "has", "min", "max")
_COMPARISONS = ("==", "!=", "<", "<=", ">", ">=", "in")
_POWER = {"||": 1, "&&": 2, **dict.fromkeys(_COMPARISONS, 3), "+": 4, "-": 4, "*": 5, "/": 5, "%": 5}
_UNARY = 6


class _Token(NamedTuple):
    kind: str  # number, name, quoted (a name), sign or end
    text: str
    at: int


class _Term(NamedTuple):
    """A part of the condition: `kind` is what it gives, `number` or `truth`, or `name`, which is either."""

    kind: str
    evaluate: _Evaluate


class Condition:
    """A compiled condition. `names` are the columns that it reads."""

    def __init__(self, text: str, names: frozenset[str], evaluate: _Evaluate) -> None:
        self.text = text
        self.names = names
        self._evaluate = evaluate

    def evaluate(self, columns: Columns) -> npt.NDArray[np.bool_]:
        """For each row whether the condition holds, bool `[n]`.

        `columns` gives `names` as numbers or truths, each an array `[n]` or one value for all rows; further
        ones are not looked at, except that they say what n is where the condition reads no array (without
        any array, n is 1). Raises InvalidDocument when a name is not among them.
        """
        import numpy as np

        lacking = sorted(self.names - columns.keys())
        if lacking:
            raise InvalidDocument(
                f"{lacking[0]!r} in {self.text!r} is neither an output nor a feature",
                hint=f"there are {', '.join(sorted(columns)) or 'none'}",
            )
        with np.errstate(all="ignore"):
            result = np.asarray(self._evaluate(columns), np.bool_)
        if result.ndim == 0:
            count = next((len(column) for column in columns.values() if np.ndim(column)), 1)
            result = np.full(count, result)
        return result


def compile_condition(text: str, *, field: str = "") -> Condition:
    """Raises InvalidDocument that names `field` and says where the text goes wrong."""
    return _Parser(text, field).condition()


class _Parser:
    """Top-down operator precedence (Pratt 1973)."""

    def __init__(self, text: str, field: str) -> None:
        self._text = text
        self._field = field
        self._names: set[str] = set()
        self._depth = 0
        if len(text) > MAX_LENGTH:
            raise InvalidDocument(f"longer than {MAX_LENGTH} characters", field=field)
        self._tokens = self._split()
        self._place = 0

    def condition(self) -> Condition:
        term = self._truth(self._expression(0), self._tokens[0])
        if self._next.kind != "end":
            raise self._wrong(self._next, "expected an operator or the end")
        return Condition(self._text, frozenset(self._names), term)

    def _split(self) -> list[_Token]:
        tokens: list[_Token] = []
        at, end = 0, len(self._text.rstrip())
        while at < end:
            found = _TOKEN.match(self._text, at)
            if found is None:
                begin = at + len(self._text[at:]) - len(self._text[at:].lstrip())
                raise self._wrong(_Token("sign", self._text[begin], begin), "unknown sign")
            kind = found.lastgroup or ""
            tokens.append(_Token(kind, found[kind], found.start(kind)))
            at = found.end()
            # Each operator may be one more call deep when the condition is evaluated.
            if len(tokens) > MAX_TOKENS:
                raise InvalidDocument(f"more than {MAX_TOKENS} names, numbers and signs", field=self._field)
        return [*tokens, _Token("end", "the end", end)]

    def _wrong(self, token: _Token, problem: str) -> InvalidDocument:
        return InvalidDocument(
            f"{problem} at {token.text!r}, character {token.at + 1} of the condition",
            field=self._field,
            hint="e.g. score > 0.8 && temperature > 60",
        )

    @property
    def _next(self) -> _Token:
        return self._tokens[self._place]

    def _take(self) -> _Token:
        token = self._next
        self._place += token.kind != "end"
        return token

    def _expect(self, text: str) -> None:
        token = self._take()
        if token.text != text or token.kind != "sign":
            raise self._wrong(token, f"expected {text!r}")

    def _expression(self, power: int) -> _Term:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._wrong(self._next, f"nested deeper than {MAX_DEPTH}")
        left = self._first()
        while (own := self._power_of(self._next)) > power:
            token = self._take()
            left = self._is_in(left, token) if token.kind == "name" else self._binary(left, token, own)
            if own == _POWER["in"] == self._power_of(self._next):
                raise self._wrong(self._next, "comparisons do not chain; join them with &&")
        self._depth -= 1
        return left

    def _power_of(self, token: _Token) -> int:
        word = token.kind == "name" and token.text == "in"
        return _POWER.get(token.text, 0) if token.kind == "sign" or word else 0

    def _first(self) -> _Term:
        token = self._take()
        if token.kind == "number":
            value = float(token.text)
            return _Term("number", lambda columns: value)
        if token.text == "(":
            inner = self._expression(0)
            self._expect(")")
            return inner
        if token.text == "!":
            truth = self._truth(self._expression(_UNARY), token)
            return _Term("truth", lambda columns: _numpy().logical_not(truth(columns)))
        if token.text == "-":
            number = self._number(self._expression(_UNARY), token)
            return _Term("number", lambda columns: -number(columns))
        if token.kind == "name":
            return self._word(token)
        if token.kind == "quoted":
            return self._column(token)
        raise self._wrong(token, "expected a value")

    def _word(self, token: _Token) -> _Term:
        name = token.text
        if name in ("true", "false"):
            return _Term("truth", lambda columns: name == "true")
        if name in _FUNCTIONS:
            return self._call(token)
        if name == "in":
            raise self._wrong(token, "expected a value")
        if self._next.text == "(":
            raise self._wrong(token, f"unknown function; there are {', '.join(_FUNCTIONS)}")
        return self._column(token)

    def _column(self, token: _Token) -> _Term:
        name = token.text
        if self._next.text == "[" and self._next.kind == "sign":
            self._take()
            index = self._take()
            if index.kind != "number" or not index.text.isdigit():
                raise self._wrong(index, "expected the number of a column")
            self._expect("]")
            name = f"{name}[{int(index.text)}]"
        self._names.add(name)
        return _Term("name", lambda columns: columns[name])

    def _call(self, token: _Token) -> _Term:
        self._expect("(")
        values = self._values(token, ")")
        if token.text in ("abs", "has") and len(values) != 1:
            raise self._wrong(token, f"expected one value for {token.text}()")
        if token.text == "has":
            return _Term("truth", lambda columns: values[0](columns) == values[0](columns))
        if token.text == "abs":
            return _Term("number", lambda columns: abs(values[0](columns)))
        # Not fmin and fmax: the extreme of an unknown number is unknown.
        reduce = "minimum" if token.text == "min" else "maximum"

        def extreme(columns: Columns) -> Any:
            result = values[0](columns)
            for value in values[1:]:
                result = getattr(_numpy(), reduce)(result, value(columns))
            return result

        return _Term("number", extreme)

    def _values(self, token: _Token, close: str) -> list[_Evaluate]:
        """Numbers between commas up to the closing sign, at least one."""
        values = [self._number(self._expression(0), token)]
        while self._next.text == ",":
            self._take()
            values.append(self._number(self._expression(0), token))
        self._expect(close)
        return values

    def _is_in(self, left: _Term, token: _Token) -> _Term:
        value = self._number(left, token)
        self._expect("[")
        items = self._values(token, "]")

        def contains(columns: Columns) -> Any:
            result: Any = False
            for item in items:
                result = result | (value(columns) == item(columns))
            return result

        return _Term("truth", contains)

    def _binary(self, left: _Term, token: _Token, power: int) -> _Term:
        right = self._expression(power)
        if token.text in ("||", "&&"):
            one, other = self._truth(left, token), self._truth(right, token)
            both = token.text == "&&"
            return _Term(
                "truth",
                (lambda columns: one(columns) & other(columns))
                if both
                else (lambda columns: one(columns) | other(columns)),
            )
        if token.text in ("==", "!=") and "truth" in (left.kind, right.kind):
            one, other = self._truth(left, token), self._truth(right, token)
            same = token.text == "=="
            return _Term("truth", lambda columns: (one(columns) == other(columns)) == same)
        one, other = self._number(left, token), self._number(right, token)
        apply = _BINARY[token.text]
        kind = "truth" if token.text in _COMPARISONS else "number"
        return _Term(kind, lambda columns: apply(one(columns), other(columns)))

    def _number(self, term: _Term, token: _Token) -> _Evaluate:
        if term.kind == "truth":
            raise self._wrong(token, "expected a number, not a condition")
        if term.kind == "number":
            return term.evaluate
        return lambda columns: _numpy().asarray(term.evaluate(columns), float)

    def _truth(self, term: _Term, token: _Token) -> _Evaluate:
        if term.kind == "number":
            raise self._wrong(token, "expected a condition, not a number")
        if term.kind == "truth":
            return term.evaluate

        def holds(columns: Columns) -> Any:
            value = _numpy().asarray(term.evaluate(columns))
            return (value != 0) & (value == value)  # false for not-a-number

        return holds


def _numpy() -> Any:
    # The base install, which checks documents only, has no numpy.
    import numpy as np

    return np


def _divide(one: Any, other: Any) -> Any:
    np = _numpy()
    return np.where(np.asarray(other) == 0, np.nan, np.true_divide(one, other))


def _remainder(one: Any, other: Any) -> Any:
    return _numpy().fmod(one, other)


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda one, other: one + other,
    "-": lambda one, other: one - other,
    "*": lambda one, other: one * other,
    "/": _divide,
    "%": _remainder,
    "==": lambda one, other: one == other,
    # Both sides must be numbers for a difference to be known.
    "!=": lambda one, other: (one < other) | (one > other),
    "<": lambda one, other: one < other,
    "<=": lambda one, other: one <= other,
    ">": lambda one, other: one > other,
    ">=": lambda one, other: one >= other,
}
