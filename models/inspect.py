"""Look into ONNX and TFLite files that somebody brings: tensors, and a run on given rows."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward.errors import PackageError
from edgeward.formats import SNIFF_BYTES, check_model_head
from edgeward.wire.package import Runtime, TensorSpec

Arrays = dict[str, npt.NDArray[Any]]

_ONNX_TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
    "tensor(string)": "bytes",
}


class LoadedModel:
    """A model file opened on this machine, with its signature; `run` takes and gives arrays by name.

    bfloat16, which NumPy lacks, is uint16 both ways.
    """

    def __init__(self, content: bytes, runtime: Runtime, source: str) -> None:
        """Raises PackageError naming `source` when the file is not a valid model of that runtime."""
        check_model_head(content[:SNIFF_BYTES], runtime, source)
        self.runtime = runtime
        if runtime == "onnx":
            self._open_onnx(content, source)
        else:
            self._open_tflite(content, source)

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    def _open_onnx(self, content: bytes, source: str) -> None:
        import onnx
        import onnxruntime
        from onnx.external_data_helper import uses_external_data

        try:
            model = onnx.load_model_from_string(content)
            if any(uses_external_data(item) for item in _tensors(model.graph)):
                raise PackageError(f"{source}: keeps weights in other files", hint="save it as one file")
            onnx.checker.check_model(model)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except PackageError:
            raise
        except Exception as error:  # noqa: BLE001  # onnx and onnxruntime raise many unrelated types for a bad file
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise PackageError(f"{source}: not a valid ONNX model: {first}") from None
        self._session: Any = session
        self.inputs = [_onnx_spec(item, source) for item in session.get_inputs()]
        self.outputs = [_onnx_spec(item, source) for item in session.get_outputs()]

    def _open_tflite(self, content: bytes, source: str) -> None:
        from ai_edge_litert.interpreter import Interpreter

        try:
            interpreter = Interpreter(model_content=content, num_threads=1)
            interpreter.allocate_tensors()
        except Exception as error:  # noqa: BLE001  # litert raises ValueError and RuntimeError for a bad file
            raise PackageError(f"{source}: not a valid TFLite model: {error}") from None
        self._interpreter: Any = interpreter
        self.inputs = [_tflite_spec(item) for item in interpreter.get_input_details()]
        self.outputs = [_tflite_spec(item) for item in interpreter.get_output_details()]

    def run(self, inputs: Arrays) -> Arrays:
        """Raises PackageError when the inputs do not fit."""
        try:
            if self.runtime == "onnx":
                names = [spec.name for spec in self.outputs]
                inputs = {name: _as_text(values) for name, values in inputs.items()}
                if any(spec.dtype == "bfloat16" for spec in (*self.inputs, *self.outputs)):
                    return self._run_raw(inputs)
                return dict(zip(names, self._session.run(names, inputs), strict=True))
            details = self._interpreter.get_input_details()
            for detail in details:
                self._interpreter.resize_tensor_input(detail["index"], inputs[detail["name"]].shape)
            self._interpreter.allocate_tensors()
            for detail in details:
                values = inputs[detail["name"]]
                if np.dtype(detail["dtype"]).name == "bfloat16":
                    values = values.view(detail["dtype"])
                self._interpreter.set_tensor(detail["index"], values)
            self._interpreter.invoke()
            return {
                detail["name"]: _carried(self._interpreter.get_tensor(detail["index"]))
                for detail in self._interpreter.get_output_details()
            }
        except Exception as error:  # noqa: BLE001  # as above: the runtimes share no exception
            raise PackageError(f"the model refuses these inputs: {error}") from None

    def _run_raw(self, inputs: Arrays) -> Arrays:
        import onnxruntime
        from onnx import TensorProto

        make = onnxruntime.OrtValue
        feed = {
            spec.name: make.ortvalue_from_numpy_with_onnx_type(inputs[spec.name], TensorProto.BFLOAT16)
            if spec.dtype == "bfloat16"
            else make.ortvalue_from_numpy(inputs[spec.name])
            for spec in self.inputs
        }
        values = self._session.run_with_ort_values([spec.name for spec in self.outputs], feed)
        results: Arrays = {}
        for spec, value in zip(self.outputs, values, strict=True):
            if spec.dtype == "bfloat16":
                shape = tuple(value.shape())
                size = 2 * int(np.prod(shape, dtype=np.int64))
                results[spec.name] = np.frombuffer(
                    ctypes.string_at(value.data_ptr(), size), np.uint16
                ).reshape(shape)
            else:
                results[spec.name] = value.numpy()
        return results


def _carried(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.view(np.uint16).copy() if values.dtype.name == "bfloat16" else values.copy()


def from_bfloat16(raw: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The numbers (float32) that uint16 hold as bfloat16: the upper half of a float32."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Finite numbers as bfloat16 in uint16, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _as_text(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """onnxruntime wants text as `str` objects."""
    if values.dtype.kind not in "OS":
        return values
    decoded = np.empty(values.size, object)
    decoded[:] = [item.decode() if isinstance(item, bytes) else item for item in values.reshape(-1).tolist()]
    return decoded.reshape(values.shape)


def _tensors(graph: Any) -> Iterator[Any]:
    """All constant tensors of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _onnx_spec(item: Any, source: str) -> TensorSpec:
    if item.type not in _ONNX_TYPES:
        # What skl2onnx makes of a classifier's probabilities by default.
        of_maps = item.type.startswith("seq(map(")
        raise PackageError(
            f"{source}: tensor {item.name} has type {item.type}, expected a tensor of numbers or text",
            hint="with skl2onnx, convert with options={'zipmap': False}" if of_maps else "",
        )
    shape = [size if isinstance(size, int) else -1 for size in item.shape]
    return TensorSpec(item.name, _ONNX_TYPES[item.type], shape)


def _tflite_spec(item: Any) -> TensorSpec:
    signature = item["shape_signature"] if len(item["shape_signature"]) else item["shape"]
    return TensorSpec(item["name"], np.dtype(item["dtype"]).name, [int(size) for size in signature])


def largest_error(
    got: npt.NDArray[Any], want: npt.NDArray[Any], atol: float, rtol: float
) -> tuple[float, float]:
    """The largest absolute difference, and its limit at that element (`atol + rtol * |want|`).

    Infinite when shapes differ, a value is not finite, or a text is another.
    """
    if got.shape != want.shape:
        return float("inf"), atol
    if want.dtype.kind in "OUS":
        same = all(map(_same_text, got.reshape(-1).tolist(), want.reshape(-1).tolist()))
        return (0.0 if same else float("inf")), atol
    off = np.abs(got.astype(np.float64) - want.astype(np.float64))
    if not np.isfinite(off).all():
        return float("inf"), atol
    if off.size == 0:
        return 0.0, atol
    limits = atol + rtol * np.abs(want.astype(np.float64))
    worst = int(np.argmax(off - limits))
    return float(off.reshape(-1)[worst]), float(limits.reshape(-1)[worst])


def _same_text(one: Any, other: Any) -> bool:
    left, right = (item if isinstance(item, bytes) else str(item).encode() for item in (one, other))
    return left == right
