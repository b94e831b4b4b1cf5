"""Before a model may act: its own golden vectors, on this device, through the runtime it will use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.runtime.port import Arrays
from edgeward.errors import PackageError
from edgeward.wire.package import GoldenTensor, GoldenVectors


@dataclass(frozen=True)
class Verdict:
    """`measured` is the worst absolute error of any output element, `limit` what it may be there."""

    passed: bool
    message: str
    measured: float
    limit: float


def to_array(tensor: GoldenTensor) -> npt.NDArray[Any]:
    """Raises PackageError when data, type and shape do not fit."""
    try:
        return np.frombuffer(tensor.data, np.dtype(tensor.dtype).newbyteorder("<")).reshape(tensor.shape)
    except (TypeError, ValueError) as error:
        raise PackageError(f"golden tensor {tensor.name}: {error}") from None


def golden_inputs(golden: GoldenVectors) -> Arrays:
    return {tensor.name: to_array(tensor) for tensor in golden.inputs}


def judge(golden: GoldenVectors, got: Arrays, atol: float, rtol: float) -> Verdict:
    """Compare outputs with the reference; the worst element decides."""
    worst = Verdict(True, "", 0.0, atol)
    for tensor in golden.outputs:
        want = to_array(tensor).astype(np.float64)
        values = got.get(tensor.name)
        if values is None:
            return Verdict(False, f"the model has no output {tensor.name!r}", float("inf"), atol)
        if values.shape != want.shape:
            return Verdict(
                False, f"output {tensor.name} has shape {list(values.shape)}, expected {list(want.shape)}",
                float("inf"), atol,
            )  # fmt: skip
        off = np.abs(values.astype(np.float64) - want)
        limits = atol + rtol * np.abs(want)
        off = np.where(np.isfinite(off), off, np.inf)
        if off.size == 0:
            continue
        index = int(np.argmax(off - limits))
        measured, limit = float(off.reshape(-1)[index]), float(limits.reshape(-1)[index])
        if measured > limit:
            wrong = int((off > limits).sum())
            return Verdict(
                False,
                f"output {tensor.name}: {wrong} of {off.size} golden values are off, the worst by {measured:.4g}, "
                f"limit {limit:.4g}",
                measured,
                limit,
            )
        if measured - limit > worst.measured - worst.limit:
            worst = Verdict(True, "", measured, limit)
    return worst
