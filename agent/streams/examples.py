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
    without a prediction; `last` `[m]` is the sample that stands for an example (its time, key and number).
    """

    samples: Samples
    inputs: Array
    owner: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]
    late: int = 0

    def __len__(self) -> int:
        return len(self.last)


def make_examples(windows: list[Closed], aggregate: str, length: int) -> Examples:
    """What closed windows of one epoch ask of the model.

    `aggregate` and `length` are the stream's window aggregate and, for `stack`, its number of samples: a
    window that is not full cannot be stacked, and its samples are stored without a prediction.
    """
    parts: list[Samples] = []
    owners: list[Array] = []
    inputs: list[Array] = []
    lasts: list[int] = []
    offset = late = 0
    for window in windows:
        everything = window.samples
        fresh = _fresh(window)
        own = everything if fresh is None else everything.take(fresh)
        owner = np.full(len(own), -1, np.int64)
        if window.late:
            late += len(own)
        elif aggregate == "none":
            good = _good(own)
            owner[good] = np.arange(len(lasts), len(lasts) + len(good))
            lasts += (good + offset).tolist()
            inputs.append(own.values if len(good) == len(own) else own.values[good])
        else:
            rows = everything.values[_good(everything)]
            if len(rows) and (aggregate != "stack" or len(rows) == length):
                good = _good(own)
                owner[good] = len(lasts)
                lasts.append(offset + int(good[-1] if len(good) else max(len(own) - 1, 0)))
                inputs.append((rows if aggregate == "stack" else _STATISTICS[aggregate](rows))[np.newaxis])
        parts.append(own)
        owners.append(owner)
        offset += len(own)
    samples = join(parts)
    empty = samples.values[:0]
    return Examples(
        samples,
        (inputs[0] if len(inputs) == 1 else np.concatenate(inputs)) if inputs else empty,
        owners[0] if len(owners) == 1 else np.concatenate(owners),
        np.array(lasts, np.int64),
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
