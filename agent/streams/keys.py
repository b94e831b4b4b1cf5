"""Per-key state: samples grouped by key, and a bounded memory of keys (a sensor chooses its keys freely)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

MAX_KEYS = 10_000

V = TypeVar("V")


def groups(keys: tuple[str, ...], count: int) -> Iterator[tuple[str, npt.NDArray[np.intp] | None]]:
    """Each key with the indices of its samples in their order; keys in the order of their first sample.

    `keys` is empty or has `count` texts. Indices are None where all `count` samples are meant.
    """
    if count == 0:
        return
    if not keys or keys.count(keys[0]) == count:
        yield (keys[0] if keys else ""), None
        return
    codes: dict[str, int] = {}
    # Not np.unique: its fixed-width text would take the length of the longest key for every sample.
    column = np.fromiter((codes.setdefault(key, len(codes)) for key in keys), np.intp, count)
    order = np.argsort(column, kind="stable")
    bounds = np.flatnonzero(np.diff(column[order])) + 1
    yield from zip(codes, np.split(order, bounds), strict=True)


class Recent(OrderedDict[str, V], Generic[V]):
    """A dict of at most `limit` keys; the one set longest ago is dropped."""

    def __init__(self, limit: int = MAX_KEYS) -> None:
        super().__init__()
        self._limit = limit

    def __setitem__(self, key: str, value: V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > self._limit:
            self.popitem(last=False)
