"""Small models for tests: ONNX through onnx.helper, TFLite through the schema that LiteRT ships."""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper, numpy_helper

WEIGHTS = np.array([[1.0, -2.0], [0.5, 3.0], [-1.5, 0.25]], np.float32)
BIAS = np.array([0.5, -1.0], np.float32)


def onnx_model(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any] | None = None
) -> bytes:
    """`inputs` and `outputs` are (name, TensorProto type, shape)."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*item) for item in inputs],
        [helper.make_tensor_value_info(*item) for item in outputs],
        constants or [],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def onnx_dense() -> bytes:
    """`x [n, 3] -> y [n, 2]`: `x @ WEIGHTS + BIAS`."""
    return onnx_model_of(WEIGHTS)


def onnx_model_of(weights: np.ndarray[Any, Any]) -> bytes:
    """As onnx_dense, with other weights."""
    return onnx_model(
        [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])],
        [("x", TensorProto.FLOAT, [None, 3])],
        [("y", TensorProto.FLOAT, [None, 2])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(BIAS, "b")],
    )


def onnx_two() -> bytes:
    """`a, b [n, 3] -> sum, product [n, 3]`."""
    return onnx_model(
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Mul", ["a", "b"], ["product"])],
        [("a", TensorProto.FLOAT, [None, 3]), ("b", TensorProto.FLOAT, [None, 3])],
        [("sum", TensorProto.FLOAT, [None, 3]), ("product", TensorProto.FLOAT, [None, 3])],
    )


def onnx_same(kind: int, shape: list[Any] | None = None) -> bytes:
    """`x -> y`, the same values of any type."""
    shape = [None, 2] if shape is None else shape
    return onnx_model(
        [helper.make_node("Identity", ["x"], ["y"])], [("x", kind, shape)], [("y", kind, shape)]
    )


def onnx_spinner() -> bytes:
    """Spends as long as `n` says, in native code: `y = x + n` by n additions in a Loop. See `spin`."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["sum", "one"], ["more"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, [None, 1]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("more", TensorProto.FLOAT, [None, 1]),
        ],
    )
    return onnx_model(
        [helper.make_node("Loop", ["n", "yes", "x"], ["y"], body=body)],
        [("x", TensorProto.FLOAT, [None, 1]), ("n", TensorProto.INT64, [])],
        [("y", TensorProto.FLOAT, [None, 1])],
        [
            helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
            helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]),
        ],
    )


def spin(n: int) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs for `onnx_spinner`."""
    return {"x": np.zeros((1, 1), np.float32), "n": np.array(n, np.int64)}


def onnx_reshape_to(size: int) -> bytes:
    """`x [n, 3] -> y [size]`: fails for every other number of elements."""
    return onnx_model(
        [helper.make_node("Reshape", ["x", "to"], ["y"])],
        [("x", TensorProto.FLOAT, [None, 3])],
        [("y", TensorProto.FLOAT, [size])],
        [numpy_helper.from_array(np.array([size], np.int64), "to")],
    )


class Tflite:
    """One subgraph, operator by operator; tensors are known by their index."""

    def __init__(self) -> None:
        self._model = schema.ModelT()
        self._model.version = 3
        self._model.description = "test"
        self._model.buffers = [schema.BufferT()]
        self._model.operatorCodes = []
        self._graph = schema.SubGraphT()
        self._graph.tensors = []
        self._graph.operators = []

    def tensor(
        self,
        name: str,
        shape: list[int],
        kind: int,
        values: np.ndarray[Any, Any] | None = None,
        quantised: tuple[float, int] | None = None,
    ) -> int:
        """-1 in `shape` is a free dimension; `quantised` is (scale, zero point)."""
        tensor = schema.TensorT()
        tensor.name = name
        tensor.shape = [1 if size < 0 else size for size in shape]
        tensor.shapeSignature = list(shape)
        tensor.type = kind
        tensor.buffer = 0
        if quantised is not None:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = [quantised[0]]
            tensor.quantization.zeroPoint = [quantised[1]]
        if values is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(values.tobytes(), np.uint8)
            self._model.buffers.append(buffer)
            tensor.buffer = len(self._model.buffers) - 1
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def operator(
        self,
        code: int,
        inputs: list[int],
        outputs: list[int],
        kind: int = 0,
        options: Any = None,
        version: int = 1,
    ) -> None:
        entry = schema.OperatorCodeT()
        entry.builtinCode = code
        entry.deprecatedBuiltinCode = min(code, 127)
        entry.version = version
        self._model.operatorCodes.append(entry)
        made = schema.OperatorT()
        made.opcodeIndex = len(self._model.operatorCodes) - 1
        made.inputs = inputs
        made.outputs = outputs
        made.builtinOptionsType = kind
        made.builtinOptions = options
        self._graph.operators.append(made)

    def finish(self, inputs: list[int], outputs: list[int]) -> bytes:
        self._graph.inputs = inputs
        self._graph.outputs = outputs
        self._model.subgraphs = [self._graph]
        builder = flatbuffers.Builder(1024)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


_FLOAT = schema.TensorType.FLOAT32

#: (scale, zero point) of a quantised dense layer's input, weights and output.
QUANTISED = (0.1, 3), (0.02, 0), (0.5, -4)
QUANTISED_WEIGHTS = np.array([[50, -100], [25, 127], [-75, 12]], np.int8)


def quantised_reference(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the quantised dense layer gives for int8 rows, before rounding halves one way or the other."""
    (x_scale, x_zero), (w_scale, _), (y_scale, y_zero) = QUANTISED
    exact = (x.astype(np.int64) - x_zero) @ QUANTISED_WEIGHTS.astype(np.int64)
    return np.clip(exact * (x_scale * w_scale / y_scale) + y_zero, -128, 127)


def onnx_quantised() -> bytes:
    """`x [n, 3] -> y [n, 2]`, int8."""
    constants = [numpy_helper.from_array(QUANTISED_WEIGHTS, "w")]
    for name, (scale, zero) in zip("xwy", QUANTISED, strict=True):
        constants.append(numpy_helper.from_array(np.array(scale, np.float32), f"{name}s"))
        constants.append(numpy_helper.from_array(np.array(zero, np.int8), f"{name}z"))
    return onnx_model(
        [helper.make_node("QLinearMatMul", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"])],
        [("x", TensorProto.INT8, [None, 3])],
        [("y", TensorProto.INT8, [None, 2])],
        constants,
    )


def tflite_quantised() -> bytes:
    """As onnx_quantised."""
    graph, int8 = Tflite(), schema.TensorType.INT8
    x = graph.tensor("x", [-1, 3], int8, quantised=QUANTISED[0])
    w = graph.tensor("w", [2, 3], int8, np.ascontiguousarray(QUANTISED_WEIGHTS.T), quantised=QUANTISED[1])
    y = graph.tensor("y", [-1, 2], int8, quantised=QUANTISED[2])
    graph.operator(
        schema.BuiltinOperator.FULLY_CONNECTED, [x, w, -1], [y],
        schema.BuiltinOptions.FullyConnectedOptions, schema.FullyConnectedOptionsT(), version=6,
    )  # fmt: skip
    return graph.finish([x], [y])


def _dense(graph: Tflite, rows: int) -> tuple[int, int]:
    x = graph.tensor("x", [rows, 3], _FLOAT)
    w = graph.tensor("w", [2, 3], _FLOAT, np.ascontiguousarray(WEIGHTS.T))
    b = graph.tensor("b", [2], _FLOAT, BIAS)
    y = graph.tensor("y", [rows, 2], _FLOAT)
    graph.operator(
        schema.BuiltinOperator.FULLY_CONNECTED, [x, w, b], [y],
        schema.BuiltinOptions.FullyConnectedOptions, schema.FullyConnectedOptionsT(),
    )  # fmt: skip
    return x, y


def tflite_dense(rows: int = -1) -> bytes:
    """As onnx_dense; `rows` fixes their number."""
    graph = Tflite()
    x, y = _dense(graph, rows)
    return graph.finish([x], [y])


def tflite_dense_reshaped() -> bytes:
    """As tflite_dense for one row, with a second operator that only gives `z [2]` of it."""
    graph = Tflite()
    x, y = _dense(graph, 1)
    to = graph.tensor("to", [1], schema.TensorType.INT32, np.array([2], np.int32))
    z = graph.tensor("z", [2], _FLOAT)
    graph.operator(
        schema.BuiltinOperator.RESHAPE, [y, to], [z],
        schema.BuiltinOptions.ReshapeOptions, schema.ReshapeOptionsT(),
    )  # fmt: skip
    return graph.finish([x], [z])


def tflite_two() -> bytes:
    """As onnx_two."""
    graph = Tflite()
    a, b, total, product = (graph.tensor(name, [-1, 3], _FLOAT) for name in ("a", "b", "sum", "product"))
    graph.operator(
        schema.BuiltinOperator.ADD, [a, b], [total], schema.BuiltinOptions.AddOptions, schema.AddOptionsT()
    )
    graph.operator(
        schema.BuiltinOperator.MUL, [a, b], [product], schema.BuiltinOptions.MulOptions, schema.MulOptionsT()
    )
    return graph.finish([a, b], [total, product])


def tflite_same(kind: int, quantised: tuple[float, int] | None = None) -> bytes:
    """`x [n, 2] -> y [n, 2]`, the same values of any type, by a reshape to the shape that they have."""
    graph = Tflite()
    x = graph.tensor("x", [-1, 2], kind, quantised=quantised)
    to = graph.tensor("to", [2], schema.TensorType.INT32, np.array([-1, 2], np.int32))
    y = graph.tensor("y", [-1, 2], kind, quantised=quantised)
    graph.operator(
        schema.BuiltinOperator.RESHAPE, [x, to], [y],
        schema.BuiltinOptions.ReshapeOptions, schema.ReshapeOptionsT(),
    )  # fmt: skip
    return graph.finish([x], [y])
