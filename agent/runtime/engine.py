"""One thread with one event loop for all inference of the agent: workers, queues, and the servers in front.

Local servers run on the same loop and submit without a hop; streams and self-tests call `infer` from
their own threads.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from agent.runtime.inprocess import InProcess
from agent.runtime.port import LoadOptions, Runner
from agent.runtime.worker import Events, Worker, WorkerStopped
from edgeward.clock import Clock, SystemClock
from edgeward.errors import RuntimeFault
from edgeward.wire.package import Runtime
from edgeward.wire.slots import SlotPolicy

__all__ = ["Engine", "WorkerStopped"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_SWITCH_SECONDS = 0.0005


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class Engine:
    """Start it once, open models, stop it last.

    `on_crash_loop(name, losses, seconds)` and `on_recovered(name)` are called on the loop's thread and
    must not wait.
    """

    def __init__(
        self,
        *,
        on_crash_loop: Callable[[str, int, float], None] = lambda name, losses, seconds: None,
        on_recovered: Callable[[str], None] = lambda name: None,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._events = Events(on_crash_loop, on_recovered)
        self.loop = _new_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._runners: weakref.WeakSet[Runner] = weakref.WeakSet()

    def start(self) -> None:
        # By default a thread may keep the interpreter for 5 ms: as long as a request may take altogether.
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it; from any other thread."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return future.result()

    def open(
        self,
        runtime: Runtime,
        content: bytes,
        name: str,
        policy: SlotPolicy | None = None,
        options: LoadOptions | None = None,
        *,
        batchable: bool = False,
    ) -> Runner:
        """Load a model as its policy says; `batchable` when its rows do not depend on one another.

        Raises RuntimeFault when the runtime refuses it or its worker is lost while loading.
        """
        policy = policy or SlotPolicy()
        options = options or LoadOptions(threads=policy.threads, gpu_memory_bytes=policy.gpu_memory_bytes)
        runner: Runner
        if policy.isolation == "in-process":
            runner = InProcess(runtime, content, name, policy, options, self.loop, self._clock)
        else:
            worker = Worker(
                self.loop, runtime, content, name, policy, options, batchable, self._events, self._clock
            )
            self.call(worker.start())
            runner = worker
        self._runners.add(runner)
        return runner

    def stop(self) -> None:
        """End every worker and the loop."""
        for runner in list(self._runners):
            try:
                runner.stop()
            except RuntimeFault as error:
                log.warning("stopping %s", error)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()
