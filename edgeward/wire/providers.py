"""What execution providers and delegates are called, by runtime."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from edgeward.errors import InvalidDocument
from edgeward.wire.package import Runtime

#: Each runtime's names for the processor, and its accelerators, best first.
CPU: dict[Runtime, str] = {"onnx": "CPUExecutionProvider", "tflite": "XNNPACK"}
ACCELERATORS: dict[Runtime, tuple[str, ...]] = {
    "onnx": (
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "MIGraphXExecutionProvider",
        "ROCMExecutionProvider",
        "OpenVINOExecutionProvider",
        "QNNExecutionProvider",
        "CoreMLExecutionProvider",
    ),
    "tflite": ("EdgeTPU", "GPU", "NNAPI"),
}

#: Every name that a policy or a package may give.
KNOWN = (*CPU.values(), *(name for names in ACCELERATORS.values() for name in names))


def check_providers(names: Iterable[str], field: str) -> None:
    """Raises InvalidDocument for a name that no runtime has: nothing would ever run on it."""
    for name in names:
        if name not in KNOWN:
            near = get_close_matches(name, KNOWN, n=3, cutoff=0.5)
            raise InvalidDocument(
                f"no execution provider or delegate is called {name!r}",
                field=field,
                hint=f"did you mean {near[0]}?" if near else f"one of {', '.join(KNOWN)}",
            )
