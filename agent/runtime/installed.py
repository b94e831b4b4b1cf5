"""Which runtimes are installed. Imports none of them, and is not imported by workers."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from edgeward.wire.package import Runtime

#: Runtime -> modules that can run it, best first, and the distributions that may have brought each.
_PACKAGES: dict[Runtime, tuple[tuple[str, tuple[str, ...]], ...]] = {
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
    "tflite": (("ai_edge_litert", ("ai-edge-litert",)), ("tflite_runtime", ("tflite-runtime",))),
}


def installed() -> dict[str, str]:
    """Runtime -> `package version` of what would run it here."""
    found: dict[str, str] = {}
    for runtime, packages in _PACKAGES.items():
        for module, distributions in packages:
            if runtime not in found and importlib.util.find_spec(module) is not None:
                found[runtime] = _version(distributions)
    return found


def _version(distributions: tuple[str, ...]) -> str:
    for distribution in distributions:
        try:
            return f"{distribution} {importlib.metadata.version(distribution)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{distributions[-1]} unknown"
