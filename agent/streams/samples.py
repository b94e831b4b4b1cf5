"""Samples in columns: what a source gives and what every later step works on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Samples:
    """`n` samples in the order in which they arrived.

    `event_time` int64 `[n]`, microseconds since 1970. `values` `[n, features]` float64 in the order of the
    stream's features, NaN where a feature is missing; for images `[n, H, W, C]` uint8. `keys` has one
    text per sample, or is empty when the source tells none apart. `seq` int64 `[n]` with the sensor's
    `epoch`, both absent (None, "") for a source that does not number. `problems` says, by index, why a
    sample must not reach a model.
    """

    event_time: npt.NDArray[np.int64]
    values: npt.NDArray[Any]
    keys: tuple[str, ...] = ()
    epoch: str = ""
    seq: npt.NDArray[np.int64] | None = None
    problems: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.event_time)

    def key(self, index: int) -> str:
        return self.keys[index] if self.keys else ""

    def part(self, start: int, stop: int) -> Samples:
        """The samples `start .. stop - 1`, as views."""
        if start == 0 and stop == len(self):
            return self
        problems = self.problems
        if stop - start < len(problems):
            here = {index - start: problems[index] for index in range(start, stop) if index in problems}
        else:
            here = {index - start: text for index, text in problems.items() if start <= index < stop}
        return replace(
            self,
            event_time=self.event_time[start:stop],
            values=self.values[start:stop],
            keys=self.keys[start:stop],
            seq=None if self.seq is None else self.seq[start:stop],
            problems=here,
        )

    def take(self, indices: npt.NDArray[np.intp]) -> Samples:
        """The samples at `indices`, in that order."""
        chosen = indices.tolist()
        where = {old: new for new, old in enumerate(chosen) if old in self.problems} if self.problems else {}
        return replace(
            self,
            event_time=self.event_time[indices],
            values=self.values[indices],
            keys=tuple(self.keys[index] for index in chosen) if self.keys else (),
            seq=None if self.seq is None else self.seq[indices],
            problems={new: self.problems[old] for old, new in where.items()},
        )


def join(parts: list[Samples]) -> Samples:
    """Samples of one epoch and one shape, one after the other."""
    if len(parts) == 1:
        return parts[0]
    keyed = any(part.keys for part in parts)
    problems: dict[int, str] = {}
    offset = 0
    for part in parts:
        problems.update({offset + index: text for index, text in part.problems.items()})
        offset += len(part)
    numbered = [part.seq for part in parts if part.seq is not None]
    return replace(
        parts[0],
        event_time=np.concatenate([part.event_time for part in parts]),
        values=np.concatenate([part.values for part in parts]),
        keys=tuple(key for part in parts for key in part.keys or ("",) * len(part)) if keyed else (),
        seq=np.concatenate(numbered) if numbered else None,
        problems=problems,
    )
