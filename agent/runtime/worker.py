"""A model in a process of its own: a crash, a hang or a leak costs the worker, not the agent."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any

from agent.runtime.port import Arrays, load
from edgeward.errors import RuntimeFault
from edgeward.wire.package import Runtime

log = logging.getLogger(__name__)

START_DEADLINE = 60.0
_context = multiprocessing.get_context("spawn")


def _serve(pipe: Connection, runtime: Runtime, content: bytes) -> None:
    """The worker's whole life: load, say so, then answer one request after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        model = load(runtime, content)
    except RuntimeFault as error:
        pipe.send(("fault", str(error)))
        return
    pipe.send(("ready", model.provider))
    while True:
        try:
            inputs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", model.infer(inputs)))
        except RuntimeFault as error:
            pipe.send(("fault", str(error)))


class WorkerStopped(RuntimeFault):
    """The model was taken out of its slot; its successor is there."""


class Worker:
    """One model, one process. `infer` may be called from several threads; calls take turns.

    The pipe carries only what our own two processes pickle; nothing from a network or a package does.
    """

    def __init__(self, runtime: Runtime, content: bytes, name: str, *, deadline: float = 10.0) -> None:
        """Start and load. `deadline` bounds each inference in seconds. Raises RuntimeFault."""
        self._runtime = runtime
        self._content = content
        self._name = name
        self._deadline = deadline
        self._lock = threading.Lock()
        self._process: Any = None
        self.provider = ""
        self.restarts = 0
        self._stopped = False
        with self._lock:
            self._start()

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def infer(self, inputs: Arrays) -> Arrays:
        """Run once, and once more on a fresh worker when this one is lost.

        Raises RuntimeFault when the model refuses the inputs, or loses two workers over them.
        """
        with self._lock:
            if self._stopped:
                raise WorkerStopped(f"model {self._name} has been replaced")
            for attempt in (1, 2):
                if self._process is None or not self._process.is_alive():
                    self.restarts += 1
                    self._start()
                try:
                    self._pipe.send(inputs)
                    outputs: Arrays = self._answer(self._deadline)
                    return outputs
                except (EOFError, BrokenPipeError, ConnectionResetError, TimeoutError) as error:
                    why = "did not answer in time" if isinstance(error, TimeoutError) else "crashed"
                    log.warning("model %s: its worker %s (attempt %d)", self._name, why, attempt)
                    self._end()
        raise RuntimeFault(f"model {self._name}: two workers were lost over one request ({why})")

    def stop(self) -> None:
        """End the process once the call in progress has returned."""
        with self._lock:
            self._stopped = True
            self._end()

    def _start(self) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(
            target=_serve,
            args=(theirs, self._runtime, self._content),
            name=f"model-{self._name}",
            daemon=True,
        )
        self._process.start()
        theirs.close()
        try:
            self.provider = str(self._answer(START_DEADLINE))
        except (EOFError, ConnectionResetError, TimeoutError):
            self._end()
            raise RuntimeFault(f"model {self._name}: its worker was lost while loading it") from None
        except RuntimeFault:
            self._end()
            raise

    def _answer(self, seconds: float) -> Any:
        if not self._pipe.poll(seconds):
            raise TimeoutError
        kind, value = self._pipe.recv()
        if kind == "fault":
            raise RuntimeFault(f"model {self._name}: {value}")
        return value

    def _end(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            self._pipe.close()
        self._process.kill()
        self._process.join(5)
        self._process = None
