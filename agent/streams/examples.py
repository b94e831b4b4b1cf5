"""From closed windows to what a model is asked, and back to the samples that it was asked about. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.streams.samples import Samples, join
from agent.streams.window import Closed

Array = npt.NDArray[Any]

_STATISTICS: dict[str, Callable[[Array], Array]] = {
    "mean": lambda rows: rows.mean(axis=0),
    "minimum": lambda rows: rows.min(axis=0),
    "maximum": lambda rows: rows.max(axis=0),
    "median": lambda rows: np.median(rows, axis=0),
    "sum": lambda rows: rows.sum(axis=0),
    "deviation": lambda rows: rows.std(axis=0),
    "last": lambda rows: rows[-1],
}


@dataclass(frozen=True)
class Examples:
    """`m` examples for a model, made from `n` samples that are accounted for with them.

    `inputs` is `[m, ...]`; `owner` int64 `[n]` names each sample's example, -1 for a sample that is stored
    without a prediction. `stands` are the `m` samples that stand for the examples with their time, key and
    number: the last good one of each window, which in sliding windows an earlier one may have accounted for.
    """

    samples: Samples
    inputs: Array
    owner: npt.NDArray[np.int64]
    stands: Samples
    late: int = 0

    def __len__(self) -> int:
        return len(self.stands)


def make_examples(windows: list[Closed], aggregate: str, length: int) -> Examples:
    """What closed windows of one epoch ask of the model.

    `aggregate` and `length` are the stream's window aggregate and, for `stack`, its number of samples: a
    window that is not full cannot be stacked, and its samples are stored without a prediction.
    """
    parts: list[Samples] = []
    owners: list[Array] = []
    inputs: list[Array] = []
    stands: list[Samples] = []
    count = late = 0
    for window in windows:
        everything = window.samples
        fresh = _fresh(window)
        own = everything if fresh is None else everything.take(fresh)
        owner = np.full(len(own), -1, np.int64)
        if window.late:
            late += len(own)
        elif aggregate == "none":
            good = _good(own)
            owner[good] = np.arange(count, count + len(good))
            count += len(good)
            stands.append(own if len(good) == len(own) else own.take(good))
            inputs.append(stands[-1].values)
        else:
            good = _good(everything)
            rows = everything.values[good]
            if len(rows) and (aggregate != "stack" or len(rows) == length):
                owner[_good(own)] = count
                count += 1
                stands.append(everything.take(good[-1:]))
                inputs.append((rows if aggregate == "stack" else _STATISTICS[aggregate](rows))[np.newaxis])
        parts.append(own)
        owners.append(owner)
    samples = join(parts)
    empty = samples.values[:0]
    return Examples(
        samples,
        (inputs[0] if len(inputs) == 1 else np.concatenate(inputs)) if inputs else empty,
        owners[0] if len(owners) == 1 else np.concatenate(owners),
        join(stands) if stands else samples.part(0, 0),
        late,
    )


def _fresh(window: Closed) -> npt.NDArray[np.intp] | None:
    """The samples that this window is the first to hold; None: all."""
    indices = np.arange(len(window.samples), dtype=np.intp)
    fresh = indices[window.fresh]
    return None if len(fresh) == len(indices) else fresh


def _good(samples: Samples) -> npt.NDArray[np.intp]:
    if not samples.problems:
        return np.arange(len(samples), dtype=np.intp)
    mask = np.ones(len(samples), bool)
    mask[list(samples.problems)] = False
    return np.flatnonzero(mask)
