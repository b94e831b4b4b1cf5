"""Conditions of actions: a subset of the Common Expression Language, evaluated over whole windows.

    expression := or ;  or := and ("||" and)* ;  and := relation ("&&" relation)*
    relation   := sum (("==" | "!=" | "<" | "<=" | ">" | ">=") sum | "in" "[" or ("," or)* "]")?
    sum        := product (("+" | "-") product)* ;  product := unary (("*" | "/" | "%") unary)*
    unary      := ("!" | "-") unary | primary
    primary    := number | "true" | "false" | "(" or ")" | name ("[" integer "]")? | function "(" or ("," or)* ")"
    function   := "abs" | "min" | "max"

Names stand for columns of numbers. As in CEL a comparison with NaN is false (`!=` is true); a division
by zero gives NaN or infinity rather than an error, so that one row does not stop the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeward.errors import InvalidDocument

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_LENGTH = 1000
MAX_DEPTH = 50

Columns = Mapping[str, Any]
Evaluate = Callable[[Columns], Any]

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_][A-Za-z0-9_.:]*)"
    r"|(?P<sign>\|\||&&|==|!=|<=|>=|[-+*/%<>!()\[\],]))"
)
_FUNCTIONS = {"abs": (1, 1), "min": (2, 16), "max": (2, 16)}


@dataclass(frozen=True)
class Condition:
    """`names` are the columns it needs; `name[i]` is column `i` of an output."""

    text: str
    names: frozenset[str]
    _evaluate: Evaluate

    def evaluate(self, columns: Columns) -> npt.NDArray[np.bool_]:
        """Truth per row. `columns` holds arrays `[n]` or numbers for all `names`; the result is `[n]`,
        or of no dimension when no array is named."""
        import numpy as np

        with np.errstate(all="ignore"):
            return np.asarray(_truth(self._evaluate(columns)), dtype=np.bool_)


def compile_condition(text: str) -> Condition:
    """Raises InvalidDocument saying what is wrong, and where."""
    if len(text) > MAX_LENGTH:
        raise InvalidDocument(f"a condition of {len(text)} characters, at most {MAX_LENGTH}")
    parser = _Parser(text)
    evaluate = parser.whole()
    return Condition(text, frozenset(parser.names), evaluate)


def _truth(value: Any) -> Any:
    """CEL has no truth of numbers; here a bare number is true when it is not zero, NaN is false."""
    import numpy as np

    array = np.asarray(value)
    return array if array.dtype == np.bool_ else (array != 0) & ~np.isnan(array)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._split(text)
        self._at = 0
        self._depth = 0
        self.names: set[str] = set()

    def _split(self, text: str) -> list[tuple[str, str, int]]:
        tokens, at = [], 0
        end = len(text.rstrip())
        while at < end:
            match = _TOKEN.match(text, at)
            if match is None:
                start = at + len(text[at:]) - len(text[at:].lstrip())
                raise InvalidDocument(
                    f"{text[start : start + 10]!r} at character {start + 1} is no part of a condition",
                    hint="e.g. score > 0.8 && temperature > 60",
                )
            kind = match.lastgroup or ""
            tokens.append((kind, match[kind], match.start(kind) + 1))
            at = match.end()
        return [*tokens, ("end", "", len(text) + 1)]

    def whole(self) -> Evaluate:
        evaluate = self._or()
        kind, text, where = self._tokens[self._at]
        if kind != "end":
            raise InvalidDocument(f"did not expect {text!r} at character {where}")
        return evaluate

    def _next(self, *signs: str) -> str:
        """The next token's sign, taken, when it is one of these; else empty."""
        kind, text, _ = self._tokens[self._at]
        if kind != "end" and text in signs:
            self._at += 1
            return text
        return ""

    def _need(self, sign: str) -> None:
        _, text, where = self._tokens[self._at]
        if not self._next(sign):
            raise InvalidDocument(f"expected {sign!r} at character {where}, got {text or 'the end'!r}")

    def _or(self) -> Evaluate:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise InvalidDocument(f"nested deeper than {MAX_DEPTH}")
        left = self._and()
        while self._next("||"):
            left = _both(left, self._and(), lambda one, other: _truth(one) | _truth(other))
        self._depth -= 1
        return left

    def _and(self) -> Evaluate:
        left = self._relation()
        while self._next("&&"):
            left = _both(left, self._relation(), lambda one, other: _truth(one) & _truth(other))
        return left

    def _relation(self) -> Evaluate:
        left = self._sum()
        sign = self._next("==", "!=", "<", "<=", ">", ">=", "in")
        if sign == "in":
            self._need("[")
            options = self._list("]")
            return lambda columns: _one_of(left(columns), [option(columns) for option in options])
        return _both(left, self._sum(), _COMPARE[sign]) if sign else left

    def _sum(self) -> Evaluate:
        left = self._product()
        while sign := self._next("+", "-"):
            left = _both(left, self._product(), _ARITHMETIC[sign])
        return left

    def _product(self) -> Evaluate:
        left = self._unary()
        while sign := self._next("*", "/", "%"):
            left = _both(left, self._unary(), _ARITHMETIC[sign])
        return left

    def _unary(self) -> Evaluate:
        signs = []
        while sign := self._next("!", "-"):
            signs.append(sign)
        value = self._primary()
        for sign in reversed(signs):
            value = _negate(value) if sign == "-" else _invert(value)
        return value

    def _list(self, end: str) -> list[Evaluate]:
        items = [self._or()]
        while self._next(","):
            items.append(self._or())
        self._need(end)
        return items

    def _primary(self) -> Evaluate:
        kind, text, where = self._tokens[self._at]
        self._at += 1
        if kind == "number":
            number = float(text)
            return lambda columns: number
        if text == "(":
            inside = self._or()
            self._need(")")
            return inside
        if kind == "name" and text in ("true", "false"):
            truth = text == "true"
            return lambda columns: truth
        if kind == "name" and text in _FUNCTIONS and self._next("("):
            return self._call(text, where)
        if kind == "name":
            name = text
            if self._next("["):
                index_kind, index, at = self._tokens[self._at]
                if index_kind != "number" or not index.isdigit():
                    raise InvalidDocument(f"expected a column number at character {at}, got {index!r}")
                self._at += 1
                self._need("]")
                name = f"{text}[{int(index)}]"
            self.names.add(name)
            return lambda columns: columns[name]
        raise InvalidDocument(f"did not expect {text or 'the end'!r} at character {where}")

    def _call(self, function: str, where: int) -> Evaluate:
        arguments = self._list(")")
        low, high = _FUNCTIONS[function]
        if not low <= len(arguments) <= high:
            raise InvalidDocument(
                f"{function} at character {where} takes {low if low == high else f'{low} to {high}'} values, "
                f"got {len(arguments)}"
            )
        return lambda columns: _FUNCTION[function]([argument(columns) for argument in arguments])


def _both(left: Evaluate, right: Evaluate, join: Callable[[Any, Any], Any]) -> Evaluate:
    return lambda columns: join(left(columns), right(columns))


def _negate(value: Evaluate) -> Evaluate:
    return lambda columns: -_number(value(columns))


def _invert(value: Evaluate) -> Evaluate:
    return lambda columns: ~_truth(value(columns))


def _number(value: Any) -> Any:
    import numpy as np

    return np.asarray(value, dtype=np.float64)


def _one_of(value: Any, options: list[Any]) -> Any:
    import numpy as np

    found = _number(value) == _number(options[0])
    for option in options[1:]:
        found = np.logical_or(found, _number(value) == _number(option))
    return found


def _extreme(values: list[Any], *, largest: bool) -> Any:
    import numpy as np

    result = _number(values[0])
    for value in values[1:]:
        result = np.maximum(result, _number(value)) if largest else np.minimum(result, _number(value))
    return result


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": lambda one, other: _number(one) == _number(other),
    "!=": lambda one, other: _number(one) != _number(other),
    "<": lambda one, other: _number(one) < _number(other),
    "<=": lambda one, other: _number(one) <= _number(other),
    ">": lambda one, other: _number(one) > _number(other),
    ">=": lambda one, other: _number(one) >= _number(other),
}
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda one, other: _number(one) + _number(other),
    "-": lambda one, other: _number(one) - _number(other),
    "*": lambda one, other: _number(one) * _number(other),
    "/": lambda one, other: _number(one) / _number(other),
    "%": lambda one, other: _remainder(_number(one), _number(other)),
}
_FUNCTION: dict[str, Callable[[list[Any]], Any]] = {
    "abs": lambda values: abs(_number(values[0])),
    "min": lambda values: _extreme(values, largest=False),
    "max": lambda values: _extreme(values, largest=True),
}


def _remainder(one: Any, other: Any) -> Any:
    """With the sign of the dividend, as CEL and C have it."""
    import numpy as np

    return np.fmod(one, other)
