"""Have an accelerator compile a model before it may serve: that takes minutes, a request may take seconds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from agent.runtime.compiled import INTO_FOLDER, INTO_MODEL
from agent.runtime.engine import Engine
from agent.runtime.port import Arrays, Runner
from agent.runtime.tensors import to_tensors
from agent.slots import measure, selftest
from edgeward.errors import RuntimeFault
from edgeward.wire.package import TensorSpec
from edgeward.wire.slots import SlotPolicy

log = logging.getLogger(__name__)

#: For loading a model, and for one run of it, that is compiled meanwhile.
SECONDS = 900.0


def compiles(providers: Sequence[str]) -> bool:
    """Whether one of them keeps what it compiles, so that it can be compiled ahead."""
    return not (INTO_FOLDER | INTO_MODEL).isdisjoint(providers)


def build_policy(policy: SlotPolicy) -> SlotPolicy:
    """As a trial's, with time to compile."""
    return msgspec.structs.replace(measure.trial_policy(policy), deadline=max(policy.deadline, SECONDS))


def build(
    engine: Engine, runner: Runner, golden: Arrays, max_batch: int, going_on: Callable[[], None]
) -> bool:
    """Run the numbers of rows that will come: engines are made for the range of shapes they have seen.

    False when `max_batch` rows are too many for the accelerator: what this runner compiles after that is not
    to be relied on. Raises RuntimeFault, and what `going_on` raises.
    """
    rows = selftest.rows_of(golden)
    for inputs in shapes(golden, runner.inputs, max_batch):
        try:
            measure.once(engine, runner, to_tensors(inputs), going_on)
        except RuntimeFault as fault:
            going_on()
            found = selftest.rows_of(inputs)
            if rows is None or found is None or found <= rows:
                raise
            log.warning("%d rows at once: %s", found, fault)
            return False
    return True


def shapes(golden: Arrays, specs: Sequence[TensorSpec], max_batch: int) -> Iterator[Arrays]:
    """One row, `max_batch` rows, the golden rows; the golden inputs only where rows are not free.

    In this order a range is widened once: the golden rows lie between the others.
    """
    rows = selftest.rows_of(golden)
    if rows is None or not all(spec.shape and spec.shape[0] == -1 for spec in specs):
        yield golden
        return
    for count in dict.fromkeys((1, max(max_batch, rows), rows)):
        yield {name: np.resize(values, (count, *values.shape[1:])) for name, values in golden.items()}
