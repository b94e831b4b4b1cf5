"""The port: tensors, what every runtime adapter does, and which runtimes are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy.typing as npt
from msgspec import Struct

from edgeward.errors import EdgewardError, RuntimeFault
from edgeward.wire.package import Runtime, TensorSpec

Arrays = dict[str, npt.NDArray[Any]]


class Tensor(Struct, frozen=True, array_like=True):
    """A tensor as bytes: little-endian, C-ordered. `dtype` is a NumPy name, `bfloat16` or `bytes`.

    `bytes` elements lie one after the other, each behind its length as 4 bytes little-endian (the
    Open Inference Protocol's binary form).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


class LoadOptions(Struct, frozen=True):
    """How an adapter loads a model.

    `threads` bounds intra-op threads. `providers` are execution providers or delegates to try, best
    first, each by its runtime's own name; the adapter asks afterwards which one it got. An accelerator must
    run all of the model, unless the processor is among them and may have the rest. `compiled` is a
    folder, private to this model and device, where compiled forms (TensorRT engines, optimised graphs)
    are kept and found again; empty: none are kept. `niceness` (0 to 19) is by how much the worker gives way
    to every other process.
    """

    threads: int = 1
    providers: tuple[str, ...] = ()
    gpu_memory_bytes: int | None = None
    compiled: str = ""
    niceness: int = 0


class Overloaded(EdgewardError):
    """The model's queue is full. `retry_after` seconds is when it should have room again."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BadInput(RuntimeFault):
    """The request's inputs are at fault, not the model: the same request fails everywhere."""


class Timing(Struct, frozen=True):
    """Of one request, in nanoseconds: waiting for its turn, and in the runtime (with the batch it was part of)."""

    queue_ns: int
    infer_ns: int
    batch: int


#: Called once, on the engine's loop: output tensors, or why there are none.
Done = Callable[[list[Tensor] | EdgewardError, Timing], None]


class Model(Protocol):
    """A loaded model of one adapter, used by one thread at a time per instance.

    `provider` is the execution provider or delegate really used, asked after loading; where the processor
    runs a part of the model besides an accelerator, both, joined by `+`. `inputs` and `outputs` are the
    signature as the runtime states it.
    """

    provider: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    def infer(self, inputs: Arrays) -> Arrays:
        """Run once; inputs and outputs by tensor name. Raises BadInput naming the tensor at fault, RuntimeFault."""
        ...


class Runner(Protocol):
    """A model ready to serve, in its worker process or in this one; usable from any thread.

    `restarts` counts the workers that were lost, `loss` says what became of the last one.
    """

    provider: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    restarts: int
    loss: str

    def infer(self, inputs: Arrays) -> Arrays:
        """Run and wait. Raises BadInput, RuntimeFault, Overloaded."""
        ...

    def submit(self, inputs: list[Tensor], done: Done) -> None:
        """Queue a request; on the engine's loop only. Raises Overloaded, and RuntimeFault when it is stopped.

        Requests of the same shapes may run as one batch; each gets its own rows.
        """
        ...

    def stop(self, *, at_once: bool = False) -> None:
        """Answer what has been submitted, unless `at_once`; refuse what comes later."""
        ...


def load(runtime: Runtime, content: bytes, options: LoadOptions | None = None) -> Model:
    """Open a model from its bytes. Raises RuntimeFault."""
    options = options or LoadOptions()
    if runtime == "onnx":
        from agent.runtime.onnx import OnnxModel

        return OnnxModel(content, options)
    if runtime == "tflite":
        from agent.runtime.tflite import TfliteModel

        return TfliteModel(content, options)
    raise RuntimeFault(f"no adapter for runtime {runtime!r}")
