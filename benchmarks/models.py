"""The models that are measured: a gradient boosting on sensor rows, a CNN, a transformer encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSETS = [helper.make_opsetid("", 17)]


def tabular() -> bytes:
    """`input [rows, 9] -> variable [rows, 1]`: 100 boosted trees over the Shuttle sensors (river)."""
    from skl2onnx import to_onnx
    from sklearn.ensemble import HistGradientBoostingRegressor

    from models.datasets import load_named

    data = load_named("shuttle")
    assert data.labels is not None
    fitted = HistGradientBoostingRegressor(max_iter=100, early_stopping=False, random_state=7)
    fitted.fit(data.values[:20_000], data.labels[:20_000])
    made = to_onnx(fitted, data.values[:1], target_opset={"": 17, "ai.onnx.ml": 3})
    made.graph.input[0].name = "input"
    for node in made.graph.node:
        for index, name in enumerate(node.input):
            if name == "X":
                node.input[index] = "input"
    return bytes(made.SerializeToString())


def _weights(rng: np.random.Generator, name: str, *shape: int) -> Any:
    scale = np.sqrt(2.0 / np.prod(shape[1:]))
    return numpy_helper.from_array((rng.standard_normal(shape) * scale).astype(np.float32), name)


def dense(seed: int, width: int = 512) -> bytes:
    """`input [rows, 9] -> score [rows, 1]`: three layers, 1 MB of weights that no compression shrinks much."""
    rng = np.random.default_rng(seed)
    shapes = [(9, width), (width, width), (width, 1)]
    nodes, last = [], "input"
    for index in range(len(shapes)):
        out = "score" if index == len(shapes) - 1 else f"r{index}"
        nodes.append(
            helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}" if out != "score" else out])
        )
        if out != "score":
            nodes.append(helper.make_node("Relu", [f"m{index}"], [out]))
        last = out
    return _finish(
        "dense",
        nodes,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [None, 9])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, [None, 1])],
        [_weights(rng, f"w{index}", *shape) for index, shape in enumerate(shapes)],
    )


def cnn(width: int = 32, size: int = 80) -> bytes:
    """`image [n, 3, size, size] -> score [n, 10]`: six convolutions with pooling; about 4 ms on one core."""
    rng = np.random.default_rng(7)
    nodes, constants, last, channels = [], [], "image", 3
    for index, wide in enumerate([width, width, 2 * width, 2 * width, 4 * width, 4 * width]):
        constants.append(_weights(rng, f"w{index}", wide, channels, 3, 3))
        stride = 2 if index in (2, 4) else 1
        nodes += [
            helper.make_node("Conv", [last, f"w{index}"], [f"c{index}"], pads=[1] * 4, strides=[stride] * 2),
            helper.make_node("Relu", [f"c{index}"], [f"r{index}"]),
        ]
        last, channels = f"r{index}", wide
    constants.append(_weights(rng, "dense", channels, 10))
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "dense"], ["score"]),
    ]
    return _finish(
        "cnn",
        nodes,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [None, 3, size, size])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, [None, 10])],
        constants,
    )


def transformer(layers: int = 4, width: int = 256, heads: int = 4, length: int = 128) -> bytes:
    """`tokens [n, length, width] -> encoded [n, length, width]`: a pre-norm transformer encoder."""
    rng = np.random.default_rng(7)
    each = width // heads
    constants = [
        numpy_helper.from_array(np.array([0, length, heads, each], np.int64), "split"),
        numpy_helper.from_array(np.array([0, length, width], np.int64), "merge"),
        numpy_helper.from_array(np.array(1 / np.sqrt(each), np.float32), "scale"),
        numpy_helper.from_array(np.ones(width, np.float32), "gain"),
    ]
    nodes: list[Any] = []
    last = "tokens"
    for layer in range(layers):
        at = f"l{layer}"
        nodes.append(helper.make_node("LayerNormalization", [last, "gain"], [f"{at}n"], axis=-1))
        for part in "qkv":
            constants.append(_weights(rng, f"{at}w{part}", width, width))
            permutation = [0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]
            nodes += [
                helper.make_node("MatMul", [f"{at}n", f"{at}w{part}"], [f"{at}{part}0"]),
                helper.make_node("Reshape", [f"{at}{part}0", "split"], [f"{at}{part}1"]),
                helper.make_node("Transpose", [f"{at}{part}1"], [f"{at}{part}"], perm=permutation),
            ]
        constants += [
            _weights(rng, f"{at}wo", width, width),
            _weights(rng, f"{at}w1", width, 4 * width),
            _weights(rng, f"{at}w2", 4 * width, width),
        ]
        nodes += [
            helper.make_node("MatMul", [f"{at}q", f"{at}k"], [f"{at}s0"]),
            helper.make_node("Mul", [f"{at}s0", "scale"], [f"{at}s1"]),
            helper.make_node("Softmax", [f"{at}s1"], [f"{at}s"], axis=-1),
            helper.make_node("MatMul", [f"{at}s", f"{at}v"], [f"{at}h0"]),
            helper.make_node("Transpose", [f"{at}h0"], [f"{at}h1"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"{at}h1", "merge"], [f"{at}h"]),
            helper.make_node("MatMul", [f"{at}h", f"{at}wo"], [f"{at}o"]),
            helper.make_node("Add", [last, f"{at}o"], [f"{at}a"]),
            helper.make_node("LayerNormalization", [f"{at}a", "gain"], [f"{at}m"], axis=-1),
            helper.make_node("MatMul", [f"{at}m", f"{at}w1"], [f"{at}f0"]),
            helper.make_node("Relu", [f"{at}f0"], [f"{at}f1"]),
            helper.make_node("MatMul", [f"{at}f1", f"{at}w2"], [f"{at}f"]),
            helper.make_node("Add", [f"{at}a", f"{at}f"], [f"{at}out"]),
        ]
        last = f"{at}out"
    nodes.append(helper.make_node("Identity", [last], ["encoded"]))
    shape = [None, length, width]
    return _finish(
        "transformer",
        nodes,
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("encoded", TensorProto.FLOAT, shape)],
        constants,
    )


def _finish(
    name: str, nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any]
) -> bytes:
    graph = helper.make_graph(nodes, name, inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=_OPSETS, ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
