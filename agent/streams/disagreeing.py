"""What of a stream is offered to a candidate that runs without acting, and what goes up where both disagree."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from agent.runtime.port import Arrays
from agent.slots.tap import Observer
from agent.streams.examples import Examples
from agent.streams.results import Lineage, Outputs, result_rows, sample_rows
from agent.streams.signature import Signature
from edgeward.clock import Clock
from edgeward.wire.desired import StreamTarget
from edgeward.wire.rows import Row
from edgeward.wire.topics import Lane


class Bucket:
    """At most `rate` per minute, evenly; it begins full. `now` is monotonic seconds."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._left = self._most = max(1.0, rate)
        self._filled: float | None = None

    def take(self, now: float) -> bool:
        if self._filled is not None:
            self._left = min(self._most, self._left + (now - self._filled) * self._rate / 60)
        self._filled = now
        if self._left < 1 - 1e-9:  # the sum of many fractions may lack a little
            return False
        self._left -= 1
        return True


class Disagreeing:
    """Of one stream. The answer of the candidate comes later and on another thread: `take` has what it led to."""

    def __init__(self, target: StreamTarget, clock: Clock) -> None:
        publish = target.spec.publish
        self._target = target
        self._clock = clock
        self._results = publish.results == "disagreeing"
        self._samples = publish.samples == "disagreeing"
        self._bucket = Bucket(publish.disagreeing_rate)
        self._lock = threading.Lock()
        self._rows: deque[tuple[Lane, Row]] = deque()
        self._dropped = 0

    def offer(
        self,
        observer: Observer,
        signature: Signature,
        lineage: Lineage,
        examples: Examples,
        got: Arrays,
        outputs: Outputs,
    ) -> None:
        """Offer a sample of `m` answered examples; `got` has `[m, ...]` of each output."""
        answered = np.flatnonzero(outputs.answered)
        features = self._target.spec.features
        for place in observer.chosen(len(answered)):
            at = int(answered[place])
            inputs = signature.feed(examples.inputs[at : at + 1], features)
            differs = partial(self._differs, lineage, examples, outputs, at)
            wanted = self._results or self._samples
            observer.offer(
                inputs,
                {name: values[at : at + 1] for name, values in got.items()},
                differs if wanted else None,
            )

    @property
    def waiting(self) -> bool:
        return bool(self._rows)

    def take(self) -> tuple[list[tuple[Lane, Row]], int]:
        """The rows that go up since the last time, and how many examples the rate kept back."""
        with self._lock:
            rows, self._rows = list(self._rows), deque()
            dropped, self._dropped = self._dropped, 0
        return rows, dropped

    def _differs(self, lineage: Lineage, examples: Examples, outputs: Outputs, at: int) -> None:
        with self._lock:
            if not self._bucket.take(self._clock.monotonic()):
                self._dropped += 1
                return
        alone = _alone(examples, at)
        rows: list[tuple[Lane, Row]] = []
        if self._results:
            one = Outputs(
                {name: values[at : at + 1] for name, values in outputs.columns.items()},
                {name: values[at : at + 1] for name, values in outputs.scores.items()},
                outputs.alarm[at : at + 1],
                outputs.answered[at : at + 1],
            )
            made = result_rows(self._target, lineage, alone, one, np.ones(1, np.bool_))
            rows += [("result", row) for row in made]
        if self._samples:
            features = self._target.spec.features
            rows += [("sample", row) for row in sample_rows(self._target, alone, features)]
        with self._lock:
            self._rows.extend(rows)


def _alone(examples: Examples, at: int) -> Examples:
    """One example with the samples that are accounted for with it."""
    mine: npt.NDArray[np.intp] = np.flatnonzero(examples.owner == at)
    return replace(
        examples,
        samples=examples.samples.take(mine),
        inputs=examples.inputs[at : at + 1],
        owner=np.zeros(len(mine), np.int64),
        stands=examples.stands.take(np.array([at])),
        late=0,
    )
