"""Ask the model, and find out which example it cannot take."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.runtime.worker import WorkerStopped
from edgeward.errors import RuntimeFault

Array = npt.NDArray[Any]
Ask = Callable[[Array], dict[str, Array]]

#: Examples in one call; more make the next alarm wait.
MAX_EXAMPLES = 1024


def infer_all(
    ask: Ask, examples: Array, *, single: bool
) -> tuple[dict[str, Array], npt.NDArray[np.bool_], str]:
    """The outputs of all examples by name, which of them were answered, and the last refusal.

    `ask` infers `[n, ...]` examples and raises RuntimeFault; when it does, the examples are halved until
    the refused ones stand alone: their outputs are NaN. `single` examples go one at a time. Raises
    WorkerStopped, and RuntimeFault when no example at all was answered.
    """
    count = len(examples)
    parts: list[tuple[int, int, dict[str, Array]]] = []
    answered = np.ones(count, np.bool_)
    refusal = ""
    step = 1 if single else MAX_EXAMPLES
    waiting = [(first, min(first + step, count)) for first in range(0, count, step)]
    waiting.reverse()
    while waiting:
        first, last = waiting.pop()
        try:
            parts.append((first, last, ask(examples[first:last])))
        except WorkerStopped:
            raise
        except RuntimeFault as fault:
            refusal = str(fault)
            if last - first == 1:
                answered[first] = False
            else:
                middle = (first + last) // 2
                waiting += [(middle, last), (first, middle)]
    if not parts:
        raise RuntimeFault(refusal)
    if len(parts) == 1 and parts[0][:2] == (0, count):
        return _by_example(parts[0][2], count), answered, refusal
    outputs: dict[str, Array] = {}
    for first, last, got in parts:
        for name, values in _by_example(got, last - first).items():
            if name not in outputs:
                outputs[name] = np.full((count, *values.shape[1:]), np.nan)
            outputs[name][first:last] = values
    return outputs, answered, refusal


def infer_fitting(
    ask: Ask, examples: Array, misfits: Collection[int], *, single: bool
) -> tuple[dict[str, Array], npt.NDArray[np.bool_], str]:
    """As `infer_all`, without asking for the examples in `misfits`: they are not answered."""
    if not misfits:
        return infer_all(ask, examples, single=single)
    answered = np.ones(len(examples), np.bool_)
    answered[list(misfits)] = False
    fitting = np.flatnonzero(answered)
    if not len(fitting):
        return {}, answered, ""
    got, taken, refusal = infer_all(ask, examples[fitting], single=single)
    answered[fitting] = taken
    outputs = {}
    for name, values in got.items():
        outputs[name] = np.full((len(examples), *values.shape[1:]), np.nan)
        outputs[name][fitting] = values
    return outputs, answered, refusal


def _by_example(got: dict[str, Array], count: int) -> dict[str, Array]:
    for name, values in got.items():
        if values.size % count or (values.ndim and values.shape[0] != count and count > 1):
            raise RuntimeFault(f"output {name} has shape {list(values.shape)} for {count} examples")
    return {name: values.reshape(count, -1) for name, values in got.items()}
