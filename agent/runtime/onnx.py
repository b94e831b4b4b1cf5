"""onnxruntime."""

from __future__ import annotations

import ctypes
import logging
import warnings
from typing import Any

import numpy as np
import onnxruntime

from agent.runtime.assignment import RECORD, placement_of
from agent.runtime.checks import Signature, disagreement, encoded, text
from agent.runtime.onnx_options import CPU, Compilation, provider_options
from agent.runtime.port import Arrays, BadInput, LoadOptions
from edgeward.errors import RuntimeFault
from edgeward.wire.package import TensorSpec

log = logging.getLogger(__name__)

_TYPES = {"float": "float32", "double": "float64", "string": "bytes"}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; the package onnx is not on devices


def _spec(item: Any, what: str) -> TensorSpec:
    if not item.type.startswith("tensor("):
        raise RuntimeFault(
            f"{what} {item.name} is a {item.type}, not a tensor (scikit-learn: convert with zipmap off)"
        )
    kind = item.type.removeprefix("tensor(").removesuffix(")")
    shape = [size if isinstance(size, int) else -1 for size in item.shape]
    return TensorSpec(item.name, _TYPES.get(kind, kind), shape)


def _first_line(error: Exception) -> str:
    content = str(error).strip()
    return content.splitlines()[0][:500] if content else type(error).__name__


def _options(load: LoadOptions) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = load.threads
    options.inter_op_num_threads = 1
    # Threads that spin for work take the cores that the agent and the other models need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(RECORD, "1")
    options.log_severity_level = 3
    return options


class OnnxModel:
    """Loaded from bytes, so that a model cannot reach for other files. See port.Model.

    Text is str or bytes objects going in and bytes objects coming out; bfloat16 is uint16 both ways.
    """

    def __init__(self, content: bytes, load: LoadOptions) -> None:
        """Raises RuntimeFault when onnxruntime refuses the model, when none of the providers asked for runs it,
        and for inputs or outputs that are no tensors."""
        self._session, self.provider, self._compilation = _open(content, load)
        self.inputs = [_spec(item, "input") for item in self._session.get_inputs()]
        self.outputs = [_spec(item, "output") for item in self._session.get_outputs()]
        self._signature = Signature(self.inputs, scalars_are_open=True)
        self._raw_in = {spec.name for spec in self.inputs if spec.dtype == "bfloat16"}
        self._names = [spec.name for spec in self.outputs]
        self._text_in = [spec.name for spec in self.inputs if spec.dtype == "bytes"]
        self._text_out = [spec.name for spec in self.outputs if spec.dtype == "bytes"]
        self._raw = bool(self._raw_in) or any(spec.dtype == "bfloat16" for spec in self.outputs)

    def infer(self, inputs: Arrays) -> Arrays:
        """Raises BadInput naming the tensor at fault, RuntimeFault; the model stays usable."""
        feed = self._signature.check(inputs)
        for name in self._text_in:
            feed[name] = text(name, feed[name])
        try:
            if self._raw:
                return self._infer_raw(feed)
            results = dict(zip(self._names, self._session.run(self._names, feed), strict=True))
        except Exception as error:  # noqa: BLE001  # as above
            differs = disagreement(self.inputs, feed)
            if differs:
                raise BadInput(f"{differs}; onnxruntime: {_first_line(error)}") from None
            raise RuntimeFault(f"onnxruntime: {_first_line(error)}") from None
        for name in self._text_out:
            results[name] = encoded(results[name])
        self._compilation.ran(feed)
        return results

    def _infer_raw(self, feed: Arrays) -> Arrays:
        """With bfloat16, which NumPy lacks: through onnxruntime's own values."""
        make = onnxruntime.OrtValue
        values = {
            name: make.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
            if name in self._raw_in
            else make.ortvalue_from_numpy(array)
            for name, array in feed.items()
        }
        results: Arrays = {}
        outputs = self._session.run_with_ort_values(self._names, values)
        for spec, value in zip(self.outputs, outputs, strict=True):
            if spec.dtype == "bfloat16":
                shape = tuple(value.shape())
                results[spec.name] = np.frombuffer(
                    ctypes.string_at(value.data_ptr(), 2 * int(np.prod(shape, dtype=np.int64))), np.uint16
                ).reshape(shape)
            else:
                array = value.numpy()
                results[spec.name] = encoded(array) if spec.dtype == "bytes" else array
        return results


def _open(content: bytes, load: LoadOptions) -> tuple[Any, str, Compilation]:
    """The session on the first provider that runs the model, that provider, and its compiled form.

    Where the CPU was asked for, too, it may have what an accelerator leaves: `A+CPUExecutionProvider`.
    """
    asked = list(dict.fromkeys(load.providers)) or [CPU]
    installed = onnxruntime.get_available_providers()
    usable = [name for name in asked if name in installed]
    if not usable:
        raise RuntimeFault(
            f"none of {', '.join(asked)} is in this onnxruntime, which has {', '.join(installed)}"
        )
    problems = []
    for index, first in enumerate(usable):
        # What the first accelerator does not take goes to the next one, and to the CPU in the end.
        providers = [first] if first == CPU else [*(name for name in usable[index:] if name != CPU), CPU]
        try:
            session, compilation = _compiled_session(content, load, providers)
        except RuntimeFault as fault:
            problems.append(f"{first}: {fault}")
            continue
        if first == CPU:
            return session, CPU, compilation
        placed = placement_of(session, content, providers)
        if not placed.left:
            return session, placed.provider, compilation
        if placed.provider != CPU and CPU in asked:
            log.warning("%s runs the model in part: %s", placed.provider, placed.left)
            return session, f"{placed.provider}+{CPU}", compilation
        problems.append(f"{first}: {placed.left}")
        log.warning("%s", problems[-1])
    raise RuntimeFault(f"onnxruntime does not run the model: {'; '.join(problems)}")


def _compiled_session(content: bytes, load: LoadOptions, providers: list[str]) -> tuple[Any, Compilation]:
    """A session from the compiled form where there is one. Raises RuntimeFault."""
    compilation = Compilation.begin(content, providers, load)
    settings = [provider_options(name, load, compilation.folder) for name in providers]
    failure = ""
    try:
        for compiled in [True, False] if compilation.active else [False]:
            options = _options(load)
            # A fault of the compiled form must not cost the model: the last attempt is without.
            source = compilation.prepare(options) or content if compiled else content
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    # By itself it would turn to other providers after a fault, now or while running.
                    # Older releases know only the call below.
                    session: Any = onnxruntime.InferenceSession(
                        source,
                        options,
                        providers=list(zip(providers, settings, strict=True)),
                        enable_fallback=0,
                    )
            except Exception as error:  # noqa: BLE001  # onnxruntime's exceptions share no base but Exception
                failure = _first_line(error)
                continue
            session.disable_fallback()
            if compiled:
                compilation.keep()
            return session, compilation
    finally:
        compilation.end()
    raise RuntimeFault(failure)
