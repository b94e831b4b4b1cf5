"""What every decoder does with its columns: refuse what is no reading, name it, split by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from agent.streams.decode.times import NO_TIME
from agent.streams.samples import Samples
from edgeward.errors import InvalidDocument

MAX_SAMPLES = 10_000
MAX_TEXT = 256
MAX_EPOCH = 64
MAX_SEQ = 1 << 60  # the first number that is too large

_LARGEST = 1e150


def clean_text(text: str) -> str:
    """A sensor's text, cut, and such that it can be encoded again: JSON escapes can make lone surrogates."""
    return text[:MAX_TEXT].encode("utf-8", "replace").decode()


def not_finite(name: str) -> str:
    return f"{name}: missing or not a finite number"


def keep_finite(values: npt.NDArray[np.float64], features: Sequence[str], problems: dict[int, str]) -> None:
    """Make every value of `[n, features]` that is no reading NaN, in place, and say so in `problems`."""
    with np.errstate(invalid="ignore"):
        bad = ~(np.abs(values) < _LARGEST)
    if not bad.any():
        return
    values[bad] = np.nan
    rows = np.flatnonzero(bad.any(axis=1))
    first = bad[rows].argmax(axis=1)
    for row, feature in zip(rows.tolist(), first.tolist(), strict=True):
        problems.setdefault(row, not_finite(features[feature]))


def settle_times(
    times: npt.NDArray[np.int64], arrived: float, problem: str, problems: dict[int, str]
) -> npt.NDArray[np.int64]:
    """Event times with the arrival where there is NO_TIME, which is the sample's `problem`."""
    bad = times == NO_TIME
    if not bad.any():
        return times
    for row in np.flatnonzero(bad).tolist():
        problems[row] = problem
    return np.where(bad, arrival(arrived), times)


def arrival(arrived: float) -> int:
    """Microseconds of an arrival given in seconds."""
    return round(arrived * 1e6)


def check_count(number: int) -> None:
    """Raises InvalidDocument for more than MAX_SAMPLES."""
    if number > MAX_SAMPLES:
        raise InvalidDocument(f"{number} samples in one message, at most {MAX_SAMPLES}")


def by_epoch(samples: Samples, epochs: Sequence[str]) -> list[Samples]:
    """`samples` split into runs of one epoch each. `epochs` has one for each sample, or is empty."""
    if not len(samples):
        return []
    if not epochs:
        return [samples]
    if len(set(epochs)) == 1:
        return [_of_epoch(samples, epochs[0])]
    parts: list[Samples] = []
    at = 0
    for epoch, run in groupby(epochs):
        length = sum(1 for _ in run)
        parts.append(_of_epoch(samples.take(np.arange(at, at + length)), epoch))
        at += length
    return parts


def _of_epoch(samples: Samples, epoch: str) -> Samples:
    return Samples(samples.event_time, samples.values, samples.keys, epoch, samples.seq, samples.problems)
