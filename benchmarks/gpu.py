"""Does the agent's way to the GPU cost anything over raw onnxruntime?

python -m benchmarks.gpu [--quick] [--json FILE]

A CNN and a transformer encoder at batch 1, 8 and 32: the agent's worker with the CUDA provider against
onnxruntime-gpu in this process, in turn. Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnxruntime

from agent.runtime.engine import Engine
from agent.runtime.port import LoadOptions, Runner
from benchmarks import models
from benchmarks.report import Row, arguments, finish, median, spread
from edgeward.errors import RuntimeFault
from edgeward.wire.slots import SlotPolicy

CUDA = "CUDAExecutionProvider"
TARGET = ">= 0.95 of the limit"
BATCHES = (1, 8, 32)


def _raw(content: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=[CUDA, "CPUExecutionProvider"])


def _rate(call: Any, seconds: float) -> float:
    """Calls per second, after a warm-up."""
    for _ in range(5):
        call()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        call()
        count += 1
    return count / (time.perf_counter() - began)


def _measure(
    name: str, runner: Runner, session: Any, tensor: str, shape: tuple[int, ...], rounds: int, seconds: float
) -> list[Row]:
    rows = []
    for batch in BATCHES:
        feed = {tensor: np.random.default_rng(batch).random((batch, *shape), np.float32)}
        ours, limit = [], []
        for _ in range(rounds):
            ours.append(_rate(lambda feed=feed: runner.infer(feed), seconds))
            limit.append(_rate(lambda feed=feed: session.run(None, feed), seconds))
        holds = median(ours) >= 0.95 * median(limit)
        rows.append(
            Row(
                f"{name}, batch {batch}", "calls/s", median(ours), median(limit), None, "", TARGET,
                spread(ours), holds,
            )
        )  # fmt: skip
    return rows


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    works = {
        "CNN": (models.cnn(), "image", (3, 80, 80)),
        "transformer encoder": (models.transformer(), "tokens", (128, 256)),
    }
    rounds, seconds = (2, 1.0) if options.quick else (5, 3.0)
    rows: list[Row] = []
    note = ""
    engine = Engine()
    engine.start()
    try:
        if CUDA not in onnxruntime.get_available_providers():
            raise RuntimeFault(f"onnxruntime {onnxruntime.__version__} here has no {CUDA}")
        for name, (content, tensor, shape) in works.items():
            runner = engine.open("onnx", content, name, SlotPolicy(), LoadOptions(providers=(CUDA,)))
            rows += _measure(name, runner, _raw(content), tensor, shape, rounds, seconds)
            runner.stop()
    except RuntimeFault as fault:
        note = f"not measured: {fault}; run this where an NVIDIA GPU and onnxruntime-gpu are"
        rows = [
            Row(f"{name}, batch {batch}", "calls/s", None, None, None, "", TARGET, None, None)
            for name in works
            for batch in BATCHES
        ]
    finally:
        engine.stop()
    finish("The GPU through the agent against raw onnxruntime", rows, options.json, [note] if note else [])


if __name__ == "__main__":
    main()
