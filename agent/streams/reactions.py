"""What a stream does at once: its conditions over a window's columns, their gates, and the executor."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from agent.slots.active import ActiveModel
from agent.streams.actions import Gate
from agent.streams.examples import Examples
from agent.streams.execute import Executor
from agent.streams.results import Outputs
from agent.streams.sources.mqtt import fill_in
from edgeward.clock import Clock
from edgeward.conditions import compile_condition
from edgeward.identifiers import DeviceName
from edgeward.wire.desired import StreamTarget

_SUPPRESSED = ("held", "once", "rate")


class Reactions:
    """All actions of one stream. `publish` sends to the local broker, `folder` is where files lie."""

    def __init__(
        self,
        target: StreamTarget,
        name: DeviceName,
        publish: Callable[[str, bytes], bool],
        folder: Path,
        clock: Clock,
    ) -> None:
        """Raises InvalidDocument for a condition that cannot be read or a file that leaves `folder`."""
        self._target = target
        self._name = name
        self._clock = clock
        self._actions = [
            (action, Gate(action), compile_condition(action.when, field=f"spec.actions[{index}].when"))
            for index, action in enumerate(target.spec.actions)
        ]
        self._executor = Executor(publish, folder, clock, target.spec.actions)
        self._suppressed: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def act(
        self,
        model: ActiveModel,
        examples: Examples,
        outputs: Outputs,
        keys: tuple[str, ...],
        received: float,
    ) -> None:
        """Run what is due for `m` examples. `keys` has `m` texts or is empty; `received` is when the oldest
        of their samples came in, in monotonic seconds."""
        if not self._actions or not len(examples):
            return
        columns = self._columns(model, examples, outputs)
        now = self._clock.monotonic()
        for action, gate, condition in self._actions:
            holds = condition.evaluate(columns) & outputs.answered
            if gate.idle:
                if not holds.any():
                    continue
                first = int(np.argmax(holds))
            else:
                first = 0
            for index in range(first, len(holds)):
                verdict = gate.decide(keys[index] if keys else "", bool(holds[index]), now)
                if verdict == "run":
                    topic = fill_in(action.publish, self._name) if action.publish else None
                    message = self._message(model, examples, outputs, index) | {"action": action.name}
                    self._executor.run(action, topic, message, received)
                elif verdict in _SUPPRESSED:
                    with self._lock:
                        self._suppressed[(verdict, action.name)] += 1

    def take(self) -> dict[str, dict[str, float]]:
        """Since the last time, as a stream report carries it; empty when nothing was due."""
        done = self._executor.take()
        with self._lock:
            suppressed, self._suppressed = self._suppressed, Counter()
        found: dict[str, dict[str, float]] = {
            "run": dict(done["run"]),
            "failed": dict(done["failed"]),
            "latency_ms": done["latency_ms"],
        }
        for (verdict, name), number in suppressed.items():
            found.setdefault(verdict, {})[name] = number
        return {what: by_action for what, by_action in found.items() if by_action}

    def stop(self) -> None:
        self._executor.stop()

    def _columns(self, model: ActiveModel, examples: Examples, outputs: Outputs) -> dict[str, Any]:
        """What a condition may name: a model's output hides a feature of the same name."""
        columns: dict[str, Any] = {}
        if examples.inputs.ndim == 2:
            columns = {name: examples.inputs[:, at] for at, name in enumerate(self._target.spec.features)}
        columns |= outputs.columns
        decision = model.package.manifest.decision
        columns["alarm"] = outputs.alarm
        columns["threshold"] = decision.threshold if decision is not None else float("nan")
        return columns

    def _message(
        self, model: ActiveModel, examples: Examples, outputs: Outputs, index: int
    ) -> dict[str, object]:
        decision, stands = model.package.manifest.decision, examples.stands
        scores = {name: float(values[index]) for name, values in outputs.scores.items()}
        finite = {name: value for name, value in scores.items() if np.isfinite(value)}
        value = finite.get(decision.output) if decision is not None else next(iter(finite.values()), None)
        return {
            "device": self._name.device, "stream": self._target.name, "key": stands.key(index),
            "event_time": int(stands.event_time[index]) / 1e6, "value": value,
            "threshold": decision.threshold if decision is not None else None, "outputs": finite,
            "model": model.ref.model, "version": model.ref.version, "digest": model.ref.digest,
            "source_seq": int(stands.seq[index]) if stands.seq is not None else -1,
        }  # fmt: skip
