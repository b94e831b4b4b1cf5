"""From a message of a sensor to samples: JSON, one object or an array of them."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
from msgspec import Struct

from edgeward.errors import InvalidDocument
from edgeward.wire.streams import MqttSource

MAX_SAMPLES = 10_000


class Sample(Struct, frozen=True):
    """`event_time` in microseconds since 1970; `seq` is -1 for a source without sequence numbers.

    `values` holds the numbers among the fields; `problem` says why the sample must not reach a model.
    """

    event_time: int
    key: str
    epoch: str
    seq: int
    values: dict[str, float]
    problem: str = ""


def parse(payload: bytes, source: MqttSource, features: list[str], arrived: float) -> list[Sample]:
    """The samples of one message, in order. Raises InvalidDocument when it is none at all.

    A sample that lacks a feature, or has no finite number there, comes back with a `problem`.
    """
    document = _decode(payload)
    items = document if isinstance(document, list) else [document]
    if len(items) > MAX_SAMPLES:
        raise InvalidDocument(f"{len(items)} samples in one message, at most {MAX_SAMPLES}")
    return [_sample(item, source, features, arrived) for item in items]


def _decode(payload: bytes) -> Any:
    try:
        return msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        refusal = InvalidDocument(f"not JSON: {error}")
    # Many sensors write NaN or 1e999, which strict JSON refuses. That costs the sample, not the message.
    try:
        return json.loads(payload)
    except (ValueError, RecursionError):
        raise refusal from None


def _sample(item: Any, source: MqttSource, features: list[str], arrived: float) -> Sample:
    if not isinstance(item, dict):
        raise InvalidDocument(f"expected an object, got {type(item).__name__}")
    epoch, seq = "", -1
    if source.sequence:
        epoch, seq = item.get("epoch", ""), item.get("seq", -1)
        if not isinstance(epoch, str) or not 1 <= len(epoch) <= 64:
            raise InvalidDocument("expected a text of 1-64 characters", field="epoch")
        if not isinstance(seq, int) or isinstance(seq, bool) or not 0 <= seq < 1 << 60:
            raise InvalidDocument("expected a whole number >= 0", field="seq")
    at: Any = item.get(source.time) if source.time else arrived
    problem = ""
    if not isinstance(at, int | float) or isinstance(at, bool) or not math.isfinite(at) or not 0 <= at < 1e11:
        problem, at = f"{source.time}: not a time in seconds since 1970", arrived
    inner: Any = item.get(source.values, {}) if source.values else item
    if not isinstance(inner, dict):
        problem, inner = f"{source.values}: not an object", {}
    values = {
        name: float(value)
        for name, value in inner.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    }
    for name in features:
        if name not in values and not problem:
            problem = f"{name}: missing or not a finite number"
    key = item.get(source.key, "") if source.key else ""
    return Sample(int(at * 1e6), str(key)[:256], epoch, seq, values, problem)


def continue_sequence(
    samples: list[Sample], position: tuple[str, int] | None
) -> tuple[list[Sample], tuple[str, int] | None]:
    """Of numbered samples, those that follow `position` without a hole, and the position after them.

    Repeats are dropped, and so is what lies beyond a hole: the sensor sends again in order. A new
    epoch starts at 0.
    """
    taken = []
    for sample in samples:
        expected = position[1] + 1 if position is not None and position[0] == sample.epoch else 0
        if sample.seq == expected:
            taken.append(sample)
            position = (sample.epoch, sample.seq)
    return taken, position
