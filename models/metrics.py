"""Detection quality against labels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.metrics import precision_recall_curve, roc_auc_score

Scores = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int8]


def detection(scores: Scores, labels: Labels, threshold: float) -> dict[str, float]:
    """Precision and recall of `score > threshold`, and the area under the ROC curve.

    A class that does not occur leaves its figures out rather than inventing them.
    """
    alarms = scores > threshold
    hits = int((alarms & (labels == 1)).sum())
    figures = {"rows": float(len(labels)), "alarms": float(alarms.sum())}
    if alarms.any():
        figures["precision"] = hits / int(alarms.sum())
    if (labels == 1).any():
        figures["recall"] = hits / int((labels == 1).sum())
        if (labels == 0).any():
            figures["auc"] = float(roc_auc_score(labels, scores))
    return figures


def best_f1_threshold(scores: Scores, labels: Labels) -> float:
    """The threshold with the best F1 (van Rijsbergen 1979), half-way to the next lower score.

    The gap keeps a rounding difference of the edge runtime from turning the verdict.
    """
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = float(thresholds[int(np.argmax(f1[:-1]))])
    lower = scores[scores < best]
    return (best + float(lower.max())) / 2 if len(lower) else best
