"""What does a worker process cost a small model, against the same model in the agent's own process?

python -m benchmarks.isolation [--quick] [--json FILE]

One caller, one row at a time, in turns: from a thread (streams, self-tests), and on the engine's loop (local
serving). `limit` is the adapter called directly.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from agent.runtime.engine import Engine
from agent.runtime.port import LoadOptions, Runner, Tensor, Timing, load
from agent.runtime.tensors import to_tensors
from benchmarks import models
from benchmarks.report import Row, arguments, finish, median, spread
from edgeward.errors import EdgewardError
from edgeward.wire.slots import SlotPolicy

Inputs = dict[str, np.ndarray[Any, Any]]
INPUTS: Inputs = {"input": np.random.default_rng(7).random((1, 9), np.float32)}


def p50_us(infer: Callable[[Inputs], Any], inputs: Inputs, seconds: float) -> float:
    """Median microseconds of one call."""
    for _ in range(200):
        infer(inputs)
    spent = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter_ns()
        infer(inputs)
        spent.append(time.perf_counter_ns() - began)
    return float(np.median(spent)) / 1e3


async def loop_p50_us(runner: Runner, tensors: list[Tensor], seconds: float) -> float:
    """As p50_us, on the engine's loop."""
    loop = asyncio.get_running_loop()
    spent = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        answered: asyncio.Future[list[Tensor] | EdgewardError] = loop.create_future()

        def done(result: list[Tensor] | EdgewardError, timing: Timing, to: Any = answered) -> None:
            to.set_result(result)

        began = time.perf_counter_ns()
        runner.submit(tensors, done)
        result = await answered
        spent.append(time.perf_counter_ns() - began)
        if isinstance(result, EdgewardError):
            raise result
    return float(np.median(spent)) / 1e3


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    rounds, seconds = (2, 0.5) if options.quick else (5, 3.0)
    content = models.tabular()
    inputs = INPUTS
    engine = Engine()
    engine.start()
    try:
        process = engine.open("onnx", content, "process", SlotPolicy())
        inside = engine.open("onnx", content, "in-process", SlotPolicy(isolation="in-process"))
        direct = load("onnx", content, LoadOptions())
        figures: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for name, infer in (
                ("process", process.infer),
                ("in-process", inside.infer),
                ("direct", direct.infer),
            ):
                figures[name].append(p50_us(infer, inputs, seconds))
            for name, runner in (("process, on the loop", process), ("in-process, on the loop", inside)):
                figures[name].append(engine.call(loop_p50_us(runner, to_tensors(inputs), seconds)))
        process.stop()
        inside.stop()
    finally:
        engine.stop()
    limit = median(figures["direct"])
    rows = [
        Row(f"boosting, 1 row, {name}, p50", "us", median(figures[name]), limit, spread=spread(figures[name]))
        for name in figures
        if name != "direct"
    ]
    middle = {name: median(values) for name, values in figures.items()}
    thread = middle["process"] - middle["in-process"]
    served = middle["process, on the loop"] - middle["in-process, on the loop"]
    notes = [
        f"{rounds} interleaved rounds of {seconds:g} s; limit: the adapter called directly",
        f"the worker process costs {thread:.0f} us a call from a thread, {served:.0f} us on the engine's loop",
    ]
    finish("isolation", rows, options.json, notes)


if __name__ == "__main__":
    main()
