"""Have an accelerator compile a model before it may serve: that takes minutes, a request may take seconds."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from agent import measure, selftest
from agent.runtime.compiled import INTO_FOLDER, INTO_MODEL
from agent.runtime.port import Arrays, Runner
from edgeward.errors import RuntimeFault
from edgeward.wire.package import TensorSpec
from edgeward.wire.slots import SlotPolicy

log = logging.getLogger(__name__)

#: For one run of a model that is compiled meanwhile.
SECONDS = 900.0


def compiles(providers: Sequence[str]) -> bool:
    """Whether one of them keeps what it compiles, so that it can be compiled ahead."""
    return not (INTO_FOLDER | INTO_MODEL).isdisjoint(providers)


def build_policy(policy: SlotPolicy) -> SlotPolicy:
    """As a trial's, with time to compile."""
    return msgspec.structs.replace(measure.trial_policy(policy), deadline=max(policy.deadline, SECONDS))


def build(runner: Runner, golden: Arrays, max_batch: int) -> None:
    """Run every number of rows that will come: engines are made for the range of shapes they have seen.

    Raises RuntimeFault. That `max_batch` rows are too many for the accelerator costs later only that requests
    which were joined run one by one.
    """
    *needed, most = shapes(golden, runner.inputs, max_batch)
    for inputs in needed:
        runner.infer(inputs)
    try:
        runner.infer(most)
    except RuntimeFault as fault:
        if not needed:
            raise
        log.warning("%d rows at once: %s", max_batch, fault)


def shapes(golden: Arrays, specs: Sequence[TensorSpec], max_batch: int) -> Iterator[Arrays]:
    """One row, the golden rows, `max_batch` rows; the golden inputs only where rows are not free."""
    rows = selftest.rows_of(golden)
    if rows is None or not all(spec.shape and spec.shape[0] == -1 for spec in specs):
        yield golden
        return
    for count in sorted({1, rows, max(max_batch, rows)}):
        yield {name: np.resize(values, (count, *values.shape[1:])) for name, values in golden.items()}
