"""What does a worker process cost a small model, against running it in the agent's own process?

python -m benchmarks.isolation [--quick] [--json FILE]
"""

from __future__ import annotations

import time

import numpy as np

from agent.runtime.engine import Engine
from agent.runtime.port import Runner
from benchmarks import models
from benchmarks.report import Row, arguments, finish, median, spread
from edgeward.wire.slots import SlotPolicy


def latency(runner: Runner, feed: dict[str, np.ndarray], calls: int) -> float:
    """The median of one call from another thread, in milliseconds."""
    for _ in range(calls // 10):
        runner.infer(feed)
    spent = []
    for _ in range(calls):
        began = time.perf_counter()
        runner.infer(feed)
        spent.append(time.perf_counter() - began)
    return float(np.median(spent)) * 1e3


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    rounds, calls = (2, 500) if options.quick else (5, 3000)
    rng = np.random.default_rng(7)
    works = {
        "gradient boosting, 1 row": (models.tabular(), {"input": rng.random((1, 9), np.float32)}, 1),
        "CNN, 1 image of 77 KB": (models.cnn(), {"image": rng.random((1, 3, 80, 80), np.float32)}, 10),
    }
    engine = Engine()
    engine.start()
    rows = []
    try:
        for work, (content, feed, slower) in works.items():
            worker = engine.open("onnx", content, "worker")
            inside = engine.open("onnx", content, "inside", SlotPolicy(isolation="in-process"))
            ours, limit = [], []
            for _ in range(rounds):
                ours.append(latency(worker, feed, calls // slower))
                limit.append(latency(inside, feed, calls // slower))
            rows.append(
                Row(f"{work}, p50 of one call", "ms", median(ours), median(limit), spread=spread(ours))
            )
            worker.stop()
    finally:
        engine.stop()
    finish("A worker process (ours) against in-process (limit)", rows, options.json)


if __name__ == "__main__":
    main()
