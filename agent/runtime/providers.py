"""Which execution providers or delegates to ask for, and whether what came of it is acceptable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeward.wire.package import Runtime
from edgeward.wire.reports import Condition
from edgeward.wire.slots import SlotPolicy

#: onnxruntime's, the fastest first where a device has several. Azure's sends data away: never.
ONNX = (
    "TensorrtExecutionProvider",
    "CUDAExecutionProvider",
    "MIGraphXExecutionProvider",
    "ROCMExecutionProvider",
    "OpenVINOExecutionProvider",
    "QNNExecutionProvider",
    "CoreMLExecutionProvider",
    "CPUExecutionProvider",
)
#: LiteRT's.
TFLITE = ("EdgeTPU", "GPU", "NNAPI", "XNNPACK")

_ORDER = {name: index for index, name in enumerate((*ONNX, *TFLITE))}
#: Where the CPU does the work. `CPU` are LiteRT's own kernels, where XNNPACK takes nothing.
_CPU = frozenset({"CPUExecutionProvider", "XNNPACK", "CPU"})
_NEVER = frozenset({"AzureExecutionProvider"})


def is_cpu(name: str) -> bool:
    return name in _CPU


def of(runtime: Runtime, available: Sequence[str]) -> list[str]:
    """Those of one runtime among a device's providers and delegates."""
    lite = {*TFLITE, "CPU"}
    return [name for name in available if (name in lite) == (runtime == "tflite")]


def wanted(available: Sequence[str], variant_providers: Sequence[str], policy: SlotPolicy) -> tuple[str, ...]:
    """What to ask for, best first, without repetition. Never Azure's.

    The policy's list is taken as it is: what an operator asks for and the device lacks must show as a
    fallback, not vanish here. Of the variant's list, which says where the form can run at all, the
    available ones are taken (all, when none is: then that must show). With neither, every available
    provider that is known here, accelerators first.
    """
    listed = list(policy.providers)
    if not listed:
        listed = [name for name in variant_providers if name in available] or list(variant_providers)
    if not listed:
        listed = sorted((name for name in available if name in _ORDER), key=_ORDER.__getitem__)
    return tuple(dict.fromkeys(name for name in listed if name not in _NEVER))


@dataclass(frozen=True, slots=True)
class Verdict:
    """`error` is why the model must not run there (empty: it may); `condition` is what to report of it."""

    error: str = ""
    condition: Condition | None = None

    @property
    def acceptable(self) -> bool:
        return not self.error


def judge(asked: Sequence[str], used: str, policy: SlotPolicy) -> Verdict:
    """The CPU in an accelerator's place is an error, or with `policy.cpu_fallback` a condition.

    `used` is what the runtime said after loading. An accelerator further down the list is no fall: it was
    asked for. The condition has no times; the caller knows them.
    """
    if not asked or is_cpu(asked[0]) or not is_cpu(used):
        return Verdict()
    message = f"asked for {', '.join(asked)}; the runtime uses {used}"
    if not policy.cpu_fallback:
        return Verdict(error=f"{message}, and the policy does not allow the CPU instead (cpuFallback)")
    return Verdict(condition=Condition("ProviderFallback", "True", "RunsOnCPU", message))
