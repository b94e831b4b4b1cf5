"""Whether a candidate that runs without acting agrees with the model that acts: tallies and verdicts. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasketches
import numpy as np
import numpy.typing as npt

from agent.runtime.port import Arrays
from agent.slots.drift import edges_of
from agent.slots.guard import Health, mark, percentile
from agent.streams.sketches import SKETCH_K, psi
from edgeward.errors import PackageError
from edgeward.wire.package import Decision, TensorSpec
from edgeward.wire.slots import ShadowPolicy

Floats = npt.NDArray[np.float64]

#: The score shift is not judged on fewer: of n scores on each side, bins and no shift at all, a PSI is about
#: (bins - 1) * 2 / n (Yurdakul, Statistical Properties of Population Stability Index, 2018).
SHIFT_MINIMUM = 100
_TENTHS = [n / 10 for n in range(1, 10)]
_LARGEST = float(np.finfo(np.float32).max)
#: Degrees Celsius below the limit at which a shadow that was too hot goes on.
COOLER = 5.0


@dataclass(frozen=True)
class Side:
    """What of a model says how its answers are to be read."""

    outputs: Sequence[TensorSpec]
    decision: Decision | None = None


@dataclass(frozen=True)
class Comparison:
    """Two models' answers to the same input; `labels` and `numbers` are the outputs that both have."""

    incumbent: Side
    candidate: Side
    tolerance: float
    labels: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()

    @classmethod
    def of(cls, incumbent: Side, candidate: Side, tolerance: float) -> Comparison:
        """Raises PackageError when the models have nothing that could be compared."""
        theirs = {spec.name: spec for spec in candidate.outputs}
        common = [spec for spec in incumbent.outputs if spec.name in theirs]
        labels = tuple(spec.name for spec in common if _labels(spec) and _labels(theirs[spec.name]))
        numbers = tuple(spec.name for spec in common if _numbers(spec) and _numbers(theirs[spec.name]))
        if not (labels or numbers or (incumbent.decision and candidate.decision)):
            raise PackageError(
                f"its outputs ({_names(candidate.outputs)}) are none of those of the model that runs "
                f"({_names(incumbent.outputs)}), and no decision says how to compare them",
                hint="give both packages a decision, or activate this version without a shadow run",
            )
        return cls(incumbent, candidate, tolerance, labels, numbers)

    def agree(self, ours: Arrays, theirs: Arrays) -> bool:
        """Whether the candidate's answer (`theirs`) to one inference says what the incumbent's does, in every row."""
        if self.incumbent.decision is not None and self.candidate.decision is not None:
            one, other = alarms(ours, self.incumbent.decision), alarms(theirs, self.candidate.decision)
            return bool(np.array_equal(one, other))
        if self.labels:
            return all(_same_labels(ours[name], theirs[name]) for name in self.labels)
        return all(self._near(ours[name], theirs[name]) for name in self.numbers)

    def _near(self, ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> bool:
        mine, other = _rows(ours), _rows(theirs)
        if mine.shape != other.shape:
            return False
        if _probabilities(mine) and _probabilities(other):
            return bool((mine.argmax(axis=1) == other.argmax(axis=1)).all())
        with np.errstate(invalid="ignore"):
            near = np.abs(other - mine) <= self.tolerance * np.maximum(1.0, np.abs(mine))
        return bool((near | (np.isnan(mine) & np.isnan(other)) | (mine == other)).all())


def _labels(spec: TensorSpec) -> bool:
    return spec.dtype in ("bytes", "bool") or spec.dtype.startswith(("int", "uint"))


def _numbers(spec: TensorSpec) -> bool:
    """Not bfloat16, which arrays hold as its bits."""
    return spec.dtype.startswith("float")


def _names(outputs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in outputs) or "none"


def _rows(values: npt.NDArray[Any]) -> Floats:
    array = np.asarray(values, np.float64)
    return array.reshape(array.shape[0], -1) if array.ndim and array.shape[0] else array.reshape(1, -1)


def _same_labels(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> bool:
    """A stream keeps labels as numbers, a server's text is bytes or str."""
    one, other = np.asarray(ours).reshape(-1).tolist(), np.asarray(theirs).reshape(-1).tolist()
    text = [[item.encode() if isinstance(item, str) else item for item in items] for items in (one, other)]
    return text[0] == text[1]


def _probabilities(rows: Floats) -> bool:
    """Whether each row has several shares of one."""
    return rows.shape[1] > 1 and bool(((rows >= 0).all(axis=1) & (np.abs(rows.sum(axis=1) - 1) < 1e-3)).all())


def alarms(outputs: Arrays, decision: Decision) -> npt.NDArray[np.bool_]:
    """The decision's verdict on each row; NaN raises no alarm."""
    value = _rows(outputs[decision.output])[:, -1]
    return value > decision.threshold if decision.direction == "above" else value < decision.threshold


def score_output(side: Side) -> str:
    """The output that a model is judged by: the decision's, or else the first one of numbers; empty without."""
    if side.decision is not None:
        return side.decision.output
    return next((spec.name for spec in side.outputs if _numbers(spec)), "")


def scores(outputs: Arrays, side: Side) -> Floats:
    """What a model's answer is judged by, for each row that is finite: the last column of its score output."""
    name = score_output(side)
    if name not in outputs:
        return np.zeros(0)
    column = _rows(outputs[name])[:, -1]
    return column[np.isfinite(column)]


def finite(outputs: Arrays) -> bool:
    return all(
        bool(np.isfinite(np.asarray(values, np.float64)).all())
        for values in outputs.values()
        if values.dtype.kind == "f"
    )


class Scores:
    """The distribution of scores in bounded memory: their mean and a KLL sketch, mergeable."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self._sketch = datasketches.kll_floats_sketch(SKETCH_K)

    def add(self, values: Floats) -> None:
        """`values` `[n]`, finite."""
        if len(values):
            self.count += len(values)
            self.total += float(values.sum())
            self._sketch.update(np.clip(values, -_LARGEST, _LARGEST).astype(np.float32))

    def merge(self, other: Scores) -> None:
        self.count += other.count
        self.total += other.total
        self._sketch.merge(other._sketch)

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def tenths(self) -> list[float]:
        """The inner edges of bins that hold a tenth each; fewer where many scores are the same."""
        return edges_of(self._sketch.get_quantiles(_TENTHS)) if self.count else []

    def shares(self, edges: Sequence[float]) -> list[float]:
        """The share in each of the bins `(-inf, e1], (e1, e2], ..., (en, inf)`."""
        if not edges:
            return [1.0]
        return [float(share) for share in self._sketch.get_pmf(list(edges), True)]


def shift(incumbent: Scores, candidate: Scores) -> float | None:
    """The population stability index of the candidate's scores, in tenths of the incumbent's; None without any.

    Of sketches, each share is right to their error of a rank (1.3 %), exactly so while there are few scores.
    """
    if not incumbent.count or not candidate.count:
        return None
    edges = incumbent.tenths()
    live = candidate.shares(edges)
    return psi(incumbent.shares(edges), [round(share * candidate.count) for share in live])


@dataclass
class Tally:
    """What a candidate did: `seen` inferences compared, `agreed` of them; see ShadowReport. Mergeable."""

    seen: int = 0
    agreed: int = 0
    failed: int = 0
    not_finite: int = 0
    skipped: int = 0
    health: Health = field(default_factory=Health)
    incumbent: Scores = field(default_factory=Scores)
    candidate: Scores = field(default_factory=Scores)

    def merge(self, other: Tally) -> None:
        self.seen += other.seen
        self.agreed += other.agreed
        self.failed += other.failed
        self.not_finite += other.not_finite
        self.skipped += other.skipped
        self.health.answered += other.health.answered
        self.health.classes = [
            one + more for one, more in zip(self.health.classes, other.health.classes, strict=True)
        ]
        self.incumbent.merge(other.incumbent)
        self.candidate.merge(other.candidate)

    @property
    def asked(self) -> int:
        return self.seen + self.failed

    def latency(self, rank: float) -> float | None:
        """Milliseconds of the candidate's inferences, to 10 %."""
        if not self.health.answered:
            return None
        return percentile(mark(Health(), 0.0).classes, tuple(self.health.classes), rank)


@dataclass(frozen=True)
class Budget:
    """What the worker took: how often it was `lost` and why (`loss`), and its resident bytes at the most."""

    lost: int = 0
    loss: str = ""
    memory_bytes: int = 0


@dataclass(frozen=True)
class Finding:
    """`passed` is None while more must be seen. `lasting`: whatever the policy (see Refused)."""

    passed: bool | None
    reason: str = ""
    message: str = ""
    measured: float | None = None
    limit: float | None = None
    lasting: bool = False


GOES_ON = Finding(None)


def broken(policy: ShadowPolicy, budget: Budget) -> Finding | None:
    """What ends any shadow at once, also one that is to run for as long as it is wished."""
    limit = policy.memory_bytes
    if limit is not None and budget.memory_bytes > limit:
        held = budget.memory_bytes
        return Finding(False, "ShadowMemory", f"its worker held {held >> 20} MiB", float(held), float(limit))
    if budget.lost:
        message = f"its worker {budget.loss or 'was lost'}"
        return Finding(False, "ShadowWorkerLost", message, float(budget.lost), 0.0, "crashed" in budget.loss)
    return None


def judge(policy: ShadowPolicy, tally: Tally, budget: Budget, elapsed: float, *, finite: bool) -> Finding:
    """`elapsed` seconds after its begin; with `finite` an answer that is NaN or infinite is as good as none."""
    if (found := broken(policy, budget)) is not None:
        return found
    bad = tally.failed + (tally.not_finite if finite else 0)
    late = elapsed >= policy.deadline
    if bad > policy.max_error_rate * max(policy.inferences, tally.asked) or (
        late and bad > policy.max_error_rate * tally.asked
    ):
        what = f"{bad} of {tally.asked} inferences failed or gave NaN or infinity"
        return Finding(False, "ShadowErrors", what, bad / tally.asked, policy.max_error_rate)
    enough = tally.asked >= policy.inferences
    if not enough and not late:
        return GOES_ON
    if tally.seen and (worse := _worse(policy, tally)) is not None:
        return worse
    if enough and tally.seen:
        agreed = tally.agreed / tally.seen
        message = f"{tally.agreed} of {tally.seen} inferences agreed"
        return Finding(True, "ShadowPassed", message, agreed, policy.min_agreement)
    message = f"{tally.asked} of {policy.inferences} inferences were seen within {policy.deadline:g} s"
    figures = float(tally.asked), float(policy.inferences)
    return Finding(policy.on_deadline == "activate", "ShadowTooFew", message, *figures)


def _worse(policy: ShadowPolicy, tally: Tally) -> Finding | None:
    agreed = tally.agreed / tally.seen
    if policy.min_agreement is not None and agreed < policy.min_agreement:
        message = f"{tally.agreed} of {tally.seen} inferences agreed with the model that runs"
        return Finding(False, "ShadowDisagrees", message, agreed, policy.min_agreement)
    moved = shift(tally.incumbent, tally.candidate)
    limit = policy.max_score_shift
    if (
        limit is not None
        and moved is not None
        and moved > limit
        and min(tally.incumbent.count, tally.candidate.count) >= SHIFT_MINIMUM
    ):
        message = f"the PSI between both models' scores over {tally.seen} inferences"
        return Finding(False, "ShadowScoreShift", message, moved, limit)
    p95, most = tally.latency(0.95), policy.max_latency_ms
    if most is not None and p95 is not None and p95 > most:
        message = f"p95 of {tally.seen} inferences in milliseconds"
        return Finding(False, "ShadowLatency", message, p95, most)
    return None


def too_hot(limit: float | None, temperature: float | None, pausing: bool) -> bool:
    """Whether to pause; what has paused goes on COOLER degrees below the limit. Unknown is not judged."""
    if limit is None or temperature is None:
        return False
    return temperature > (limit - COOLER if pausing else limit)


def rest(spent: float, cores: int, cpu: float) -> float:
    """Seconds to wait after an inference of `spent` seconds on so many threads, so that of one core no more
    than the share `cpu` is used."""
    return max(spent * cores / cpu - spent, 0.0)


def gap(uniform: float, share: float) -> int:
    """How far the next sampled inference lies, 1 or more, when each is sampled with probability `share`.

    `uniform` is drawn from [0, 1): the geometric distribution by inversion, so that a batch costs as many draws
    as it has sampled inferences.
    """
    return 1 if share >= 1.0 else 1 + int(math.log1p(-uniform) / math.log1p(-share))
