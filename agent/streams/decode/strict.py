"""A message type built from a layout, so that a whole array of samples decodes at C speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from agent.streams.decode import times
from agent.streams.decode.columns import MAX_EPOCH, MAX_SAMPLES, MAX_SEQ, MAX_TEXT
from agent.streams.decode.layout import Layout
from edgeward.paths import Path
from edgeward.wire.streams import TimeUnit

_EPOCH = Annotated[str, Meta(min_length=1, max_length=MAX_EPOCH)]
_SEQ = Annotated[int, Meta(ge=0, lt=MAX_SEQ)]

# A field without a default is one that every sample must have.
_Field = tuple[str, Any] | tuple[str, Any, Any]


@dataclass(frozen=True, slots=True)
class StrictForm:
    """The type of one sample and how to read columns off a list of them."""

    row: type[Struct]
    features: Callable[[Any], Any]
    time: Callable[[Any], Any] | None
    key: Callable[[Any], Any] | None
    epoch: Callable[[Any], Any] | None
    seq: Callable[[Any], Any] | None
    time_unit: TimeUnit
    width: int

    def values(self, rows: Sequence[Any]) -> npt.NDArray[np.float64]:
        """`[n, features]`, NaN where a reading is absent or null."""
        try:
            # Twice as fast as np.array, but it takes no None.
            cells = np.fromiter(self._cells(rows), np.float64, len(rows) * self.width)
        except TypeError:
            cells = np.array(list(self._cells(rows)), dtype=np.float64)
        return cells.reshape(len(rows), self.width)

    def _cells(self, rows: Sequence[Any]) -> Iterator[Any]:
        read = map(self.features, rows)
        return read if self.width == 1 else chain.from_iterable(read)

    def times(self, rows: Sequence[Any]) -> npt.NDArray[np.int64] | None:
        """Microseconds since 1970, NO_TIME where there is none; None when samples carry no time."""
        return None if self.time is None else times.column(list(map(self.time, rows)), self.time_unit)

    def keys(self, rows: Sequence[Any]) -> tuple[str, ...]:
        if self.key is None:
            return ()
        return tuple("" if key is None else str(key)[:MAX_TEXT] for key in map(self.key, rows))

    def epochs(self, rows: Sequence[Any]) -> list[str]:
        return [] if self.epoch is None else list(map(self.epoch, rows))

    def seqs(self, rows: Sequence[Any]) -> npt.NDArray[np.int64] | None:
        return None if self.seq is None else np.fromiter(map(self.seq, rows), np.int64, len(rows))


def strict_form(layout: Layout) -> StrictForm | None:
    """None when the layout has no such type: array indices, or paths that cross one another."""
    tree = _Tree()
    time_type = str | None if layout.time_unit == "iso8601" else int | float | None
    try:
        epoch = attrgetter(tree.add(("epoch",), _EPOCH, required=True)) if layout.sequence else None
        seq = attrgetter(tree.add(("seq",), _SEQ, required=True)) if layout.sequence else None
        time = None if layout.time is None else attrgetter(tree.add(layout.time, time_type))
        key = None if layout.key is None else attrgetter(tree.add(layout.key, str | int | None))
        features = attrgetter(*[tree.add(path, float | None) for path in layout.paths])
        row = tree.build()
    except ValueError:
        return None
    return StrictForm(row, features, time, key, epoch, seq, layout.time_unit, len(layout.features))


def message_type(form: StrictForm) -> Any:
    """One sample, or an array of them."""
    return Annotated[list[form.row], Meta(max_length=MAX_SAMPLES)] | form.row  # type: ignore[name-defined]


class _Tree:
    """Objects within objects, to be made into struct types from the leaves up."""

    def __init__(self) -> None:
        self._children: dict[str, _Tree | _Leaf] = {}

    def add(self, path: Path, kind: Any, *, required: bool = False) -> str:
        """The attribute path of the new leaf. Raises ValueError where another leaf or an index is in the way."""
        step, rest = path[0] if path else 0, path[1:]
        if not isinstance(step, str):
            raise ValueError("the whole sample, or an array")
        if not rest:
            if step in self._children:
                raise ValueError("two roles for one value")
            self._children[step] = _Leaf(kind, required)
            return self._attribute(step)
        child = self._children.setdefault(step, _Tree())
        if isinstance(child, _Leaf):
            raise ValueError("a value that is an object too")
        return f"{self._attribute(step)}.{child.add(rest, kind, required=required)}"

    def _attribute(self, step: str) -> str:
        # Not the name itself, which need not be an identifier.
        return f"f{list(self._children).index(step)}"

    def build(self) -> type[Struct]:
        """Raises ValueError for a name that msgspec cannot match, such as one with a quote."""
        fields: list[_Field] = []
        for name, child in self._children.items():
            attribute = self._attribute(name)
            if isinstance(child, _Tree):
                inner = child.build()
                # An absent object is one without readings; a null is not, and refused.
                fields.append((attribute, inner, msgspec.field(default_factory=inner)))
            elif child.required:
                fields.append((attribute, child.kind))
            else:
                fields.append((attribute, child.kind, None))
        names = {self._attribute(name): name for name in self._children}
        return msgspec.defstruct("Sample", fields, rename=names, kw_only=True, gc=False)


@dataclass(frozen=True, slots=True)
class _Leaf:
    kind: Any
    required: bool
