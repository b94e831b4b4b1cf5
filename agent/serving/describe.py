"""What the server says about itself and its models: metadata, configuration, repository, statistics."""

from __future__ import annotations

from typing import Any

import edgeward
from agent.serving.catalog import Served
from agent.serving.datatypes import wire_name
from agent.serving.statistics import Histogram, ModelStatistics
from edgeward.clock import Clock
from edgeward.wire.package import TensorSpec

EXTENSIONS = ["binary_tensor_data", "model_repository", "model_configuration", "statistics"]
PLATFORMS = {"onnx": "onnxruntime_onnx", "tflite": "litert_tflite"}
READ_ONLY = "models come to this device through signed rollouts only; it loads and unloads none by request"

_CONFIG_TYPES = {"BYTES": "TYPE_STRING"}


def server() -> dict[str, Any]:
    return {"name": "edgeward", "version": edgeward.__version__, "extensions": EXTENSIONS}


def model(served: Served) -> dict[str, Any]:
    return {
        "name": served.name,
        "versions": [served.version],
        "platform": PLATFORMS[served.runtime],
        "inputs": [_tensor(spec) for spec in served.inputs],
        "outputs": [_tensor(spec) for spec in served.outputs],
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": wire_name(spec.dtype), "shape": spec.shape}


def config(served: Served) -> dict[str, Any]:
    """Triton's model configuration, as far as it means something here.

    `max_batch_size` is 0: shapes are stated whole, whatever the engine joins to batches.
    """
    return {
        "name": served.name,
        "platform": PLATFORMS[served.runtime],
        "backend": served.runtime,
        "max_batch_size": 0,
        "input": [_config_tensor(spec) for spec in served.inputs],
        "output": [_config_tensor(spec) for spec in served.outputs],
    }


def _config_tensor(spec: TensorSpec) -> dict[str, Any]:
    name = wire_name(spec.dtype)
    return {"name": spec.name, "data_type": _CONFIG_TYPES.get(name, f"TYPE_{name}"), "dims": spec.shape}


def index(models: list[Served], *, ready_only: bool) -> list[dict[str, str]]:
    return [
        {
            "name": served.name,
            "version": served.version,
            "state": "READY" if served.ready else "UNAVAILABLE",
            "reason": served.reason,
        }
        for served in models
        if served.ready or not ready_only
    ]


def statistics(name: str, version: str, stats: ModelStatistics, clock: Clock) -> dict[str, Any]:
    """In Triton's shape: durations in nanoseconds, the last inference in milliseconds since 1970."""
    last = clock.now() - (clock.monotonic() - stats.last) if stats.succeeded else 0.0
    nothing = {"count": 0, "ns": 0}
    return {
        "name": name,
        "version": version,
        "last_inference": int(last * 1e3),
        "inference_count": stats.inferences,
        "execution_count": round(stats.executions),
        "inference_stats": {
            "success": _duration(stats.request),
            "fail": {"count": stats.failed, "ns": int(stats.failed_seconds * 1e9)},
            "queue": _duration(stats.queue),
            "compute_input": {"count": stats.succeeded, "ns": int(stats.compute_input * 1e9)},
            "compute_infer": _duration(stats.infer),
            "compute_output": {"count": stats.succeeded, "ns": int(stats.compute_output * 1e9)},
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [],
    }


def _duration(histogram: Histogram) -> dict[str, int]:
    return {"count": histogram.count, "ns": int(histogram.total * 1e9)}
