"""The worker process: load one model, then answer one request after the other.

Started as `python -m agent.runtime.child SOCKET CONTENT` with two inherited descriptors. It imports
nothing of the agent but the runtime, so that it is small and quick to start.
"""

from __future__ import annotations

import ctypes
import os
import queue
import re
import signal
import socket
import sys
import threading
import time

import msgspec

from agent.runtime import ceiling
from agent.runtime.channel import Channel, Frame, Kind
from agent.runtime.memory import (
    bound_growth,
    give_back_memory,
    offer_to_the_kernel,
    resident_bytes,
    share_one_heap,
)
from agent.runtime.port import BadInput, LoadOptions, Model, Tensor, load
from agent.runtime.tensors import to_arrays, to_tensors
from edgeward.errors import EdgewardError, RuntimeFault
from edgeward.wire.package import Runtime, TensorSpec

_PR_SET_PDEATHSIG = 1
#: While requests follow one another faster than this (mean, seconds), the worker waits for the next one
#: awake: to be woken costs the agent and the request more than the work itself. Rarer requests find it
#: asleep, so that an idle model costs nothing.
_POLL_BELOW, _POLL = 600e-6, 600e-6
_NO_MEMORY = re.compile("(failed|unable|cannot) to allocate|cannot allocate|bad.?alloc", re.IGNORECASE)
#: Accelerators' drivers map memory that is no measure of what a model uses: there only the agent's watch helps.
_BOUNDED = frozenset({"CPUExecutionProvider", "XNNPACK", "CPU"})


class Load(msgspec.Struct, array_like=True):
    """The first frame: what lies in the content descriptor, how to load it, and its memory ceiling."""

    runtime: Runtime
    size: int
    options: LoadOptions
    concurrency: int
    memory_bytes: int | None = None


class Loaded(msgspec.Struct, array_like=True):
    """The answer: what the runtime says of the model."""

    provider: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


def _answer(model: Model, inputs: list[Tensor], raw: dict[str, str]) -> list[Tensor]:
    return to_tensors(model.infer(to_arrays(inputs)), raw)


def _serve_one(
    channel: Channel, model: Model, raw: dict[str, str], frame: Frame, lock: threading.Lock, limit: int
) -> None:
    try:
        outputs = _answer(model, channel.tensors(frame, copy=False), raw)
    except (RuntimeFault, MemoryError) as error:
        kind = Kind.BAD_INPUT if isinstance(error, BadInput) else Kind.FAULT
        problem = str(error) or type(error).__name__
        # The runtimes tell a failed allocation by its text only.
        if limit and (isinstance(error, MemoryError) or _NO_MEMORY.search(problem)):
            problem = ceiling.refused(limit, problem)
        with lock:
            channel.send(kind, frame.slot, problem.encode())
        return
    with lock:
        channel.send_tensors(Kind.RESULT, frame.slot, outputs)


def _poll(channel: Channel, until: float) -> None:
    """Look for the next request without sleeping, and let others run in between."""
    while not channel.readable() and time.monotonic() < until:
        os.sched_yield()


def _bound(models: list[Model], memory_bytes: int | None) -> int:
    """Bound what requests may take, where that can be done; the ceiling it follows from, otherwise 0."""
    if memory_bytes is None or models[0].provider not in _BOUNDED:
        return 0
    return memory_bytes if bound_growth(ceiling.headroom(memory_bytes, resident_bytes())) else 0


def _serve(channel: Channel, models: list[Model], memory_bytes: int | None) -> None:
    raw = {spec.name: spec.dtype for spec in models[0].outputs if spec.dtype == "bfloat16"}
    lock = threading.Lock()
    if len(models) == 1:
        limit = _bound(models, memory_bytes)
        gap = 1.0
        while True:
            answered = time.monotonic()
            if gap < _POLL_BELOW:
                _poll(channel, answered + _POLL)
            frames = channel.receive()
            gap += (min(time.monotonic() - answered, 1.0) - gap) * 0.2
            for frame in frames:
                _serve_one(channel, models[0], raw, frame, lock, limit)
    waiting: queue.SimpleQueue[Frame] = queue.SimpleQueue()

    def work(model: Model) -> None:
        while True:
            try:
                _serve_one(channel, model, raw, waiting.get(), lock, limit)
            except OSError:
                os._exit(0)  # the agent is gone

    limit = 0
    for model in models:
        threading.Thread(target=work, args=(model,), daemon=True).start()
    limit = _bound(models, memory_bytes)  # now that the threads have their stacks
    while True:
        for frame in channel.receive():
            waiting.put(frame)


def main(socket_number: int, content_number: int) -> None:
    """Serve until the agent closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker that hangs in native code must not outlive an agent that was killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    offer_to_the_kernel()
    share_one_heap()
    channel = Channel(socket.socket(fileno=socket_number))
    (first,) = channel.receive()
    wish = msgspec.msgpack.decode(first.payload, type=Load)
    os.nice(wish.options.niceness)  # before the runtime starts its threads, which inherit it
    with os.fdopen(content_number, "rb") as file:
        content = file.read(wish.size)
    try:
        models = [load(wish.runtime, content, wish.options)]
        # An onnxruntime session may be used by several threads, a LiteRT interpreter may not.
        for _ in range(wish.concurrency - 1):
            models.append(models[0] if wish.runtime == "onnx" else load(wish.runtime, content, wish.options))
    except EdgewardError as error:
        channel.send(Kind.FAULT, 0, str(error).encode())
        return
    del content
    give_back_memory()
    model = models[0]
    channel.send(Kind.LOADED, 0, msgspec.msgpack.encode(Loaded(model.provider, model.inputs, model.outputs)))
    _serve(channel, models, wish.memory_bytes)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit(0)
