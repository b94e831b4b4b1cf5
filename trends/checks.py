"""Which well-typed rows cannot be stored, and why. Pure."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

from edgeward.wire.rows import AHEAD_US, EARLIEST_US, Row
from edgeward.wire.topics import Lane

MAX_TEXT = 256
MAX_NAMES = 4096
#: More than a KLL sketch of any accuracy that the agent makes.
MAX_SKETCH = 1 << 16
_MAX_INT = 1 << 62


def check_row(row: Any, now_us: int) -> str:
    """Why a well-typed row cannot be stored; empty when it can.

    Times must lie between 2000 and a day ahead, texts within 256 characters, numbers be finite.
    """
    for field in row.__struct_fields__:
        value = getattr(row, field)
        if isinstance(value, float) and not math.isfinite(value):
            return f"{field}: not a finite number"
        if isinstance(value, bytes) and len(value) > MAX_SKETCH:
            return f"{field}: longer than {MAX_SKETCH} bytes"
        if isinstance(value, str) and len(value) > MAX_TEXT:
            return f"{field}: longer than {MAX_TEXT} characters"
        if isinstance(value, int) and not -_MAX_INT < value < _MAX_INT:
            return f"{field}: out of range"
        if isinstance(value, dict):
            if len(value) > MAX_NAMES or any(len(key) > MAX_TEXT for key in value):
                return f"{field}: too many or too long names"
            if not all(math.isfinite(item) for item in value.values()):
                return f"{field}: not finite numbers"
        if isinstance(value, list) and not all(math.isfinite(item) for item in value):
            return f"{field}: not finite numbers"
    at = row.bucket if hasattr(row, "bucket") else row.event_time
    if not EARLIEST_US <= at <= now_us + AHEAD_US:
        return "event time before 2000 or more than a day ahead"
    return ""


def suspicious(lane: Lane, rows: list[Row], now_us: int) -> bool:
    """Whether `check_row` may refuse one of these, by column: false when it refuses none."""
    if not rows:
        return False
    for field in rows[0].__struct_fields__:
        values: list[Any] = [getattr(row, field) for row in rows]
        if _doubtful(values):
            return True
    times = [row.bucket if lane == "trend" else row.event_time for row in rows]  # type: ignore[union-attr]  # by lane
    return not (min(times) >= EARLIEST_US and max(times) <= now_us + AHEAD_US)


def _doubtful(values: list[Any]) -> bool:
    kind = type(values[0])
    if kind is str:
        return max(map(len, set(values))) > MAX_TEXT
    if kind is int or kind is bool:
        return not -_MAX_INT < min(values) <= max(values) < _MAX_INT
    if kind is float:
        # A sum is finite only when all are; a sum that overflows is looked at one by one.
        return not math.isfinite(sum(values))
    if kind is bytes:
        return max(map(len, values)) > MAX_SKETCH
    if kind is dict:
        names = set(chain.from_iterable(values))
        return (
            max(map(len, values)) > MAX_NAMES
            or any(len(name) > MAX_TEXT for name in names)
            or not math.isfinite(sum(map(sum, map(dict.values, values))))
        )
    return not math.isfinite(sum(map(sum, values)))
