"""When a running model must give way to its predecessor: decided on the device alone, from what it did. Pure.

`Health` is counted where models are asked (streams, local servers); `Guard` looks at it now and then.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from agent.runtime import recovery
from agent.slots.drift import ScoreBins, drift
from edgeward.wire.slots import GuardPolicy

#: Upper bounds of latency classes in nanoseconds, each 10 % above the one before: 10 us to over a minute.
_BOUNDS = [round(10_000 * 1.1**n) for n in range(170)]


class Health:
    """What a model in a slot has done since it became active. Any thread may add; none waits."""

    __slots__ = ("_adding", "alarms", "answered", "classes", "failed", "not_finite", "scores")

    def __init__(self) -> None:
        self.answered = 0
        self.failed = 0
        self.not_finite = 0
        self.alarms = 0
        self.classes = [0] * (len(_BOUNDS) + 1)
        #: None unless the guard's policy asks for it: counting scores is not free.
        self.scores: ScoreBins | None = None
        self._adding = threading.Lock()

    def note_scores(self, scores: npt.NDArray[np.floating]) -> None:
        """`scores` `[n]` are what inferences are judged by; to be called where `scores` is not None."""
        if self.scores is not None:
            with self._adding:
                self.scores.add(scores)

    def note(self, spent_ns: int, number: int = 1) -> None:
        """`number` inferences were answered after `spent_ns` in the runtime."""
        self.answered += number
        self.classes[bisect_left(_BOUNDS, spent_ns)] += number


@dataclass(frozen=True)
class Mark:
    """Health at one moment: `at` is monotonic seconds."""

    at: float
    answered: int
    failed: int
    not_finite: int
    alarms: int
    classes: tuple[int, ...]
    scores: tuple[int, ...] = ()
    reference: tuple[float, ...] = ()


@dataclass(frozen=True)
class Breach:
    """A limit of the policy that was passed, with both figures."""

    reason: str
    message: str
    measured: float
    limit: float


def crash_loop_breach(losses: int) -> Breach:
    """A worker that is lost again and again, whatever it answers in between."""
    message = f"its worker was lost {losses} times within {recovery.LOOP_SECONDS:.0f} s"
    return Breach("CrashLoop", message, float(losses), float(recovery.LOOP_LOSSES))


def mark(health: Health, now: float) -> Mark:
    figures = health.answered, health.failed, health.not_finite, health.alarms, tuple(health.classes)
    scores = health.scores
    return (
        Mark(now, *figures, scores.counts, scores.proportions) if scores is not None else Mark(now, *figures)
    )


def judge(policy: GuardPolicy, before: Mark, after: Mark) -> Breach | None:
    """What of the inferences between two marks breaks the policy; None when nothing does, or they are too few."""
    answered, failed = after.answered - before.answered, after.failed - before.failed
    asked = answered + failed
    if asked < policy.minimum:
        return None
    seconds = after.at - before.at

    def share(number: int, of: int, limit: float | None, reason: str, what: str) -> Breach | None:
        if limit is None or not of or number / of <= limit:
            return None
        return Breach(reason, f"{number} of {of} inferences in {seconds:.0f} s {what}", number / of, limit)

    found = (
        share(failed, asked, policy.error_rate, "GuardErrorRate", "failed")
        or share(
            after.not_finite - before.not_finite,
            answered,
            policy.nan_rate,
            "GuardNanRate",
            "gave NaN or infinity",
        )
        or share(
            after.alarms - before.alarms, answered, policy.alarm_rate, "GuardAlarmRate", "raised an alarm"
        )
    )
    if found is None and policy.output_drift is not None and after.reference:
        moved = drift(after.reference, before.scores, after.scores)
        if moved is not None and moved[0] > policy.output_drift:
            message = f"the PSI of {moved[1]} scores in {seconds:.0f} s against the first ones"
            found = Breach("GuardOutputDrift", message, moved[0], policy.output_drift)
    if found is not None or policy.latency_ms is None or not answered:
        return found
    p95 = percentile(before.classes, after.classes, 0.95)
    if p95 <= policy.latency_ms:
        return None
    return Breach("GuardLatency", f"p95 of {answered} inferences in {seconds:.0f} s", p95, policy.latency_ms)


def percentile(before: tuple[int, ...], after: tuple[int, ...], rank: float) -> float:
    """Milliseconds that `rank` of the inferences between two marks did not pass, to 10 %: their class's bound."""
    counts = [new - old for old, new in zip(before, after, strict=True)]
    left = rank * sum(counts)
    for bound, count in zip([*_BOUNDS, _BOUNDS[-1] * 2], counts, strict=True):
        left -= count
        if left <= 0 and count:
            return bound / 1e6
    return 0.0


class Guard:
    """Looks at one model's health over the policy's sliding window."""

    def __init__(self, policy: GuardPolicy) -> None:
        self._policy = policy
        self._marks: deque[Mark] = deque()

    def look(self, health: Health, now: float) -> Breach | None:
        """`now` is monotonic seconds. Judges since the youngest mark that is `window` old, or since the first."""
        marks, window = self._marks, self._policy.window
        if not marks:
            # What was asked before the first look counts too.
            marks.append(mark(Health(), now))
        elif now - marks[-1].at >= window / 60:
            marks.append(mark(health, now))
        while len(marks) > 1 and now - marks[1].at >= window:
            marks.popleft()
        return judge(self._policy, marks[0], mark(health, now))
