"""One inference: from checked tensors to the engine and back, counted and timed."""

from __future__ import annotations

import logging
from collections.abc import Callable

from agent.runtime.port import Tensor, Timing
from agent.runtime.tensors import to_array, to_arrays
from agent.runtime.worker import WorkerStopped
from agent.serving.catalog import Catalog, Served
from agent.serving.refusal import NotFinite, Refusal, blames_model, from_engine
from agent.serving.signature import Signature
from agent.serving.statistics import Statistics
from agent.slots.drift import last_column
from edgeward.clock import Clock
from edgeward.errors import EdgewardError

log = logging.getLogger(__name__)

#: Makes the transport's answer from checked outputs of that model and hands it out. May raise Refusal before that.
Finish = Callable[[Signature, dict[str, Tensor]], None]
Fail = Callable[[Refusal], None]

_REMEMBERED_MODELS = 256


class Models:
    """The catalog with a prepared signature for each model in it."""

    def __init__(self, catalog: Catalog, statistics: Statistics) -> None:
        self.catalog = catalog
        self._statistics = statistics
        self._signatures: dict[tuple[str, str], Signature] = {}

    def find(self, name: str, version: str = "") -> Served:
        """Raises Refusal: 404, or 503 while the models are still being loaded."""
        served = self.catalog.find(name, version)
        if served is not None:
            return served
        if not self.catalog.settled:
            raise Refusal(503, f"models are being loaded, '{name[:100]}' may be one of them", retry_after=1)
        acting = self.catalog.find(name) if version else None
        if acting is None:
            raise Refusal(404, f"unknown model '{name[:100]}'")
        raise Refusal(404, f"model '{name}' has no version '{version[:40]}' here, but {acting.version}")

    def ready(self, name: str, version: str = "") -> Signature:
        """Raises Refusal: see `find`, and 503 when the model is not ready."""
        served = self.catalog.find(name, version)
        if served is None:
            served = self.find(name, version)
        if served.runner is None:
            reason = f": {served.reason}" if served.reason else ""
            raise Refusal(503, f"model '{name}' version {served.version} is not ready{reason}", retry_after=1)
        signature = self._signatures.get((name, version))
        if signature is None or (signature.served is not served and signature.served != served):
            if len(self._signatures) >= _REMEMBERED_MODELS:
                self._signatures.clear()
            signature = Signature(served, self._statistics.of(served.name, served.version))
            self._signatures[(name, version)] = signature
        return signature

    def successor(self, signature: Signature, version: str) -> Signature | None:
        """What took a model's place and answers the same requests; None when nothing does.

        `version` is the one that was asked for, empty for whichever acts.
        """
        old = signature.served
        new = self.catalog.find(old.name, version)
        if new is None or new.runner is None or new.runner is old.runner:
            return None
        if (new.inputs, new.outputs, new.nan) != (old.inputs, old.outputs, old.nan):
            return None
        return self.ready(old.name, version)


class Inference:
    """Counts one request as a success or a failure, whichever way it ends.

    A request that its model's worker cannot answer any more, since the slot has another model now, goes over
    to that one: a swap costs nobody an answer.
    """

    __slots__ = (
        "_began",
        "_fail",
        "_finish",
        "_models",
        "_now",
        "_rows",
        "_signature",
        "_submitted",
        "_tensors",
        "_version",
    )

    def __init__(
        self,
        models: Models,
        signature: Signature,
        version: str,
        clock: Clock,
        began: float,
        finish: Finish,
        fail: Fail,
    ) -> None:
        """`began` is the clock's monotonic time when the request was complete, `version` what it asked for."""
        self._models = models
        self._signature = signature
        self._version = version
        self._tensors: list[Tensor] = []
        self._now = clock.monotonic
        self._began = began
        self._finish = finish
        self._fail = fail
        self._rows = 1
        self._submitted = began

    def submit(self, tensors: list[Tensor], body_bytes: int) -> None:
        """Queue it; `finish` or `fail` is called later on this loop, or `fail` at once."""
        signature = self._signature
        stats = signature.stats
        if signature.by_rows and tensors:
            self._rows = tensors[0].shape[0]
        stats.body.observe(body_bytes)
        self._submitted = now = self._now()
        stats.compute_input += now - self._began
        self._tensors = tensors
        self._send()

    def _send(self) -> None:
        while True:
            signature = self._signature
            runner = signature.served.runner
            if runner is None:
                raise AssertionError("only a ready model has a signature")
            signature.stats.pending += 1
            try:
                runner.submit(self._tensors, self._done)
                return
            except EdgewardError as error:
                signature.stats.pending -= 1
                if not self._goes_over(error):
                    self.refuse(from_engine(error))
                    return

    def _goes_over(self, error: EdgewardError) -> bool:
        """Whether `error` means that another model answers now, which is `_signature` then."""
        if not isinstance(error, WorkerStopped):
            return False
        try:
            successor = self._models.successor(self._signature, self._version)
        except Refusal:
            return False
        if successor is None:
            return False
        self._signature = successor
        return True

    def _done(self, result: list[Tensor] | EdgewardError, timing: Timing) -> None:
        signature = self._signature
        stats = signature.stats
        stats.pending -= 1
        arrived = self._now()
        health = signature.served.health
        try:
            if isinstance(result, EdgewardError):
                if self._goes_over(result):
                    self._send()
                    return
                if blames_model(result):
                    health.failed += 1
                raise from_engine(result)
            outputs = self._checked(result)
            health.note(timing.infer_ns)
            self._finish(signature, outputs)
        except NotFinite as refusal:
            health.not_finite += 1
            self.refuse(refusal)
            return
        except Refusal as refusal:
            self.refuse(refusal)
            return
        except Exception:
            log.exception("answering for model %s", signature.served.name)
            self.refuse(Refusal(500, "internal error, see the agent's log"))
            return
        now = self._now()
        stats.compute_output += now - arrived
        stats.succeeded += 1
        stats.last = now
        stats.inferences += self._rows
        stats.executions += self._rows / timing.batch if timing.batch > self._rows else 1.0
        # The engine counts rows only where it may join them.
        stats.batch.observe(max(timing.batch, self._rows))
        stats.queue.observe(timing.queue_ns / 1e9)
        stats.infer.observe(timing.infer_ns / 1e9)
        stats.request.observe(now - self._began)
        served = signature.served
        if served.score:
            health.note_scores(last_column(to_array(outputs[served.score])))
        if (observer := served.tap.observer) is not None and observer.chosen(1):
            observer.offer(to_arrays(self._tensors), to_arrays(list(outputs.values())))

    def _checked(self, result: list[Tensor]) -> dict[str, Tensor]:
        try:
            return self._signature.check_outputs(result)
        except Refusal:
            self._signature.served.health.failed += 1
            raise

    def refuse(self, refusal: Refusal) -> None:
        self._signature.stats.failure(refusal.status, self._now() - self._began)
        self._fail(refusal)
