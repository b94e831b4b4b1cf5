"""Write small dense TFLite graphs with the FlatBuffers schema that ai-edge-litert ships.

Source: tensorflow/lite/schema/schema.fbs, version 3. TensorFlow itself would be 1.5 GB.
"""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

Array = np.ndarray[Any, Any]


class TfliteGraph:
    """Builds one subgraph, float32, with a free batch dimension; tensors are named by their index."""

    def __init__(self, description: str) -> None:
        self._model = schema.ModelT()
        self._model.version = 3
        self._model.description = description
        self._model.buffers = [schema.BufferT()]
        self._graph = schema.SubGraphT()
        self._graph.tensors = []
        self._graph.operators = []
        self._codes: list[int] = []

    def input(self, name: str, width: int) -> int:
        tensor = self._tensor(name, width)
        self._graph.inputs = [tensor]
        return tensor

    def scale(self, source: int, factor: Array, offset: Array) -> int:
        """`source * factor + offset`, column by column."""
        width = len(factor)
        product = self._tensor("scaled", width)
        self._add(
            schema.BuiltinOperator.MUL,
            [source, self._constant("factor", factor)],
            product,
            schema.BuiltinOptions.MulOptions,
            schema.MulOptionsT(),
        )
        result = self._tensor("standardised", width)
        self._add(
            schema.BuiltinOperator.ADD,
            [product, self._constant("offset", offset)],
            result,
            schema.BuiltinOptions.AddOptions,
            schema.AddOptionsT(),
        )
        return result

    def dense(self, source: int, weights: Array, bias: Array, *, tanh: bool) -> int:
        """`source @ weights + bias`; weights `[in, out]`."""
        options = schema.FullyConnectedOptionsT()
        result = self._tensor("dense", weights.shape[1])
        inputs = [source, self._constant("weights", weights.T), self._constant("bias", bias)]
        self._add(
            schema.BuiltinOperator.FULLY_CONNECTED,
            inputs,
            result,
            schema.BuiltinOptions.FullyConnectedOptions,
            options,
        )
        if not tanh:
            return result
        activated = self._tensor("tanh", weights.shape[1])
        self._add(schema.BuiltinOperator.TANH, [result], activated, schema.BuiltinOptions.NONE, None)
        return activated

    def mean_squared_difference(self, left: int, right: int) -> int:
        """The mean over columns of `(left - right)^2`, shape `[batch, 1]`."""
        width = int(self._graph.tensors[left].shape[1])
        squared = self._tensor("squared", width)
        self._add(
            schema.BuiltinOperator.SQUARED_DIFFERENCE,
            [left, right],
            squared,
            schema.BuiltinOptions.SquaredDifferenceOptions,
            schema.SquaredDifferenceOptionsT(),
        )
        options = schema.ReducerOptionsT()
        options.keepDims = True
        result = self._tensor("mean", 1)
        axis = self._constant("axis", np.array([1], np.int32))
        self._add(
            schema.BuiltinOperator.MEAN,
            [squared, axis],
            result,
            schema.BuiltinOptions.ReducerOptions,
            options,
        )
        return result

    def finish(self, name: str, output: int) -> bytes:
        """The finished file; `output` gets its public name."""
        self._graph.tensors[output].name = name
        self._graph.outputs = [output]
        self._model.subgraphs = [self._graph]
        self._model.operatorCodes = []
        for code in self._codes:
            entry = schema.OperatorCodeT()
            entry.builtinCode = code
            entry.deprecatedBuiltinCode = min(code, 127)
            entry.version = 1
            self._model.operatorCodes.append(entry)
        builder = flatbuffers.Builder(4096)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _tensor(self, name: str, width: int) -> int:
        tensor = schema.TensorT()
        tensor.name = f"{name}_{len(self._graph.tensors)}" if name != "input" else name
        tensor.shape = [1, width]
        tensor.shapeSignature = [-1, width]
        tensor.type = schema.TensorType.FLOAT32
        tensor.buffer = 0
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def _constant(self, name: str, values: Array) -> int:
        buffer = schema.BufferT()
        whole = values.dtype.kind == "i"
        buffer.data = np.frombuffer(values.astype("<i4" if whole else "<f4").tobytes(), np.uint8)
        self._model.buffers.append(buffer)
        tensor = schema.TensorT()
        tensor.name = f"{name}_{len(self._graph.tensors)}"
        tensor.shape = list(values.shape)
        tensor.type = schema.TensorType.INT32 if whole else schema.TensorType.FLOAT32
        tensor.buffer = len(self._model.buffers) - 1
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def _add(self, code: int, inputs: list[int], output: int, kind: int, options: Any) -> None:
        if code not in self._codes:
            self._codes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = self._codes.index(code)
        operator.inputs = inputs
        operator.outputs = [output]
        operator.builtinOptionsType = kind
        operator.builtinOptions = options
        self._graph.operators.append(operator)
