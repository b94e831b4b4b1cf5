"""Isolation forest (Liu, Ting, Zhou 2008), exported to ONNX."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
import onnx
import onnx.utils
import onnxruntime
from onnx import TensorProto, helper
from skl2onnx import to_onnx
from sklearn.ensemble import IsolationForest

from edgeward.errors import InvalidDocument
from edgeward.wire.package import Decision, TensorSpec
from models.datasets import Dataset
from models.metrics import best_f1_threshold
from models.recipes.base import Exported, Rows, Trained

OPSET = {"": 17, "ai.onnx.ml": 3}


class AnomalyDetection:
    """The forest is fitted without labels. The threshold is the one with the best F1 on the training
    rows when they are labelled, otherwise the quantile `1 - contamination` of their scores."""

    name = "anomaly-detection"
    about = "Isolation forest over tabular sensor rows -> ONNX; score above the threshold is an anomaly"
    parameters: dict[str, Any] = {"trees": 100, "max_samples": 256, "contamination": 0.05, "seed": 7}  # noqa: RUF012

    def train(self, data: Dataset, parameters: dict[str, Any]) -> Trained:
        """Raises InvalidDocument when there are too few rows."""
        if data.rows < 50:
            raise InvalidDocument(
                f"{data.rows} training rows are too few, expected at least 50", source=data.name
            )
        forest = IsolationForest(
            n_estimators=parameters["trees"],
            max_samples=min(parameters["max_samples"], data.rows),
            random_state=parameters["seed"],
        ).fit(data.values)

        def reference(rows: Rows) -> np.ndarray[Any, np.dtype[np.float32]]:
            scores: np.ndarray[Any, np.dtype[np.float32]] = -forest.score_samples(rows).astype(np.float32)
            return scores

        scores = reference(data.values)
        if data.labels is not None and 0 < data.labels.sum() < data.rows:
            threshold = best_f1_threshold(scores, data.labels)
        else:
            threshold = float(np.quantile(scores, 1 - parameters["contamination"]))
        return Trained(
            reference,
            [_export(forest, len(data.features))],
            Decision("score", threshold),
            tolerance=1e-4,
            libraries={
                name: importlib.metadata.version(name)
                for name in ("scikit-learn", "skl2onnx", "onnx", "onnxruntime")
            },
        )


def _export(forest: IsolationForest, features: int) -> Exported:
    """skl2onnx's `score_samples`, negated, as the only output `score` `[rows, 1]`."""
    example = np.zeros((1, features), np.float32)
    full = to_onnx(forest, example, options={id(forest): {"score_samples": True}}, target_opset=OPSET)
    full.graph.node.append(helper.make_node("Neg", ["score_samples"], ["score"]))
    del full.graph.output[:]
    full.graph.output.append(helper.make_tensor_value_info("score", TensorProto.FLOAT, [None, 1]))
    for node in full.graph.node:
        for index, name in enumerate(node.input):
            if name == "X":
                node.input[index] = "input"
    del full.graph.input[:]
    full.graph.input.append(helper.make_tensor_value_info("input", TensorProto.FLOAT, [None, features]))
    _prune(full)
    onnx.checker.check_model(full, full_check=True)
    content = full.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def predict(rows: Rows) -> np.ndarray[Any, np.dtype[np.float32]]:
        scores: np.ndarray[Any, np.dtype[np.float32]] = session.run(["score"], {"input": rows})[0].reshape(-1)
        return scores

    return Exported(
        "onnx-cpu",
        "onnx",
        content,
        [TensorSpec("input", "float32", [-1, features])],
        [TensorSpec("score", "float32", [-1, 1])],
        predict,
    )


def _prune(model: onnx.ModelProto) -> None:
    """Drop nodes and constants that the outputs do not need (labels and decision function)."""
    needed = {output.name for output in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    constants = [item for item in model.graph.initializer if item.name in needed]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
