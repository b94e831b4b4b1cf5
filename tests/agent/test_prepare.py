"""Compiling ahead: every number of rows that will come, with the time it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agent import prepare
from agent.runtime.port import Arrays
from edgeward.errors import RuntimeFault
from edgeward.wire.package import TensorSpec
from edgeward.wire.slots import SlotPolicy

GOLDEN = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "t": np.array([b"a", b"b", b"c"], object)}
FREE = [TensorSpec("x", "float32", [-1, 4]), TensorSpec("t", "bytes", [-1])]


class Takes:
    """A runner that refuses more than `most` rows."""

    def __init__(self, most: int, inputs: list[TensorSpec]) -> None:
        self.most, self.inputs, self.seen = most, inputs, list[int]()

    def infer(self, inputs: Arrays) -> Arrays:
        rows = len(inputs["x"])
        self.seen.append(rows)
        if rows > self.most:
            raise RuntimeFault("out of memory")
        return inputs


def built(most: int, max_batch: int, inputs: list[TensorSpec] = FREE) -> list[int]:
    runner: Any = Takes(most, inputs)
    prepare.build(runner, GOLDEN, max_batch)
    seen: list[int] = runner.seen
    return seen


def test_every_number_of_rows_that_will_come_is_run() -> None:
    assert built(64, 64) == [1, 3, 64]
    assert built(64, 1) == [1, 3]
    assert built(64, 2) == [1, 3]
    assert built(64, 64, [TensorSpec("x", "float32", [3, 4]), FREE[1]]) == [3], "its rows are fixed"


def test_rows_are_the_golden_ones_again_and_again() -> None:
    *_, most = prepare.shapes(GOLDEN, FREE, 7)
    np.testing.assert_array_equal(most["x"], np.concatenate([GOLDEN["x"]] * 3)[:7])
    assert most["t"].tolist() == [b"a", b"b", b"c", b"a", b"b", b"c", b"a"]


def test_too_many_rows_at_once_cost_the_batch_and_not_the_model() -> None:
    assert built(3, 64) == [1, 3, 64]
    with pytest.raises(RuntimeFault, match="out of memory"):
        built(2, 64)
    with pytest.raises(RuntimeFault, match="out of memory"):
        built(2, 64, [TensorSpec("x", "float32", [3, 4]), FREE[1]])


def test_only_what_keeps_its_compiled_forms_is_built_ahead_and_gets_the_time() -> None:
    assert prepare.compiles(("TensorrtExecutionProvider", "CPUExecutionProvider"))
    assert prepare.compiles(("QNNExecutionProvider",))
    assert not prepare.compiles(("CUDAExecutionProvider", "CPUExecutionProvider"))
    assert prepare.build_policy(SlotPolicy(deadline=2.0)).deadline == prepare.SECONDS
    assert prepare.build_policy(SlotPolicy(deadline=3000.0)).deadline == 3000.0
    assert prepare.build_policy(SlotPolicy(isolation="in-process")).isolation == "process"
