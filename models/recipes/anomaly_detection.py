"""Isolation forest (Liu, Ting, Zhou 2008), exported to ONNX."""

from __future__ import annotations

import importlib.metadata
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from skl2onnx.common.tree_ensemble import (
    add_tree_to_attribute_pairs,
    get_default_tree_regressor_attribute_pairs,
)
from sklearn.ensemble import IsolationForest

from edgeward.errors import InvalidDocument
from edgeward.wire.package import Decision, TensorSpec
from models.datasets import Dataset
from models.metrics import best_f1_threshold
from models.recipes.base import Exported, Rows, Trained

OPSET = {"": 17, "ai.onnx.ml": 3}
# Runtimes on devices are older than the onnx package that writes the file.
IR_VERSION = 8


class AnomalyDetection:
    """The forest is fitted without labels. The threshold is the one with the best F1 on the training
    rows when they are labelled, otherwise the quantile `1 - contamination` of their scores."""

    name = "anomaly-detection"
    about = "Isolation forest over tabular sensor rows -> ONNX; score above the threshold is an anomaly"
    parameters: dict[str, Any] = {"trees": 100, "max_samples": 256, "contamination": 0.05, "seed": 7}  # noqa: RUF012
    limits: dict[str, tuple[float, float]] = {  # noqa: RUF012
        "trees": (1, 2000),
        "max_samples": (2, 100_000),
        "contamination": (1e-6, 0.5),
        "seed": (0, 2**32 - 1),
    }

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
    """The forest as one tree ensemble and an exponential: `input` `[rows, features]` -> `score` `[rows, 1]`.

    skl2onnx's own IsolationForest converter writes 27 nodes per tree, which takes seconds to make and is
    slow at the edge; its tree writer, with its rounding of thresholds to float32, is used as it is.
    """
    attributes = get_default_tree_regressor_attribute_pairs()
    attributes["n_targets"] = 1
    # Score = 2 ** -(mean path length / expected path length); the constant goes into the leaves.
    expected = float(_expected_path(np.array([forest.max_samples_]))[0])
    weight = -math.log(2) / (len(forest.estimators_) * expected)
    for number, estimator in enumerate(forest.estimators_):
        tree = estimator.tree_
        writable = SimpleNamespace(
            node_count=tree.node_count,
            children_left=tree.children_left,
            children_right=tree.children_right,
            feature=tree.feature,
            threshold=tree.threshold,
            value=(_depths(tree) + _expected_path(tree.n_node_samples)).reshape(-1, 1),
        )
        add_tree_to_attribute_pairs(
            attributes, False, writable, number, weight, 0, False, True, np.dtype("float32")
        )
    graph = helper.make_graph(
        [
            helper.make_node(
                "TreeEnsembleRegressor", ["input"], ["exponent"], domain="ai.onnx.ml", **attributes
            ),
            helper.make_node("Exp", ["exponent"], ["score"]),
        ],
        "isolation_forest",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [None, features])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, [None, 1])],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in OPSET.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgeward")
    onnx.checker.check_model(model, full_check=True)
    content = model.SerializeToString(deterministic=True)
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


def _depths(tree: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The number of splits above each node; scikit-learn numbers children after their parent."""
    depths = np.zeros(tree.node_count)
    for node in range(tree.node_count):
        if tree.children_left[node] >= 0:
            depths[[tree.children_left[node], tree.children_right[node]]] = depths[node] + 1
    return depths


def _expected_path(samples: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The mean path of an unsuccessful search in a binary tree of so many samples (equation 1 of the paper)."""
    count = np.maximum(samples.astype(np.float64), 2.0)
    several = 2.0 * (np.log(count - 1.0) + np.euler_gamma) - 2.0 * (count - 1.0) / count
    path: np.ndarray[Any, np.dtype[np.float64]] = np.select([samples <= 1, samples == 2], [0.0, 1.0], several)
    return path
