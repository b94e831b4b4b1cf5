"""Where a model may run, and what is said when it does not run where it was meant to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.runtime.providers import judge, plan
from edgeward.errors import InvalidDocument
from edgeward.wire.package import Runtime
from edgeward.wire.providers import ACCELERATORS, CPU, check_providers
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
    if (wish or variant) and PROCESSOR not in (wish or variant) and PROCESSOR in made.attempts:
        assert made.meant
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
        ([PROCESSOR], [], SlotPolicy(providers=["EdgeTPU", "GPU"]), ()),
        ([PROCESSOR], [], SlotPolicy(providers=["EdgeTPU"], cpu_fallback=True), (PROCESSOR,)),
        ([PROCESSOR], ["OpenVINOExecutionProvider"], SlotPolicy(providers=[CUDA]), ()),
        ([CUDA, PROCESSOR], [PROCESSOR], SlotPolicy(providers=[CUDA]), ()),
        ([PROCESSOR], ["AcceleratorOfTomorrow"], SlotPolicy(), ()),
    ],
)
def test_the_policy_wins_over_the_package(
    available: list[str], variant: list[str], policy: SlotPolicy, attempts: tuple[str, ...]
) -> None:
    assert plan("onnx", available, variant, policy).attempts == attempts


@pytest.mark.parametrize(
    ("variant", "wish"), [([], ["EdgeTPU"]), (["OpenVINOExecutionProvider"], [CUDA]), (["Unknown"], [])]
)
def test_a_wish_that_fits_nothing_is_told_when_the_processor_takes_it(
    variant: list[str], wish: list[str]
) -> None:
    policy = SlotPolicy(providers=wish, cpu_fallback=True)
    made = plan("onnx", [PROCESSOR], variant, policy)
    condition = judge(made, PROCESSOR, policy).condition
    assert condition is not None and condition.message.startswith((wish or variant)[0])


def test_a_name_that_no_runtime_has_is_refused_with_the_nearest() -> None:
    check_providers([CUDA, "EdgeTPU", "XNNPACK", PROCESSOR], "f")
    with pytest.raises(
        InvalidDocument, match=r"spec.slots.x.providers: .*'CUDAExecutionProvder'.*CUDAExecutionProvider\?"
    ):
        check_providers(["CUDAExecutionProvder"], "spec.slots.x.providers")
    with pytest.raises(InvalidDocument, match=r"one of .*EdgeTPU"):
        check_providers(["??"], "f")


def test_a_part_on_the_processor_is_a_fallback_too() -> None:
    made = plan("onnx", [CUDA, PROCESSOR], [CUDA], SlotPolicy(cpu_fallback=True))
    assert made.attempts == (CUDA, PROCESSOR)
    found = judge(made, f"{CUDA}+{PROCESSOR}", SlotPolicy(cpu_fallback=True)).condition
    assert found is not None
    assert found.message == f"{CUDA} was meant, the model runs on {CUDA}+{PROCESSOR}"
    assert judge(made, f"{CUDA}+{PROCESSOR}", SlotPolicy()).fault


def test_litert_without_xnnpack_is_the_processor() -> None:
    made = plan("tflite", ["EdgeTPU", "XNNPACK"], ["EdgeTPU"], SlotPolicy(cpu_fallback=True))
    assert judge(made, "CPU", SlotPolicy()).fault
    assert judge(made, "EdgeTPU+CPU", SlotPolicy()).fault
    assert not judge(made, "EdgeTPU", SlotPolicy()).fault


@pytest.mark.parametrize("runtime", ["onnx", "tflite"])
def test_each_runtime_has_a_processor_that_is_no_accelerator(runtime: Runtime) -> None:
    assert CPU[runtime] not in ACCELERATORS[runtime]
