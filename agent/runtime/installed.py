"""Which runtimes are installed. Imports none of them, and is not imported by workers."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from edgeward.wire.package import Runtime

#: Runtime -> the modules that can run it, best first, each with the distributions that bring it.
_MODULES: dict[Runtime, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "onnx": (
        (
            "onnxruntime",
            (
                "onnxruntime-gpu",
                "onnxruntime-openvino",
                "onnxruntime-migraphx",
                "onnxruntime-rocm",
                "onnxruntime-qnn",
                "onnxruntime",
            ),
        ),
    ),
    "tflite": (
        ("ai_edge_litert", ("ai-edge-litert", "ai-edge-litert-nightly")),
        ("tflite_runtime", ("tflite-runtime",)),
    ),
}


def installed() -> dict[str, str]:
    """Runtime -> `package version` of what would run it here."""
    found: dict[str, str] = {}
    for runtime, modules in _MODULES.items():
        for module, distributions in modules:
            if runtime not in found and importlib.util.find_spec(module) is not None:
                found[runtime] = _version(distributions)
    return found


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{distributions[-1]} unknown"
