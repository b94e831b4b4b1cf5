"""The port: what every runtime adapter does, and which are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any, Protocol

import numpy.typing as npt

from edgeward.errors import RuntimeFault
from edgeward.wire.package import Runtime

Arrays = dict[str, npt.NDArray[Any]]


class Model(Protocol):
    """A loaded model. `provider` is the execution provider or delegate really used, asked after loading."""

    provider: str

    def infer(self, inputs: Arrays) -> Arrays:
        """Run once; inputs and outputs by tensor name. Raises RuntimeFault naming the tensor at fault."""
        ...


#: Runtime -> the packages that can run it, best first.
_PACKAGES: dict[Runtime, tuple[tuple[str, str], ...]] = {
    "onnx": (("onnxruntime", "onnxruntime"),),
    "tflite": (("ai_edge_litert", "ai-edge-litert"), ("tflite_runtime", "tflite-runtime")),
}


def installed() -> dict[str, str]:
    """Runtime -> `package version` of what would run it here."""
    found: dict[str, str] = {}
    for runtime, packages in _PACKAGES.items():
        for module, distribution in packages:
            if runtime not in found and importlib.util.find_spec(module) is not None:
                try:
                    version = importlib.metadata.version(distribution)
                except importlib.metadata.PackageNotFoundError:
                    version = "unknown"
                found[runtime] = f"{distribution} {version}"
    return found


def load(runtime: Runtime, content: bytes) -> Model:
    """Open a model from its bytes. Raises RuntimeFault."""
    if runtime == "onnx":
        from agent.runtime.onnx import OnnxModel

        return OnnxModel(content)
    if runtime == "tflite":
        from agent.runtime.tflite import TfliteModel

        return TfliteModel(content)
    raise RuntimeFault(f"no adapter for runtime {runtime!r}")
