"""onnxruntime."""

from __future__ import annotations

from typing import Any

import onnxruntime

from agent.runtime.port import Arrays, LoadOptions
from edgeward.errors import RuntimeFault


class OnnxModel:
    """Loaded from bytes, so that a model cannot reach for other files; one thread, no memory arena growth."""

    def __init__(self, content: bytes, load: LoadOptions) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = load.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session: Any = onnxruntime.InferenceSession(
                content, options, providers=list(load.providers) or ["CPUExecutionProvider"]
            )
        except Exception as error:  # noqa: BLE001  # onnxruntime's exceptions share no base but Exception
            raise RuntimeFault(f"onnxruntime refused the model: {_first_line(error)}") from None
        self.provider: str = self._session.get_providers()[0]
        self.inputs = [_spec(item) for item in self._session.get_inputs()]
        self.outputs = [_spec(item) for item in self._session.get_outputs()]
        self._outputs = [output.name for output in self._session.get_outputs()]

    def infer(self, inputs: Arrays) -> Arrays:
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))
        except Exception as error:  # noqa: BLE001  # as above
            raise RuntimeFault(f"onnxruntime: {_first_line(error)}") from None


_TYPES = {"float": "float32", "double": "float64", "string": "bytes"}


def _spec(item: Any) -> Any:
    from edgeward.wire.package import TensorSpec

    kind = item.type.removeprefix("tensor(").removesuffix(")")
    shape = [size if isinstance(size, int) else -1 for size in item.shape]
    return TensorSpec(item.name, _TYPES.get(kind, kind), shape)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:500] if text else type(error).__name__
