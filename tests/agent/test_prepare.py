"""Compiling ahead: every number of rows that will come, with the time it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from agent.runtime.port import Done, Tensor, Timing
from agent.slots import prepare
from edgeward.errors import RuntimeFault
from edgeward.wire.package import TensorSpec
from edgeward.wire.slots import SlotPolicy

GOLDEN = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "t": np.array([b"a", b"b", b"c"], object)}
FREE = [TensorSpec("x", "float32", [-1, 4]), TensorSpec("t", "bytes", [-1])]


class Takes:
    """A runner that refuses more than `most` rows, and the engine with its loop."""

    def __init__(self, most: int, inputs: list[TensorSpec]) -> None:
        self.most, self.inputs, self.seen = most, inputs, list[int]()
        self.loop = self

    def call_soon_threadsafe(self, begin: Callable[[], None]) -> None:
        begin()

    def submit(self, inputs: list[Tensor], done: Done) -> None:
        rows = inputs[0].shape[0]
        self.seen.append(rows)
        done(inputs if rows <= self.most else RuntimeFault("out of memory"), Timing(0, 1, rows))


def built(most: int, max_batch: int, inputs: list[TensorSpec] = FREE) -> tuple[bool, list[int]]:
    runner: Any = Takes(most, inputs)
    return prepare.build(runner, runner, GOLDEN, max_batch, lambda: None), runner.seen


def test_the_range_of_rows_that_will_come_is_run_and_widened_once() -> None:
    assert built(64, 64) == (True, [1, 64, 3])
    assert built(64, 1) == (True, [1, 3])
    assert built(64, 2) == (True, [1, 3])
    assert built(64, 64, [TensorSpec("x", "float32", [3, 4]), FREE[1]]) == (True, [3]), "its rows are fixed"


def test_rows_are_the_golden_ones_again_and_again() -> None:
    _, most, _ = prepare.shapes(GOLDEN, FREE, 7)
    np.testing.assert_array_equal(most["x"], np.concatenate([GOLDEN["x"]] * 3)[:7])
    assert most["t"].tolist() == [b"a", b"b", b"c", b"a", b"b", b"c", b"a"]


def test_too_many_rows_at_once_cost_the_batch_and_not_the_model() -> None:
    assert built(3, 64) == (False, [1, 64])
    with pytest.raises(RuntimeFault, match="out of memory"):
        built(2, 1)
    with pytest.raises(RuntimeFault, match="out of memory"):
        built(2, 64, [TensorSpec("x", "float32", [3, 4]), FREE[1]])


def test_a_build_that_nobody_wants_any_more_is_not_waited_for() -> None:
    class Hangs(Takes):
        def submit(self, inputs: list[Tensor], done: Done) -> None:
            pass

    def going_on() -> None:
        raise InterruptedError

    runner: Any = Hangs(0, FREE)
    with pytest.raises(InterruptedError):
        prepare.build(runner, runner, GOLDEN, 64, going_on)
    runner = Takes(0, FREE)
    with pytest.raises(InterruptedError):  # nor is a worker that ends for that reason a fault of its model
        prepare.build(runner, runner, GOLDEN, 64, going_on)


def test_only_what_keeps_its_compiled_forms_is_built_ahead_and_gets_the_time() -> None:
    assert prepare.compiles(("TensorrtExecutionProvider", "CPUExecutionProvider"))
    assert prepare.compiles(("QNNExecutionProvider",))
    assert not prepare.compiles(("CUDAExecutionProvider", "CPUExecutionProvider"))
    assert prepare.build_policy(SlotPolicy(deadline=2.0)).deadline == prepare.SECONDS
    assert prepare.build_policy(SlotPolicy(deadline=3000.0)).deadline == 3000.0
    assert prepare.build_policy(SlotPolicy(isolation="in-process")).isolation == "process"
