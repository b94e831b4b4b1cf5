"""Before a model may act: its own golden vectors, on this device, through the runtime it will use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from agent.runtime.port import Arrays
from edgeward.errors import PackageError, RuntimeFault
from edgeward.wire.package import GoldenTensor, GoldenVectors, TensorSpec
from edgeward.wire.tensors import unpack_elements

#: So many golden rows are run one by one.
_ROWS_TRIED = 16


class Infers(Protocol):
    """A Runner, as far as a test needs one."""

    def infer(self, inputs: Arrays) -> Arrays: ...


@dataclass(frozen=True)
class Verdict:
    """`measured` is the worst absolute error of any output element, `limit` what it may be there."""

    passed: bool
    message: str
    measured: float
    limit: float


def to_array(tensor: GoldenTensor) -> npt.NDArray[Any]:
    """Text (`bytes`) becomes an array of byte strings, bfloat16 its raw uint16.

    Raises PackageError when data, type and shape do not fit.
    """
    try:
        if tensor.dtype == "bytes":
            items = unpack_elements(tensor.data)
            array = np.empty(len(items), object)
            array[:] = items
            return array.reshape(tensor.shape)
        dtype = np.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype)
        return np.frombuffer(tensor.data, dtype.newbyteorder("<")).reshape(tensor.shape)
    except (TypeError, ValueError) as error:
        raise PackageError(f"golden tensor {tensor.name}: {error}") from None


def golden_inputs(golden: GoldenVectors) -> Arrays:
    return {tensor.name: to_array(tensor) for tensor in golden.inputs}


def first_row(inputs: Arrays, specs: Sequence[TensorSpec]) -> Arrays:
    """The inputs of one example where every input has a free first dimension, otherwise all of them."""
    if rows_of(inputs) is None or not all(spec.shape and spec.shape[0] == -1 for spec in specs):
        return inputs
    return {name: values[:1] for name, values in inputs.items()}


def rows_of(tensors: Arrays) -> int | None:
    """The length of the first dimension when all tensors have the same one above zero."""
    lengths = {values.shape[0] if values.ndim else 0 for values in tensors.values()}
    return lengths.pop() if len(lengths) == 1 and 0 not in lengths else None


def judge(golden: GoldenVectors, got: Arrays, atol: float, rtol: float) -> Verdict:
    """Compare outputs with the reference; the worst element decides. Text must be the same."""
    names = [tensor.name for tensor in golden.outputs]
    if set(got) != set(names):
        return _wrong(f"the model has the outputs {_list(got)}, expected {_list(names)}", atol)
    worst = Verdict(True, "", 0.0, atol)
    for tensor in golden.outputs:
        mine, reference = got[tensor.name], to_array(tensor)
        if tensor.dtype == "bfloat16":
            if mine.dtype != np.uint16:
                return _wrong(f"output {tensor.name} has type {_type(mine)}, expected bfloat16", atol)
            mine, reference = _widened(mine), _widened(reference)
        verdict = compare(tensor.name, mine, reference, atol, rtol)
        if not verdict.passed:
            return verdict
        if verdict.measured - verdict.limit > worst.measured - worst.limit:
            worst = verdict
    return worst


def compare(name: str, got: npt.NDArray[Any], want: npt.NDArray[Any], atol: float, rtol: float) -> Verdict:
    """One output against what it should be: `|got - want| <= atol + rtol * |want|`, text exactly."""
    if got.shape != want.shape:
        return _wrong(f"output {name} has shape {list(got.shape)}, expected {list(want.shape)}", atol)
    if (got.dtype.kind in "OUS") != (want.dtype.kind == "O"):
        return _wrong(f"output {name} has type {_type(got)}, expected {_type(want)}", atol)
    if want.dtype.kind == "O":
        pairs = zip(got.reshape(-1).tolist(), want.reshape(-1).tolist(), strict=True)
        wrong = sum(_bytes(mine) != theirs for mine, theirs in pairs)
        message = f"output {name}: {wrong} of {want.size} golden texts differ" if wrong else ""
        return Verdict(not wrong, message, float(wrong), 0.0)
    off = np.abs(got.astype(np.float64) - want.astype(np.float64))
    limits = atol + rtol * np.abs(want.astype(np.float64))
    off = np.where(np.isfinite(off), off, np.inf)
    if off.size == 0:
        return Verdict(True, "", 0.0, atol)
    index = int(np.argmax(off - limits))
    measured, limit = float(off.reshape(-1)[index]), float(limits.reshape(-1)[index])
    if measured <= limit:
        return Verdict(True, "", measured, limit)
    wrong = int((off > limits).sum())
    return Verdict(
        False,
        f"output {name}: {wrong} of {off.size} golden values are off, the worst by {measured:.4g}, "
        f"limit {limit:.4g}",
        measured,
        limit,
    )


def _widened(raw: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The numbers (float32) that uint16 hold as bfloat16: compared as integers, a small step would count as 1."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def row_independent(
    runner: Infers, inputs: Arrays, tolerance: tuple[float, float], outputs: Sequence[TensorSpec] = ()
) -> bool:
    """Whether each golden row, run alone, gives what it gives among the others, within (atol, rtol).

    `outputs` says which of the arrays given hold bfloat16.

    Only then may rows of different requests be joined. A single row, or rows that are all the same, show
    nothing: False.
    """
    rows = rows_of(inputs)
    if rows is None or rows < 2:
        return False
    count = min(rows, _ROWS_TRIED)
    if all(_same(values[:count]) for values in inputs.values()):
        return False
    raw = {spec.name for spec in outputs if spec.dtype == "bfloat16"}
    try:
        together = runner.infer({name: values[:count] for name, values in inputs.items()})
        if rows_of(together) != count:
            return False
        for row in range(count):
            alone = runner.infer({name: values[row : row + 1] for name, values in inputs.items()})
            for name, values in together.items():
                if name not in alone:
                    return False
                pair = alone[name], _text(values[row : row + 1])
                mine, want = map(_widened, pair) if name in raw else pair
                if not compare(name, mine, want, *tolerance).passed:
                    return False
    except RuntimeFault:
        return False
    return True


def _same(values: npt.NDArray[Any]) -> bool:
    first = values[:1].tolist()[0]
    return all(item == first for item in values[1:].tolist())


def _text(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Text in the form of golden tensors: byte strings."""
    if values.dtype.kind not in "OUS":
        return values
    array = np.empty(values.size, object)
    array[:] = [_bytes(item) for item in values.reshape(-1).tolist()]
    return array.reshape(values.shape)


def _bytes(item: object) -> bytes:
    return item if isinstance(item, bytes) else str(item).encode()


def _type(values: npt.NDArray[Any]) -> str:
    return "bytes" if values.dtype.kind in "OUS" else values.dtype.name


def _list(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "none"


def _wrong(message: str, limit: float) -> Verdict:
    return Verdict(False, message, float("inf"), limit)
