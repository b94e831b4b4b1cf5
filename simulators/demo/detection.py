"""How well the fleet found the labelled anomalies: stored results against the held-out labels.

Pure functions over arrays. The area under the ROC curve is the Mann-Whitney statistic by ranks, ties
counting one half (Hanley and McNeil 1982).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeward.errors import InvalidDocument
from simulators.sensors import LABEL

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def read_labels(path: Path) -> Flags:
    """The column `label` as truth values, one per row. Raises InvalidDocument when it is missing."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if LABEL not in (reader.fieldnames or ()):
            raise InvalidDocument("expected a column `label`", source=str(path), field=LABEL)
        return np.array([float(row[LABEL]) != 0 for row in reader], dtype=np.bool_)


def ranks(values: Floats) -> Floats:
    """Ranks from 1, the mean rank for equal values."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Floats = (last - (counts - 1) / 2.0)[inverse]
    return mean


def auc(scores: Floats, labels: Flags) -> float | None:
    """The chance that a random anomaly scores above a random normal row; None without both kinds."""
    positive = int(labels.sum())
    negative = labels.size - positive
    if positive == 0 or negative == 0:
        return None
    above = float(ranks(scores)[labels].sum()) - positive * (positive + 1) / 2.0
    return above / (positive * negative)


def ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True)
class Scored:
    """Aligned arrays, one entry per stored row: model `name:version`, score (higher: more abnormal), alarm, label."""

    model: NDArray[np.str_]
    score: Floats
    alarm: Flags
    label: Flags

    def of(self, mask: Flags) -> Scored:
        return Scored(self.model[mask], self.score[mask], self.alarm[mask], self.label[mask])


def quality(scored: Scored) -> dict[str, Any]:
    hits = int((scored.alarm & scored.label).sum())
    return {
        "rows": int(scored.label.size),
        "anomalies": int(scored.label.sum()),
        "alarms": int(scored.alarm.sum()),
        "precision": ratio(hits, int(scored.alarm.sum())),
        "recall": ratio(hits, int(scored.label.sum())),
        "auc": auc(scored.score, scored.label),
    }


def margin(outputs: dict[str, float], decision: dict[str, Any]) -> float:
    """By how much an output passes the decision's threshold, in units of the threshold's size.

    Scores of two versions share no scale; their distances to their own thresholds nearly do.
    """
    threshold = float(decision["threshold"])
    distance = (outputs[decision["output"]] - threshold) / (abs(threshold) or 1.0)
    return -distance if decision.get("direction") == "below" else distance


def join(
    rows: list[dict[str, Any]],
    labels: Flags,
    starts: dict[str, int],
    models: dict[str, tuple[str, dict[str, Any]]],
) -> Scored:
    """Stored rows with their labels by (device, source_seq).

    `starts` is the first held-out row of each device, `models` maps a digest to `name:version` and the
    decision of its package. A row stored twice counts once. Rows of other devices or models are left out.
    """
    seen: set[tuple[str, int]] = set()
    names, scores, alarms, truths = [], [], [], []
    for row in rows:
        key = (row["device"], row["source_seq"])
        if key in seen or row["device"] not in starts or row["digest"] not in models:
            continue
        seen.add(key)
        name, decision = models[row["digest"]]
        names.append(name)
        scores.append(margin(dict(row["outputs"]), decision))
        alarms.append(bool(row["alarm"]))
        truths.append(bool(labels[starts[row["device"]] + row["source_seq"]]))
    return Scored(
        np.array(names, dtype=np.str_),
        np.array(scores, dtype=np.float64),
        np.array(alarms, dtype=np.bool_),
        np.array(truths, dtype=np.bool_),
    )


def detection(scored: Scored) -> dict[str, Any]:
    """Precision, recall and AUC over all rows, and per model."""
    found = quality(scored)
    found["models"] = {
        str(name): quality(scored.of(scored.model == name)) for name in np.unique(scored.model)
    }
    return found
