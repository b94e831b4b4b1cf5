"""A model in the agent's own process: no worker, no isolation. For trusted, small models only."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from agent.runtime.port import Arrays, Done, LoadOptions, Overloaded, Tensor, Timing, load
from agent.runtime.tensors import to_arrays, to_tensors
from agent.runtime.worker import DeadlineExceeded, WorkerStopped
from edgeward.clock import Clock
from edgeward.errors import EdgewardError, RuntimeFault
from edgeward.wire.package import Runtime
from edgeward.wire.slots import SlotPolicy

log = logging.getLogger(__name__)


class _Request(Struct, eq=False):
    """`work` is called on the model's thread, `answer` once, on any. `started` in monotonic nanoseconds."""

    work: Callable[[], Any]
    answer: Callable[[Any, Timing], None]
    arrived: int
    started: int = 0


class InProcess:
    """A Runner with a thread of its own, in which one request runs after the other.

    A call that has begun cannot be ended from outside: when its deadline is over its caller is told so, and
    until it returns everybody else is refused.
    """

    restarts = 0
    loss = ""

    def __init__(
        self,
        runtime: Runtime,
        content: bytes,
        name: str,
        policy: SlotPolicy,
        options: LoadOptions,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
    ) -> None:
        """Raises RuntimeFault."""
        self._model = load(runtime, content, options)
        self._name = name
        self._policy = policy
        self._clock = clock
        self._loop = loop
        self.provider = self._model.provider
        self.inputs = self._model.inputs
        self.outputs = self._model.outputs
        self._raw = {spec.name: spec.dtype for spec in self.outputs if spec.dtype == "bfloat16"}
        self._changed = threading.Condition()
        # under `_changed`
        self._waiting: deque[_Request] = deque()
        self._running: _Request | None = None
        self._overdue = False
        self._stopped = False
        self._mean_ns = 0.0
        # on the loop
        self._timer: asyncio.TimerHandle | None = None
        self._thread = threading.Thread(target=self._work, name=f"model {name}", daemon=True)
        self._thread.start()

    def infer(self, inputs: Arrays) -> Arrays:
        """See Runner; also raises DeadlineExceeded, WorkerStopped."""
        answers: list[Any] = []
        answered = threading.Event()

        def answer(result: Any, timing: Timing) -> None:
            answers.append(result)
            answered.set()

        self._add(lambda: self._model.infer(inputs), answer)
        while not answered.wait(self._check()):
            pass
        result: Arrays | EdgewardError = answers[0]
        if isinstance(result, EdgewardError):
            raise result
        return result

    def submit(self, inputs: list[Tensor], done: Done) -> None:
        """See Runner."""

        def answer(result: Any, timing: Timing) -> None:
            with contextlib.suppress(RuntimeError):  # the engine has stopped
                self._loop.call_soon_threadsafe(done, result, timing)

        self._add(lambda: to_tensors(self._model.infer(to_arrays(inputs)), self._raw), answer)
        if self._timer is None:
            self._timer = self._loop.call_later(self._policy.deadline, self._look)

    def stop(self, *, at_once: bool = False) -> None:
        """Answer what has been submitted, unless `at_once`; refuse what comes later."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join(0.0 if at_once else self._policy.deadline)
        with self._changed:
            left = self._take_all()
        self._refuse(left, WorkerStopped(f"model {self._name} has been replaced"))

    def _add(self, work: Callable[[], Any], answer: Callable[[Any, Timing], None]) -> None:
        """Raises Overloaded, WorkerStopped."""
        with self._changed:
            if self._stopped:
                raise WorkerStopped(f"model {self._name} has been replaced")
            if self._overdue:
                raise self._blocked()
            waiting = len(self._waiting)
            if waiting >= self._policy.queue:
                raise Overloaded(
                    f"model {self._name}: {waiting} requests wait already",
                    waiting * max(self._mean_ns, 1e6) / 1e9,
                )
            self._waiting.append(_Request(work, answer, self._clock.monotonic_ns()))
            self._changed.notify()

    def _blocked(self) -> Overloaded:
        return Overloaded(
            f"model {self._name}: a call runs beyond its deadline of {self._policy.deadline:g} s and cannot be "
            "ended in the agent's process",
            self._policy.deadline,
        )

    # the model's thread

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._stopped:
                        return
                    self._changed.wait()
                request = self._running = self._waiting.popleft()
                request.started = self._clock.monotonic_ns()
            result: Any
            try:
                result = request.work()
            except EdgewardError as error:
                result = error
            except Exception as error:
                log.exception("model %s", self._name)
                result = RuntimeFault(f"model {self._name}: {error}")
            with self._changed:
                spent = self._clock.monotonic_ns() - request.started
                self._mean_ns += (spent - self._mean_ns) * 0.1
                late, self._overdue = self._overdue, False
                self._running = None
            if late:
                log.warning(
                    "model %s: the call beyond its deadline returned after %.1f s", self._name, spent / 1e9
                )
            else:
                request.answer(result, Timing(request.started - request.arrived, spent, 1))

    # deadlines

    def _check(self) -> float:
        """Give up the running call when its deadline is over; seconds until it is time to look again."""
        deadline = self._policy.deadline
        with self._changed:
            running = self._running
            if running is None or self._overdue:
                return deadline
            left = deadline - (self._clock.monotonic_ns() - running.started) / 1e9
            if left > 0:
                return left
            self._overdue = True
            others = list(self._waiting)
            self._waiting.clear()
        log.warning("model %s did not answer within %g s", self._name, deadline)
        self._refuse([running], DeadlineExceeded(f"model {self._name} did not answer within {deadline:g} s"))
        self._refuse(others, self._blocked())
        return deadline

    def _look(self) -> None:
        self._timer = None
        left = self._check()
        if self._running is not None or self._waiting:
            self._timer = self._loop.call_later(left, self._look)

    def _take_all(self) -> list[_Request]:
        """What has no answer yet; the call that runs loses its own."""
        left = list(self._waiting)
        self._waiting.clear()
        if self._running is not None and not self._overdue:
            left.insert(0, self._running)
            self._overdue = True
        return left

    def _refuse(self, requests: list[_Request], error: EdgewardError) -> None:
        now = self._clock.monotonic_ns()
        for request in requests:
            request.answer(error, Timing(now - request.arrived, 0, 0))
