"""Event times as sensors write them, in microseconds since 1970."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgeward.wire.streams import TimeUnit

NO_TIME: Final = -1

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)
_LIMIT_S = 10**11
_PER_SECOND: dict[TimeUnit, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def microseconds(value: Any, unit: TimeUnit) -> int:
    """`value` as microseconds since 1970, or NO_TIME.

    Numbers are in `unit`; a text is one only for `iso8601`, where a time without a zone is UTC.
    """
    if isinstance(value, datetime.datetime):
        return _of_datetime(value)
    if unit == "iso8601":
        return _of_text(value) if isinstance(value, str) else NO_TIME
    per_second = _PER_SECOND[unit]
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value < _LIMIT_S * per_second
    ):
        return NO_TIME
    if isinstance(value, int):
        return value * 10**6 // per_second
    return round(value / 1000 if unit == "ns" else value * (10**6 // per_second))


def column(values: Sequence[Any], unit: TimeUnit) -> npt.NDArray[np.int64]:
    """`microseconds` of each value, int64 `[n]`."""
    kinds = set(map(type, values))
    if unit != "iso8601" and kinds == {float}:
        per_second = _PER_SECOND[unit]
        numbers = np.array(values, dtype=np.float64)
        good = (numbers >= 0) & (numbers < _LIMIT_S * per_second)
        numbers = np.where(good, numbers, 0.0)
        scaled = numbers / 1000 if unit == "ns" else numbers * (10**6 // per_second)
        return np.where(good, np.rint(scaled), NO_TIME).astype(np.int64)
    return np.array([microseconds(value, unit) for value in values], dtype=np.int64)


def of_cells(cells: Sequence[str], unit: TimeUnit) -> npt.NDArray[np.int64]:
    """Event times of a table's text cells, int64 `[n]`; NO_TIME where a cell is none."""
    if unit == "iso8601":
        return column(cells, unit)
    return column([_number(cell) for cell in cells], unit)


def describe(unit: TimeUnit) -> str:
    return "not an ISO 8601 time" if unit == "iso8601" else f"not a time in {_NAMES[unit]} since 1970"


_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


def _of_datetime(value: datetime.datetime) -> int:
    aware = value if value.tzinfo is not None else value.replace(tzinfo=datetime.UTC)
    at = (aware - _EPOCH) // _MICROSECOND
    return at if 0 <= at < _LIMIT_S * 10**6 else NO_TIME


def _of_text(text: str) -> int:
    try:
        return _of_datetime(datetime.datetime.fromisoformat(text.strip()))
    except (ValueError, OverflowError):
        return NO_TIME


def _number(cell: str) -> int | float | None:
    # Whole numbers stay whole: nanoseconds do not fit a float.
    text = cell.strip()
    if text.isascii() and text.isdigit() and len(text) <= 20:
        return int(text)
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        return None
