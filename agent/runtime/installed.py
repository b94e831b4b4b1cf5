"""Which runtimes are installed. Imports none of them, and is not imported by workers."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from edgeward.wire.package import Runtime

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
