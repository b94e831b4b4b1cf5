from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.runtime.port import LoadOptions, load
from agent.runtime.providers import ONNX, TFLITE, is_cpu, judge, of, wanted
from edgeward.wire.slots import SlotPolicy
from tests.agent.runtime import graphs

AZURE, CPU, CUDA = "AzureExecutionProvider", "CPUExecutionProvider", "CUDAExecutionProvider"
NAMES = st.sampled_from([*ONNX, *TFLITE, AZURE, "NewExecutionProvider"])
LISTS = st.lists(NAMES, max_size=6)


@given(LISTS, LISTS, LISTS)
def test_wanted_takes_the_policy_then_the_variant_then_the_best(
    available: list[str], variant: list[str], allowed: list[str]
) -> None:
    got = wanted(available, variant, SlotPolicy(providers=allowed))
    assert AZURE not in got
    assert len(set(got)) == len(got)
    source = allowed or [name for name in variant if name in available] or variant
    if source:
        assert list(got) == [name for name in dict.fromkeys(source) if name != AZURE]
    else:
        assert set(got) == {name for name in available if name in (*ONNX, *TFLITE)}
        order = (*ONNX, *TFLITE)
        assert [order.index(name) for name in got] == sorted(order.index(name) for name in got)


@given(st.permutations(ONNX), st.permutations(TFLITE))
def test_the_best_accelerator_comes_first_and_the_cpu_last(onnx: list[str], lite: list[str]) -> None:
    assert wanted(onnx, [], SlotPolicy()) == ONNX
    assert wanted(lite, [], SlotPolicy()) == TFLITE


def test_a_variant_for_many_devices_is_asked_for_where_it_can_run() -> None:
    assert wanted([AZURE, CPU], [CUDA, CPU], SlotPolicy()) == (CPU,)
    assert wanted([AZURE, CPU], [CUDA], SlotPolicy()) == (CUDA,)
    assert wanted([AZURE, CPU], [CPU], SlotPolicy(providers=[CUDA, CPU])) == (CUDA, CPU)


def test_each_runtime_has_its_own() -> None:
    assert of("onnx", [CUDA, "GPU", CPU, "XNNPACK"]) == [CUDA, CPU]
    assert of("tflite", [CUDA, "GPU", CPU, "XNNPACK"]) == ["GPU", "XNNPACK"]


def test_only_azure_leaves_nothing() -> None:
    assert wanted([AZURE], [AZURE], SlotPolicy(providers=[AZURE])) == ()


@given(LISTS, st.sampled_from([*ONNX, *TFLITE, "CPU"]), st.booleans())
def test_the_cpu_instead_of_an_accelerator_is_never_silent(
    asked: list[str], used: str, allowed: bool
) -> None:
    verdict = judge(tuple(asked), used, SlotPolicy(cpu_fallback=allowed))
    fell = bool(asked) and not is_cpu(asked[0]) and is_cpu(used)
    assert (not verdict.acceptable) == (fell and not allowed)
    assert (verdict.condition is not None) == (fell and allowed)
    text = verdict.error or (verdict.condition.message if verdict.condition else "")
    if fell:
        assert asked[0] in text
        assert used in text


def test_the_condition_names_itself() -> None:
    condition = judge((CUDA, CPU), CPU, SlotPolicy(cpu_fallback=True)).condition
    assert condition is not None
    assert (condition.type, condition.status, condition.reason) == ("ProviderFallback", "True", "RunsOnCPU")
    assert condition.message == f"asked for {CUDA}, {CPU}; the runtime uses {CPU}"


def test_the_next_accelerator_is_no_fall() -> None:
    assert judge(("TensorrtExecutionProvider", CUDA), CUDA, SlotPolicy()).acceptable


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this build has CUDA")
@pytest.mark.parametrize("allowed", [False, True])
def test_a_build_without_cuda_is_found_out(allowed: bool) -> None:
    policy = SlotPolicy(providers=[CUDA], cpu_fallback=allowed)
    asked = wanted(onnxruntime.get_available_providers(), [], policy)
    model = load("onnx", graphs.onnx_dense(), LoadOptions(providers=asked))
    assert model.infer({"x": np.ones((1, 3), np.float32)})["y"].shape == (1, 2)
    verdict = judge(asked, model.provider, policy)
    assert verdict.acceptable == allowed
    assert (verdict.condition is not None) == allowed
