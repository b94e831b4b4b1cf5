"""A model in the agent's own process: no worker, no isolation. For trusted, small models only."""

from __future__ import annotations

import asyncio
import threading

from agent.runtime.port import Arrays, Done, LoadOptions, Tensor, Timing, load
from agent.runtime.tensors import to_arrays, to_tensors
from edgeward.clock import Clock
from edgeward.errors import EdgewardError, RuntimeFault
from edgeward.wire.package import Runtime


class InProcess:
    """A Runner that infers on the caller's thread; callers take turns."""

    restarts = 0

    def __init__(
        self,
        runtime: Runtime,
        content: bytes,
        options: LoadOptions,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
    ) -> None:
        self._model = load(runtime, content, options)
        self._clock = clock
        self._loop = loop
        self._lock = threading.Lock()
        self.provider = self._model.provider
        self.inputs = self._model.inputs
        self.outputs = self._model.outputs
        self._raw = {spec.name: spec.dtype for spec in self.outputs if spec.dtype == "bfloat16"}

    def infer(self, inputs: Arrays) -> Arrays:
        with self._lock:
            return self._model.infer(inputs)

    def submit(self, inputs: list[Tensor], done: Done) -> None:
        began = self._clock.monotonic_ns()
        result: list[Tensor] | EdgewardError
        try:
            result = to_tensors(self.infer(to_arrays(inputs)), self._raw)
        except RuntimeFault as error:
            result = error
        self._loop.call_soon(done, result, Timing(0, self._clock.monotonic_ns() - began, 1))

    def stop(self, *, at_once: bool = False) -> None:
        """Nothing runs on its own here."""
