"""LiteRT, or its predecessor tflite-runtime where that is what the device has."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from agent.runtime.inputs import check_inputs
from agent.runtime.port import Arrays, LoadOptions
from agent.runtime.tflite_delegates import LIBRARIES
from edgeward.errors import RuntimeFault
from edgeward.wire.package import TensorSpec

CPU = "XNNPACK"


def _modules() -> tuple[Any, Any]:
    """`Interpreter` and `load_delegate`, of the successor where it is installed."""
    try:
        from ai_edge_litert.interpreter import Interpreter, load_delegate
    except ImportError:
        from tflite_runtime.interpreter import Interpreter, load_delegate
    return Interpreter, load_delegate


class TfliteModel:
    """One interpreter; its inputs are resized when their shapes change."""

    def __init__(self, content: bytes, load: LoadOptions) -> None:
        """Raises RuntimeFault when LiteRT refuses the model, or a delegate cannot be had."""
        problems = []
        for provider in load.providers or (CPU,):
            try:
                self._interpreter = _open(content, provider, load.threads)
            except RuntimeFault as fault:
                problems.append(f"{provider}: {fault}")
                continue
            self.provider = provider
            break
        else:
            raise RuntimeFault(f"LiteRT refused the model: {'; '.join(problems)}")
        self._inputs = {detail["name"]: detail for detail in self._interpreter.get_input_details()}
        self._outputs = {detail["name"]: detail for detail in self._interpreter.get_output_details()}
        self.inputs = [_spec(detail) for detail in self._inputs.values()]
        self.outputs = [_spec(detail) for detail in self._outputs.values()]
        # Where the signature fixes every dimension, the interpreter may still be resized by its first one.
        self._accepted = [
            TensorSpec(spec.name, spec.dtype, [-1, *spec.shape[1:]]) if spec.shape else spec
            for spec in self.inputs
        ]
        self._shapes: dict[str, tuple[int, ...]] = {}

    def infer(self, inputs: Arrays) -> Arrays:
        """See Model."""
        check_inputs(inputs, self._accepted)
        try:
            shapes = {name: values.shape for name, values in inputs.items()}
            if shapes != self._shapes:
                self._shapes = {}
                for name, shape in shapes.items():
                    self._interpreter.resize_tensor_input(self._inputs[name]["index"], shape)
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
            raise RuntimeFault(f"LiteRT: {_first_line(error)}") from None


def _open(content: bytes, provider: str, threads: int) -> Any:
    interpreter_class, load_delegate = _modules()
    delegates = []
    if provider != CPU:
        library = LIBRARIES.get(provider)
        if library is None:
            raise RuntimeFault(f"no such delegate, expected one of {', '.join([*LIBRARIES, CPU])}")
        try:
            ctypes.CDLL(library)  # LiteRT's own error for a missing library leaves a broken object behind
            delegates.append(load_delegate(library))
        except (OSError, ValueError) as error:
            raise RuntimeFault(f"{library} cannot be loaded: {_first_line(error)}") from None
    try:
        interpreter = interpreter_class(
            model_content=content, num_threads=threads, experimental_delegates=delegates
        )
        # Before allocation: then XNNPACK takes what is left, and its node looks the same.
        left = _left_over(interpreter) if delegates else []
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise RuntimeFault(_first_line(error)) from None
    if left:
        # Operators that the delegate did not take would run on the CPU in silence.
        raise RuntimeFault(f"it does not run {', '.join(left)}")
    return interpreter


def _left_over(interpreter: Any) -> list[str]:
    """The operators that no delegate took, by name."""
    operators = interpreter._get_ops_details()
    names = sorted({str(operator["op_name"]) for operator in operators} - {"DELEGATE"})
    delegated = any(operator["op_name"] == "DELEGATE" for operator in operators)
    if delegated:
        # The list still has the nodes that a delegate replaced; only those it does not cover count.
        covered = {
            index
            for operator in operators
            if operator["op_name"] == "DELEGATE"
            for index in np.ravel(operator["outputs"]).tolist()
        }
        outputs = {detail["index"] for detail in interpreter.get_output_details()}
        return [] if outputs <= covered else names
    return names or ["anything"]


def _spec(detail: Any) -> TensorSpec:
    signature = detail["shape_signature"] if len(detail["shape_signature"]) else detail["shape"]
    return TensorSpec(detail["name"], np.dtype(detail["dtype"]).name, [int(size) for size in signature])


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:500] if text else type(error).__name__
