"""One candidate beside the model that acts: fed from a bounded queue on a thread of its own, within its budget.

Nothing here makes the acting model wait: what does not fit into the queue is counted and forgotten.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np

from agent.runtime.port import Arrays, Runner
from agent.runtime.worker import WorkerStopped
from agent.slots.measure import resident_bytes
from agent.slots.shadow import (
    Budget,
    Comparison,
    Tally,
    finite,
    gap,
    rest,
    scores,
    shift,
    too_hot,
)
from agent.slots.tap import Disagreed
from edgeward.clock import Clock
from edgeward.errors import EdgewardError
from edgeward.wire.package import TensorSpec
from edgeward.wire.reports import ShadowReport
from edgeward.wire.slots import ShadowPolicy, SlotPolicy

log = logging.getLogger(__name__)

#: Sampled inferences that may wait, and the bytes of their tensors.
QUEUE, QUEUE_BYTES = 32, 16 << 20
#: How often the temperature is asked for, in seconds: some sensors take milliseconds to answer.
HEAT_SECONDS = 2.0
_STOP_SECONDS = 30.0

_Item = tuple[Arrays, Arrays, Disagreed | None, int]


class Shadowing:
    """An Observer. `policy` is the slot's, `shadow` the run's; `temperature` gives degrees Celsius or None."""

    def __init__(
        self,
        digest: str,
        runner: Runner,
        comparison: Comparison,
        policy: SlotPolicy,
        shadow: ShadowPolicy,
        clock: Clock,
        temperature: Callable[[], float | None],
    ) -> None:
        self._digest = digest
        self._runner = runner
        self._comparison = comparison
        self._reject_nan = policy.nan == "reject"
        self._cores = policy.threads
        self._shadow = shadow
        self._clock = clock
        self._temperature = temperature
        self._random = random.Random(digest)  # noqa: S311  # a sample, not a secret
        self._changed = threading.Condition()
        # under `_changed`
        self._queue: deque[_Item] = deque()
        self._bytes = 0
        self._skip = gap(self._random.random(), shadow.sample) - 1
        self._stopped = False
        self._pausing = False
        self._tally = Tally()
        self._began = clock.monotonic()
        self._peak = 0
        self._heat: float | None = None
        self._heat_at = -HEAT_SECONDS
        self._looked = False
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
        self._thread.start()

    # for those who ask the acting model

    def chosen(self, number: int) -> list[int]:
        """See Observer."""
        found = []
        with self._changed:
            at = self._skip
            while at < number:
                found.append(at)
                at += gap(self._random.random(), self._shadow.sample)
            self._skip = at - number
            room = 0 if self._pausing or self._stopped else QUEUE - len(self._queue)
            self._tally.skipped += max(len(found) - room, 0)
        return found[:room]

    def offer(self, inputs: Arrays, outputs: Arrays, disagreed: Disagreed | None = None) -> None:
        """See Observer."""
        size = sum(array.nbytes for arrays in (inputs, outputs) for array in arrays.values())
        fits = self._bytes + size <= QUEUE_BYTES
        copies = (_copied(inputs), _copied(outputs)) if fits else None
        with self._changed:
            if copies is None or len(self._queue) >= QUEUE or self._pausing or self._stopped:
                self._tally.skipped += 1
                return
            self._queue.append((*copies, disagreed, size))
            self._bytes += size
            self._changed.notify()

    # for the slots' thread

    def look(self, now: float) -> tuple[Tally, Budget, float]:
        """What was seen, what the worker took, and for how many seconds; pauses and goes on as the heat allows.

        `now` is monotonic seconds.
        """
        self._peak = max(self._peak, resident_bytes(self._runner))
        if self._shadow.max_temperature is not None and now - self._heat_at >= HEAT_SECONDS:
            self._heat_at, self._heat = now, self._temperature()
            if self._heat is None and not self._looked:
                log.warning("the device has no temperature sensor: the shadow is not judged by heat")
            self._looked = True
            with self._changed:
                before = self._pausing
                self._pausing = too_hot(self._shadow.max_temperature, self._heat, before)
                if self._pausing:
                    self._tally.skipped += len(self._queue)
                    self._queue.clear()
                    self._bytes = 0
            if before != self._pausing:
                log.warning("shadow %s at %s degrees", "pauses" if self._pausing else "goes on", self._heat)
        budget = Budget(self._runner.restarts, self._runner.loss, self._peak)
        with self._changed:
            tally = Tally()
            tally.merge(self._tally)
        return tally, budget, now - self._began

    def again(self, comparison: Comparison) -> None:
        """Another model acts now: what was compared with the one before says nothing of it."""
        with self._changed:
            self._comparison = comparison
            self._tally = Tally()
            self._queue.clear()
            self._bytes = 0
            self._began = self._clock.monotonic()

    def report(self, tally: Tally) -> ShadowReport:
        """As it goes on; see `ended`."""
        reason = ""
        if self._pausing:
            reason = f"TooHot: {self._heat:.0f} degrees, the limit is {self._shadow.max_temperature:g}"
        elif self._looked and self._heat is None:
            reason = "NoSensor: the temperature is not judged"
        figures = {name: tally.latency(rank) for name, rank in (("p50", 0.5), ("p95", 0.95))}
        return ShadowReport(
            self._digest,
            "paused" if self._pausing else "running",
            reason,
            seen=tally.seen,
            agreed=tally.agreed,
            failed=tally.failed,
            not_finite=tally.not_finite,
            skipped=tally.skipped,
            score_mean=tally.candidate.mean,
            incumbent_mean=tally.incumbent.mean,
            psi=shift(tally.incumbent, tally.candidate),
            latency_ms={name: value for name, value in figures.items() if value is not None},
            memory_bytes=self._peak or None,
            temperature=self._heat,
        )

    def stop(self) -> None:
        """Forget what waits and end the worker."""
        with self._changed:
            self._stopped = True
            self._queue.clear()
            self._changed.notify_all()
        self._runner.stop(at_once=True)
        self._thread.join(_STOP_SECONDS)

    # the shadow's thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopped)
                if self._stopped:
                    return
                inputs, outputs, disagreed, size = self._queue.popleft()
                self._bytes -= size
                tally, comparison = self._tally, self._comparison
            began = self._clock.monotonic_ns()
            try:
                got = self._runner.infer(inputs)
            except WorkerStopped:
                return
            except EdgewardError as error:
                log.info("shadow: %s", error)
                with self._changed:
                    tally.failed += 1
            else:
                self._compare(tally, comparison, outputs, got, self._clock.monotonic_ns() - began, disagreed)
            self._peak = max(self._peak, resident_bytes(self._runner))
            spent = (self._clock.monotonic_ns() - began) / 1e9
            with self._changed:
                pause = rest(spent, self._cores, self._shadow.cpu)
                self._changed.wait_for(lambda: self._stopped, pause)

    def _compare(
        self,
        tally: Tally,
        comparison: Comparison,
        ours: Arrays,
        theirs: Arrays,
        spent_ns: int,
        disagreed: Disagreed | None,
    ) -> None:
        one = Tally(seen=1)
        one.health.note(spent_ns)
        try:
            agree = comparison.agree(ours, theirs)
            one.incumbent.add(scores(ours, comparison.incumbent))
            one.candidate.add(scores(theirs, comparison.candidate))
            if not finite(theirs):
                one.not_finite, agree = 1, agree and not self._reject_nan
        except Exception:
            # Whatever a model answers, it must not end this thread: that is no agreement.
            log.exception("shadow: the answers cannot be compared")
            agree = False
        one.agreed = int(agree)
        with self._changed:
            tally.merge(one)
        if not agree and disagreed is not None:
            disagreed()


def _copied(arrays: Arrays) -> Arrays:
    """What is offered may lie in a buffer that its owner uses again."""
    return {name: np.array(values) for name, values in arrays.items()}


def fed(inputs: list[TensorSpec], own: list[TensorSpec]) -> str:
    """Why a model of inputs `own` cannot be given what one of `inputs` gets; empty when it can."""
    ours = {spec.name: (spec.dtype, spec.shape) for spec in inputs}
    theirs = {spec.name: (spec.dtype, spec.shape) for spec in own}
    if ours.keys() != theirs.keys():
        return f"it has the inputs {', '.join(sorted(theirs))}, the model that runs {', '.join(sorted(ours))}"
    for name, (dtype, shape) in theirs.items():
        kind, sizes = ours[name]
        fits = len(shape) == len(sizes) and all(
            -1 in pair or pair[0] == pair[1] for pair in zip(shape, sizes, strict=True)
        )
        if dtype == "bfloat16":
            return f"its input {name} is bfloat16, which a shadow run cannot give"
        if kind != dtype or not fits:
            return f"its input {name} is {dtype} {shape}, that of the model which runs {kind} {sizes}"
    return ""


def shadowed(policy: SlotPolicy, shadow: ShadowPolicy) -> SlotPolicy:
    """How the candidate's worker runs meanwhile: apart from the agent, one inference at a time, within the
    smaller of both ceilings."""
    ceilings = [size for size in (policy.memory_bytes, shadow.memory_bytes) if size is not None]
    return msgspec.structs.replace(
        policy,
        isolation="process",
        concurrency=1,
        queue_delay_us=0,
        max_batch=1,
        memory_bytes=min(ceilings, default=None),
    )
