"""What a recipe is: data in, one or more executable forms of one model out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgeward.errors import InvalidDocument
from edgeward.wire.package import Decision, Runtime, TensorSpec
from models.datasets import Dataset

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Exported:
    """One form of the model. `predict` runs the very bytes through the runtime: `[rows, features]` -> `[rows]`."""

    name: str
    runtime: Runtime
    content: bytes
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    predict: Callable[[Rows], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Trained:
    """`reference` is the trained model itself, which every exported form must agree with within `tolerance`."""

    reference: Callable[[Rows], npt.NDArray[np.float32]]
    exported: list[Exported]
    decision: Decision
    tolerance: float
    libraries: dict[str, str]
    notes: dict[str, float] = field(default_factory=dict)


class Recipe(Protocol):
    """A recipe's parameters have defaults; `--set name=value` overrides them within `limits` (inclusive)."""

    name: str
    about: str
    parameters: dict[str, Any]
    limits: dict[str, tuple[float, float]]

    def train(self, data: Dataset, parameters: dict[str, Any]) -> Trained: ...


def merge(recipe: Recipe, given: dict[str, Any]) -> dict[str, Any]:
    """Defaults overridden by what is given, of the same types and within limits. Raises InvalidDocument."""
    merged = dict(recipe.parameters)
    for name, value in given.items():
        field = f"parameters.{name}"
        if name not in merged:
            raise InvalidDocument(
                f"recipe {recipe.name} has no parameter {name!r}",
                field=field,
                hint=f"one of {', '.join(merged)}",
            )
        kind = type(recipe.parameters[name])
        low, high = recipe.limits[name]
        try:
            # A whole number is read from its text, so that 7.9 is refused rather than cut to 7.
            merged[name] = kind(str(value))
        except ValueError:
            raise InvalidDocument(f"expected {kind.__name__}, got {value!r}", field=field) from None
        if not low <= merged[name] <= high:
            raise InvalidDocument(f"expected {low:g} to {high:g}, got {value!r}", field=field)
    return merged
