"""LiteRT, or its predecessor tflite-runtime where that is what the device has."""

from __future__ import annotations

from typing import Any

import numpy as np

from agent.runtime.port import Arrays, LoadOptions
from edgeward.errors import RuntimeFault
from edgeward.wire.package import TensorSpec


def _interpreter() -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        from tflite_runtime.interpreter import Interpreter
    return Interpreter


def _spec(detail: Any) -> TensorSpec:
    signature = detail["shape_signature"] if len(detail["shape_signature"]) else detail["shape"]
    return TensorSpec(detail["name"], np.dtype(detail["dtype"]).name, [int(size) for size in signature])


class TfliteModel:
    """One interpreter; its input is resized when the number of rows changes."""

    def __init__(self, content: bytes, load: LoadOptions) -> None:
        try:
            self._interpreter = _interpreter()(model_content=content, num_threads=load.threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise RuntimeFault(f"LiteRT refused the model: {error}") from None
        self.provider = "XNNPACK"
        self._inputs = {detail["name"]: detail for detail in self._interpreter.get_input_details()}
        self._outputs = {detail["name"]: detail for detail in self._interpreter.get_output_details()}
        self.inputs = [_spec(detail) for detail in self._inputs.values()]
        self.outputs = [_spec(detail) for detail in self._outputs.values()]
        self._shapes: dict[str, tuple[int, ...]] = {}

    def infer(self, inputs: Arrays) -> Arrays:
        if set(inputs) != set(self._inputs):
            raise RuntimeFault(f"expected inputs {', '.join(self._inputs)}, got {', '.join(inputs)}")
        try:
            shapes = {name: values.shape for name, values in inputs.items()}
            if shapes != self._shapes:
                for name, values in inputs.items():
                    self._interpreter.resize_tensor_input(self._inputs[name]["index"], values.shape)
                self._interpreter.allocate_tensors()
                self._shapes = shapes
            for name, values in inputs.items():
                self._interpreter.set_tensor(self._inputs[name]["index"], values)
            self._interpreter.invoke()
            return {
                name: self._interpreter.get_tensor(detail["index"]).copy()
                for name, detail in self._outputs.items()
            }
        except (ValueError, RuntimeError) as error:
            raise RuntimeFault(f"LiteRT: {error}") from None
