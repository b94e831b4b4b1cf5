"""From a model's outputs to rows: verdicts per example, results and alarms per sample. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.streams.examples import Examples
from edgeward.wire.desired import StreamTarget
from edgeward.wire.package import Decision
from edgeward.wire.rows import AlarmRow, ResultRow, SampleRow

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Lineage:
    """What made the predictions: part of every row."""

    digest: str
    variant: str
    provider: str


@dataclass(frozen=True)
class Outputs:
    """A model's answers to `m` examples.

    `columns` holds a float64 `[m]` for each output (its last column) and for each column of a wider one
    (`name[i]`); `scores` are those that are stored, by output name. `alarm` bool `[m]` is the package's
    verdict. `answered` bool `[m]` is False where the model refused the example.
    """

    columns: dict[str, Floats]
    scores: dict[str, Floats]
    alarm: npt.NDArray[np.bool_]
    answered: npt.NDArray[np.bool_]


def read_outputs(got: dict[str, Array], count: int, decision: Decision | None) -> Outputs:
    """The columns of a model's answer to `count` examples, and the decision's verdict on each."""
    columns: dict[str, Floats] = {}
    scores: dict[str, Floats] = {}
    for name, values in got.items():
        flat = np.asarray(values, dtype=np.float64).reshape(count, -1)
        scores[name] = columns[name] = flat[:, -1] if flat.shape[1] else np.full(count, np.nan)
        if flat.shape[1] > 1:
            columns.update({f"{name}[{index}]": flat[:, index] for index in range(flat.shape[1])})
    alarm = np.zeros(count, np.bool_)
    if decision is not None and decision.output in scores:
        value = scores[decision.output]
        # NaN compares false either way: a model that says nothing raises no alarm.
        alarm = value > decision.threshold if decision.direction == "above" else value < decision.threshold
    return Outputs(columns, scores, alarm, np.ones(count, np.bool_))


def without_not_finite(outputs: Outputs) -> Outputs:
    """Not answered where an output is NaN or infinite."""
    answered = outputs.answered.copy()
    for values in outputs.columns.values():
        answered &= np.isfinite(values)
    return replace(outputs, alarm=outputs.alarm & answered, answered=answered)


def result_rows(
    target: StreamTarget,
    lineage: Lineage,
    examples: Examples,
    outputs: Outputs,
    chosen: npt.NDArray[np.bool_],
) -> list[ResultRow]:
    """A row for each sample whose example is `chosen` `[m]`, and for each that was not predicted.

    What a model refused, what came late or lacks a feature is stored with no outputs, so that nothing is
    missing from the count.
    """
    samples = examples.samples
    owner = examples.owner.tolist()
    name, revision, epoch = target.name, target.revision, samples.epoch
    digest, variant, provider = lineage.digest, lineage.variant, lineage.provider
    per_example = _outputs_per_example(outputs, len(examples))
    alarms, kept, answered = outputs.alarm.tolist(), chosen.tolist(), outputs.answered.tolist()
    times = samples.event_time.tolist()
    numbers = samples.seq.tolist() if samples.seq is not None else [-1] * len(times)
    keys = samples.keys or ("",) * len(times)
    rows = []
    for at, key, number, example in zip(times, keys, numbers, owner, strict=True):
        if example < 0 or not answered[example]:
            rows.append(ResultRow(at, name, revision, key, epoch, number, digest, variant, "", {}, False))
        elif kept[example]:
            rows.append(
                ResultRow(
                    at, name, revision, key, epoch, number, digest, variant, provider,
                    per_example[example], alarms[example],
                )
            )  # fmt: skip
    return rows


def _outputs_per_example(outputs: Outputs, count: int) -> list[dict[str, float]]:
    names = list(outputs.scores)
    if len(names) == 1:
        (only,) = names
        values = outputs.scores[only]
        if np.isfinite(values).all():
            return [{only: value} for value in values.tolist()]
    finite: list[dict[str, float]] = [{} for _ in range(count)]
    for output, values in outputs.scores.items():
        usable = np.isfinite(values).tolist()
        for row, value, use in zip(finite, values.tolist(), usable, strict=True):
            if use:
                row[output] = value
    return finite


def alarm_rows(
    target: StreamTarget, lineage: Lineage, examples: Examples, outputs: Outputs, decision: Decision | None
) -> list[AlarmRow]:
    """One for each example that the package's decision calls an alarm."""
    if decision is None or not outputs.alarm.any():
        return []
    stands = examples.stands
    values = outputs.scores[decision.output]
    rows = []
    for at in np.flatnonzero(outputs.alarm).tolist():
        rows.append(
            AlarmRow(
                int(stands.event_time[at]), target.name, target.revision, stands.key(at), stands.epoch,
                int(stands.seq[at]) if stands.seq is not None else -1,
                lineage.digest, lineage.variant, lineage.provider, float(values[at]), decision.threshold,
            )
        )  # fmt: skip
    return rows


def sample_rows(target: StreamTarget, examples: Examples, features: list[str]) -> list[SampleRow]:
    """The raw samples, where the stream asks for them; images are never sent like that."""
    samples = examples.samples
    if samples.values.ndim != 2:
        return []
    numbers = samples.seq.tolist() if samples.seq is not None else [-1] * len(samples)
    rows = []
    for index, (at, values, number) in enumerate(
        zip(samples.event_time.tolist(), samples.values.tolist(), numbers, strict=True)
    ):
        known = {name: value for name, value in zip(features, values, strict=True) if value == value}
        rows.append(
            SampleRow(at, target.name, target.revision, samples.key(index), samples.epoch, number, known)
        )
    return rows
