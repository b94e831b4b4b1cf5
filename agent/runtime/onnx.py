"""onnxruntime.

Which provider a model really runs on is not what `get_providers` says: that lists what was registered,
while single nodes may still fall to the CPU. So after loading, onnxruntime is asked where it put each
node. Shapes and indices are computed on the CPU on purpose; any other node there means that the
accelerator does not run the model.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from agent.runtime.inputs import check_inputs
from agent.runtime.port import Arrays, LoadOptions
from edgeward.errors import RuntimeFault
from edgeward.wire.package import TensorSpec

log = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"

_TYPES = {"float": "float32", "double": "float64", "string": "bytes"}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


class OnnxModel:
    """Loaded from bytes, so that a model cannot reach for other files."""

    def __init__(self, content: bytes, load: LoadOptions) -> None:
        """Raises RuntimeFault when onnxruntime refuses the model, or no asked provider is installed."""
        asked = load.providers or (CPU,)
        installed = onnxruntime.get_available_providers()
        usable = [name for name in asked if name in installed]
        if not usable:
            raise RuntimeFault(
                f"none of {', '.join(asked)} is in this onnxruntime, which has {', '.join(installed)}"
            )
        self._session, self.provider = _open(content, usable, load)
        self.inputs = [_spec(item) for item in self._session.get_inputs()]
        self.outputs = [_spec(item) for item in self._session.get_outputs()]
        self._names = [spec.name for spec in self.outputs]
        self._raw = any(spec.dtype == "bfloat16" for spec in self.inputs + self.outputs)
        self._texts = [spec.name for spec in self.inputs if spec.dtype == "bytes"]

    def infer(self, inputs: Arrays) -> Arrays:
        """See Model."""
        check_inputs(inputs, self.inputs)
        if self._texts:
            inputs = inputs | {name: _as_text(inputs[name]) for name in self._texts}
        try:
            if self._raw:
                return self._infer_values(inputs)
            outputs = self._session.run(self._names, inputs)
        except Exception as error:  # noqa: BLE001  # onnxruntime's exceptions share no base but Exception
            raise RuntimeFault(f"onnxruntime: {_first_line(error)}") from None
        if len(outputs) != len(self._names):
            raise RuntimeFault(f"the model gave {len(outputs)} outputs, expected {', '.join(self._names)}")
        return dict(zip(self._names, outputs, strict=True))

    def _infer_values(self, inputs: Arrays) -> Arrays:
        """NumPy has no bfloat16: such tensors cross as raw uint16."""
        values = {}
        for spec in self.inputs:
            array = np.ascontiguousarray(inputs[spec.name])
            values[spec.name] = (
                onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
                if spec.dtype == "bfloat16"
                else onnxruntime.OrtValue.ortvalue_from_numpy(array)
            )
        outputs = self._session.run_with_ort_values(self._names, values)
        return {
            spec.name: _raw_array(value) if spec.dtype == "bfloat16" else value.numpy()
            for spec, value in zip(self.outputs, outputs, strict=True)
        }


def _open(content: bytes, usable: list[str], load: LoadOptions) -> tuple[Any, str]:
    """The session on the first provider that runs the model, and that provider."""
    problems = []
    for provider in usable:
        try:
            if provider == CPU:
                return _open_on_cpu(content, load), CPU
            session, left = _open_on_accelerator(content, provider, load)
        except RuntimeFault as fault:
            left = str(fault)
        if not left:
            return session, provider
        problems.append(left if provider == CPU else f"{provider}: {left}")
        log.warning("%s", problems[-1])
    raise RuntimeFault(f"onnxruntime: {'; '.join(problems)}")


def _open_on_cpu(content: bytes, load: LoadOptions) -> Any:
    options = _options(load)
    if load.compiled:
        return _open_optimised(content, options, Path(load.compiled))
    return _session(content, options, [CPU])


def _open_on_accelerator(content: bytes, provider: str, load: LoadOptions) -> tuple[Any, str]:
    """The session, and what of the model it would not run on `provider`."""
    options = _options(load)
    asks = hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info")
    if asks:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    else:
        # An older onnxruntime cannot be asked; it can be told to refuse what needs the processor.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = _session(content, options, [(provider, _provider_options(provider, load)), CPU])
    if provider not in session.get_providers():
        raise RuntimeFault("it could not be started, see the log above")
    return session, left_over(session.get_provider_graph_assignment_info(), provider) if asks else ""


#: Operators that compute shapes and indices; providers leave them to the CPU, where their inputs are.
_BOOKKEEPING = frozenset(
    [
        "Shape", "Size", "Gather", "Unsqueeze", "Squeeze", "Concat", "Slice", "Cast", "Constant",
        "ConstantOfShape", "Reshape", "Range", "Identity", "Add", "Sub", "Mul", "Div", "Mod", "Equal",
        "Greater", "Less", "Not", "And", "Or", "Where", "Expand", "Flatten", "Split", "ScatterND",
        "ReduceProd", "Min", "Max", "Floor", "Ceil", "NonZero", "Loop", "If", "MemcpyToHost",
        "MemcpyFromHost",
    ]
)  # fmt: skip


def left_over(assigned: Iterable[Any], provider: str) -> str:
    """Why `provider` does not run the model: what onnxruntime put elsewhere; empty when it does."""
    elsewhere: Counter[str] = Counter()
    here = 0
    for subgraph in assigned:
        for node in subgraph.get_nodes():
            if subgraph.ep_name == provider:
                here += 1
            elif node.op_type not in _BOOKKEEPING:
                elsewhere[node.op_type] += 1
    if elsewhere:
        kinds = ", ".join(f"{number} x {kind}" for kind, number in elsewhere.most_common(5))
        return f"{elsewhere.total()} nodes would run on the CPU: {kinds}"
    return "" if here else "it runs no node of the model"


def _options(load: LoadOptions) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = load.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin between requests would take the cores from other slots.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _session(content: bytes, options: Any, providers: list[Any]) -> Any:
    try:
        return onnxruntime.InferenceSession(content, options, providers=providers)
    except Exception as error:  # noqa: BLE001  # as above
        raise RuntimeFault(_first_line(error)) from None


def _provider_options(provider: str, load: LoadOptions) -> dict[str, str]:
    """Memory limits and caches of compiled forms, in each provider's own words."""
    limit = str(load.gpu_memory_bytes) if load.gpu_memory_bytes else ""
    compiled = load.compiled
    options: dict[str, str] = {}
    match provider:
        case "CUDAExecutionProvider" | "ROCMExecutionProvider":
            options = {"device_id": "0", "arena_extend_strategy": "kSameAsRequested"}
            options |= {"gpu_mem_limit": limit} if limit else {}
        case "TensorrtExecutionProvider":
            options = {"device_id": "0"} | ({"trt_max_workspace_size": limit} if limit else {})
            if compiled:
                options |= {
                    "trt_engine_cache_enable": "1",
                    "trt_engine_cache_path": compiled,
                    "trt_timing_cache_enable": "1",
                    "trt_timing_cache_path": compiled,
                }
        case "OpenVINOExecutionProvider":
            options = {"num_of_threads": str(load.threads)} | ({"cache_dir": compiled} if compiled else {})
        case "MIGraphXExecutionProvider":
            options = {"device_id": "0"} | ({"migraphx_model_cache_dir": compiled} if compiled else {})
        case "QNNExecutionProvider":
            options = {"backend_path": "libQnnHtp.so"}
    return options


def _open_optimised(content: bytes, options: Any, folder: Path) -> Any:
    """The optimised graph of an earlier load, or this one's, kept for the next.

    A file that is not the one written here (its digest stands beside it) is made again.
    """
    key = hashlib.sha256(content).hexdigest()[:32]
    file = folder / f"{key}-ort-{onnxruntime.__version__}.onnx"
    kept = _read_kept(file)
    if kept is not None:
        again = _options_like(options)
        again.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return _session(kept, again, [CPU])
        except RuntimeFault as fault:
            log.warning("the optimised graph %s is of no use: %s", file, fault)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "graph.onnx"
            options.optimized_model_filepath = str(made)
            session = _session(content, options, [CPU])
            if made.exists():
                digest = hashlib.sha256(made.read_bytes()).hexdigest()
                Path(scratch, "digest").write_text(digest)
                Path(scratch, "digest").replace(file.with_suffix(".sha256"))
                made.replace(file)
            return session
    except OSError as error:
        log.warning("optimised graphs cannot be kept in %s: %s", folder, error)
        return _session(content, _options_like(options), [CPU])


def _options_like(options: Any) -> Any:
    return _options(LoadOptions(threads=options.intra_op_num_threads))


def _read_kept(file: Path) -> bytes | None:
    try:
        content = file.read_bytes()
        stated = file.with_suffix(".sha256").read_text()
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest() != stated:
        log.warning("the optimised graph %s was changed, it is made again", file)
        return None
    return content


def _spec(item: Any) -> TensorSpec:
    kind = item.type.removeprefix("tensor(").removesuffix(")")
    if kind == item.type:
        raise RuntimeFault(f"tensor {item.name} has type {item.type}, which is not supported")
    shape = [size if isinstance(size, int) else -1 for size in item.shape]
    return TensorSpec(item.name, _TYPES.get(kind, kind), shape)


def _as_text(array: np.ndarray) -> np.ndarray:
    """onnxruntime wants text as `str` objects."""
    decoded = np.empty(array.size, object)
    try:
        decoded[:] = [
            item.decode() if isinstance(item, bytes) else str(item) for item in array.reshape(-1).tolist()
        ]
    except UnicodeDecodeError:
        raise RuntimeFault("a text is not UTF-8") from None
    return decoded.reshape(array.shape)


def _raw_array(value: Any) -> np.ndarray:
    """A bfloat16 value's bytes; the runtime gives them by DLPack only."""
    import ctypes

    count = int(np.prod(value.shape())) if value.shape() else 1
    buffer = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    return np.ctypeslib.as_array(buffer).copy().reshape(value.shape())


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:500] if text else type(error).__name__
