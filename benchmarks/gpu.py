"""Does the agent keep an NVIDIA GPU as busy as onnxruntime-gpu by itself does?

python -m benchmarks.gpu [--quick] [--json FILE]

A CNN and a transformer encoder at batch 1, 8 and 32: the agent's worker process with the CUDA provider
against a bare session in a process of its own, in turns. To reach: within 5 % of the bare session.
Needs onnxruntime-gpu and a GPU; without them the rows say that nothing could be measured.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from agent.inventory import onnx_providers
from agent.runtime.engine import Engine
from agent.runtime.installed import installed
from agent.runtime.port import LoadOptions
from benchmarks import models
from benchmarks.report import Row, arguments, finish, median, spread
from edgeward.errors import RuntimeFault
from edgeward.wire.slots import SlotPolicy

CUDA = "CUDAExecutionProvider"
BATCHES = (1, 8, 32)
TARGET = 0.95
WORKS: dict[str, tuple[Callable[[], bytes], str, tuple[int, ...]]] = {
    "cnn": (models.cnn, "image", (3, 80, 80)),
    "transformer": (models.transformer, "tokens", (128, 256)),
}
Inputs = dict[str, np.ndarray[Any, Any]]
Infer = Callable[[Inputs], Any]


class NotHere(Exception):
    """The provider cannot be used on this machine."""


def rate(infer: Infer, inputs: Inputs, seconds: float) -> float:
    """Calls per second of one caller."""
    calls, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        infer(inputs)
        calls += 1
    return calls / spent


def tolerant(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    """TF32 and other kernels' order of additions: about three digits."""
    return bool(np.allclose(left, right, rtol=1e-2, atol=1e-2))


def _raw(content: bytes, provider: str, connection: Connection) -> None:
    """The other side of Raw."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session: Any = onnxruntime.InferenceSession(content, options, providers=[provider])

    def infer(inputs: Inputs) -> Any:
        return session.run(None, inputs)

    while (asked := connection.recv()) is not None:
        inputs, seconds = asked
        connection.send(rate(infer, inputs, seconds) if seconds else infer(inputs)[0])


class Raw:
    """A bare session in a process of its own: two CUDA contexts in one would share more than two agents do."""

    def __init__(self, content: bytes, provider: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_raw, args=(content, provider, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def infer(self, inputs: Inputs) -> np.ndarray[Any, Any]:
        """Raises EOFError when the session could not be opened."""
        self._connection.send((inputs, 0.0))
        result: np.ndarray[Any, Any] = self._connection.recv()
        return result

    def rate(self, inputs: Inputs, seconds: float) -> float:
        self._connection.send((inputs, seconds))
        return float(self._connection.recv())

    def stop(self) -> None:
        self._connection.send(None)
        self._process.join(10)


def measure(engine: Engine, name: str, provider: str, rounds: int, seconds: float) -> list[Row]:
    """One model at every batch. Raises NotHere, and RuntimeError when answers differ."""
    make, input_name, shape = WORKS[name]
    content = make()
    load = LoadOptions(providers=(provider,))
    try:
        ours = engine.open("onnx", content, name, SlotPolicy(providers=[provider]), load)
    except RuntimeFault as fault:
        raise NotHere(str(fault)) from None
    raw = Raw(content, provider)
    rows = []
    try:
        for batch in BATCHES:
            array = np.random.default_rng(7).random((batch, *shape), np.float32)
            inputs: Inputs = {input_name: array}
            output = ours.outputs[0].name
            if not tolerant(ours.infer(inputs)[output], raw.infer(inputs)):
                raise RuntimeError(f"{name} at batch {batch}: the answers differ")
            figures: dict[str, list[float]] = defaultdict(list)
            rate(ours.infer, inputs, seconds / 4)
            raw.rate(inputs, seconds / 4)
            for _ in range(rounds):
                figures["ours"].append(rate(ours.infer, inputs, seconds) * batch)
                figures["raw"].append(raw.rate(inputs, seconds) * batch)
            middle, limit = median(figures["ours"]), median(figures["raw"])
            rows.append(
                Row(
                    f"{name}, batch {batch}", "examples/s", middle, limit,
                    target=f">= {TARGET:g} of raw", spread=spread(figures["ours"]), holds=middle >= TARGET * limit,
                )
            )  # fmt: skip
    finally:
        raw.stop()
        ours.stop()
    return rows


def unmeasured() -> list[Row]:
    return [
        Row(f"{name}, batch {batch}", "examples/s", None, target=f">= {TARGET:g} of raw")
        for name in WORKS
        for batch in BATCHES
    ]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--provider", default=CUDA, help=f"another execution provider than {CUDA}")
    options = parser.parse_args()
    rounds, seconds = (2, 0.5) if options.quick else (5, 3.0)
    engine = Engine()
    engine.start()
    try:
        if options.provider not in onnx_providers(installed().get("onnx", ""), None):
            raise NotHere(f"onnxruntime has no {options.provider} here")
        rows = [row for name in WORKS for row in measure(engine, name, options.provider, rounds, seconds)]
        note = f"{options.provider}; {rounds} interleaved rounds of {seconds:g} s"
    except NotHere as why:
        rows, note = unmeasured(), f"nothing measured: {why}"
    finally:
        engine.stop()
    finish("GPU", rows, options.json, [note])


if __name__ == "__main__":
    main()
