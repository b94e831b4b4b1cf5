"""Where a model may run, and what is said when it does not run where it was meant to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from agent.runtime.onnx import left_over
from agent.runtime.port import LoadOptions, load
from agent.runtime.providers import ACCELERATORS, CPU, judge, plan
from edgeward.errors import RuntimeFault
from edgeward.wire.package import Runtime
from edgeward.wire.slots import SlotPolicy

CUDA, TENSORRT, PROCESSOR = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
some = st.lists(st.sampled_from([*ACCELERATORS["onnx"], PROCESSOR, "AzureExecutionProvider"]), unique=True)


@given(some, some, some, st.booleans())
def test_only_what_is_here_and_allowed_is_tried_and_the_processor_never_in_silence(
    available: list[str], variant: list[str], wish: list[str], cpu_fallback: bool
) -> None:
    policy = SlotPolicy(providers=wish, cpu_fallback=cpu_fallback)
    made = plan("onnx", available, variant, policy)
    assert all(name in available or name == PROCESSOR for name in made.attempts)
    assert "AzureExecutionProvider" not in made.attempts
    if made.meant and PROCESSOR in made.attempts:
        assert cpu_fallback or PROCESSOR in (wish or variant), "a fallback was asked for or named"
        verdict = judge(made, PROCESSOR, policy)
        allowed = cpu_fallback or PROCESSOR in (wish or variant)
        assert bool(verdict.condition) == allowed and bool(verdict.fault) != allowed
    if made.attempts and made.attempts[0] != PROCESSOR:
        verdict = judge(made, made.attempts[0], policy)
        assert not verdict.fault and verdict.condition is None


@pytest.mark.parametrize(
    ("available", "variant", "policy", "attempts"),
    [
        ([PROCESSOR], [], SlotPolicy(), (PROCESSOR,)),
        ([CUDA, TENSORRT, PROCESSOR], [], SlotPolicy(), (TENSORRT, CUDA, PROCESSOR)),
        ([CUDA, PROCESSOR], [CUDA], SlotPolicy(), (CUDA,)),
        ([PROCESSOR], [CUDA], SlotPolicy(), ()),
        ([PROCESSOR], [CUDA], SlotPolicy(cpu_fallback=True), (PROCESSOR,)),
        ([CUDA, PROCESSOR], [TENSORRT, CUDA], SlotPolicy(providers=[CUDA]), (CUDA,)),
        ([CUDA, PROCESSOR], [CUDA], SlotPolicy(providers=[PROCESSOR]), (PROCESSOR,)),
    ],
)
def test_the_policy_wins_over_the_package(
    available: list[str], variant: list[str], policy: SlotPolicy, attempts: tuple[str, ...]
) -> None:
    assert plan("onnx", available, variant, policy).attempts == attempts


def identity() -> bytes:
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", [info[0]], [info[1]])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(made.SerializeToString())


def test_an_accelerator_that_is_not_there_is_named_and_not_replaced() -> None:
    with pytest.raises(RuntimeFault, match="none of CUDAExecutionProvider is in this onnxruntime"):
        load("onnx", identity(), LoadOptions(providers=(CUDA,)))
    assert load("onnx", identity(), LoadOptions(providers=(CUDA, PROCESSOR))).provider == PROCESSOR
    with pytest.raises(RuntimeFault, match=r"libedgetpu\.so\.1 cannot be loaded"):
        load("tflite", b"", LoadOptions(providers=("EdgeTPU",)))
    with pytest.raises(RuntimeFault, match="no such delegate"):
        load("tflite", b"", LoadOptions(providers=("Quantum",)))


def nodes(provider: str, *kinds: str) -> Any:
    return SimpleNamespace(
        ep_name=provider, get_nodes=lambda: [SimpleNamespace(op_type=kind) for kind in kinds]
    )


def test_nodes_that_fell_to_the_processor_are_a_fallback_unless_they_are_bookkeeping() -> None:
    assert left_over([nodes(CUDA, "Conv"), nodes(PROCESSOR, "Shape", "Gather")], CUDA) == ""
    left = left_over(
        [nodes(CUDA, "Conv"), nodes(PROCESSOR, "TreeEnsembleRegressor", "NonMaxSuppression")], CUDA
    )
    assert left.startswith("2 nodes would run on the CPU: 1 x TreeEnsembleRegressor")
    assert left_over([nodes(PROCESSOR, "Shape")], CUDA) == "it runs no node of the model"


@pytest.mark.parametrize("runtime", ["onnx", "tflite"])
def test_each_runtime_has_a_processor_that_is_no_accelerator(runtime: Runtime) -> None:
    assert CPU[runtime] not in ACCELERATORS[runtime]
