"""A small dense autoencoder, exported to TFLite without TensorFlow."""

from __future__ import annotations

import importlib.metadata
import warnings
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPRegressor

from edgeward.errors import InvalidDocument
from edgeward.wire.package import Decision, TensorSpec
from models.datasets import Dataset
from models.metrics import best_f1_threshold
from models.recipes.base import Exported, Rows, Trained
from models.recipes.tflite import TfliteGraph


class AnomalyAutoencoder:
    """Reconstructs standardised rows through a narrow tanh layer; the score is the mean squared error.

    With labels, the fit sees only the training rows without an anomaly; the threshold is chosen as in
    `anomaly-detection`. Small enough for a microcontroller-class device.
    """

    name = "anomaly-autoencoder-tiny"
    about = "Dense autoencoder over tabular sensor rows -> TFLite of a few KB"
    parameters: dict[str, Any] = {  # noqa: RUF012
        "hidden": 16,
        "bottleneck": 4,
        "epochs": 20,
        "rows": 20000,
        "contamination": 0.05,
        "seed": 7,
    }
    limits: dict[str, tuple[float, float]] = {  # noqa: RUF012
        "hidden": (1, 1024),
        "bottleneck": (1, 1024),
        "epochs": (1, 10_000),
        "rows": (50, 10_000_000),
        "contamination": (1e-6, 0.5),
        "seed": (0, 2**32 - 1),
    }

    def train(self, data: Dataset, parameters: dict[str, Any]) -> Trained:
        """Raises InvalidDocument when there are too few rows."""
        normal = data.values if data.labels is None else data.values[data.labels == 0]
        if len(normal) < 50:
            raise InvalidDocument(
                f"{len(normal)} training rows without an anomaly are too few, expected at least 50",
                source=data.name,
            )
        # Robust scale: a few readings hundreds of times off would flatten everything else.
        centre = np.median(normal, axis=0)
        spread = np.percentile(normal, 95, axis=0) - np.percentile(normal, 5, axis=0)
        spread = np.where(spread > 0, spread, 1.0)
        scaled = (normal - centre) / spread
        fit = scaled[:: max(1, len(scaled) // parameters["rows"])]
        net = MLPRegressor(
            hidden_layer_sizes=(parameters["hidden"], parameters["bottleneck"], parameters["hidden"]),
            activation="tanh",
            max_iter=parameters["epochs"],
            random_state=parameters["seed"],
            batch_size=min(128, len(fit)),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            net.fit(np.clip(fit, -5, 5), np.clip(fit, -5, 5))

        def reference(rows: Rows) -> np.ndarray[Any, np.dtype[np.float32]]:
            inputs = (rows - centre) / spread
            errors: np.ndarray[Any, np.dtype[np.float32]] = (net.predict(inputs) - inputs).astype(
                np.float32
            ) ** 2
            scores: np.ndarray[Any, np.dtype[np.float32]] = errors.mean(axis=1, dtype=np.float32)
            return scores

        scores = reference(data.values)
        if data.labels is not None and 0 < data.labels.sum() < data.rows:
            threshold = best_f1_threshold(scores, data.labels)
        else:
            threshold = float(np.quantile(scores, 1 - parameters["contamination"]))
        return Trained(
            reference,
            [_export(net, centre, spread)],
            Decision("score", threshold),
            tolerance=1e-3,
            libraries={
                name: importlib.metadata.version(name)
                for name in ("scikit-learn", "ai-edge-litert", "flatbuffers")
            },
        )


def _export(net: MLPRegressor, centre: np.ndarray[Any, Any], spread: np.ndarray[Any, Any]) -> Exported:
    features = len(centre)
    graph = TfliteGraph("edgeward anomaly autoencoder")
    row = graph.input("input", features)
    scaled = graph.scale(row, 1 / spread, -centre / spread)
    layer = scaled
    last = len(net.coefs_) - 1
    for index, (weights, bias) in enumerate(zip(net.coefs_, net.intercepts_, strict=True)):
        layer = graph.dense(layer, weights, bias, tanh=index < last)
    content = graph.finish("score", graph.mean_squared_difference(scaled, layer))

    def predict(rows: Rows) -> np.ndarray[Any, np.dtype[np.float32]]:
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_content=content, num_threads=1)
        where = interpreter.get_input_details()[0]["index"]
        interpreter.resize_tensor_input(where, rows.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(where, rows)
        interpreter.invoke()
        scores: np.ndarray[Any, np.dtype[np.float32]] = interpreter.get_tensor(
            interpreter.get_output_details()[0]["index"]
        ).reshape(-1)
        return scores

    return Exported(
        "tflite-cpu",
        "tflite",
        content,
        [TensorSpec("input", "float32", [-1, features])],
        [TensorSpec("score", "float32", [-1, 1])],
        predict,
    )
