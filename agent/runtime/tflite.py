"""LiteRT, or its predecessor tflite-runtime where that is what the device has."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from typing import Any

import numpy as np

from agent.runtime.checks import Signature, disagreement, encoded
from agent.runtime.delegates import LIBRARIES
from agent.runtime.port import Arrays, BadInput, LoadOptions
from edgeward.errors import RuntimeFault
from edgeward.wire.package import TensorSpec

log = logging.getLogger(__name__)

XNNPACK = "XNNPACK"
CPU = "CPU"  # LiteRT's own kernels, where XNNPACK takes nothing of the model


def _module() -> Any:
    with contextlib.suppress(ImportError):
        # Gives NumPy the type bfloat16, without which LiteRT cannot name such a tensor.
        import ml_dtypes  # noqa: F401
    try:
        from ai_edge_litert import interpreter
    except ImportError:
        from tflite_runtime import interpreter
    return interpreter


def _delegate(name: str) -> Any:
    """Raises RuntimeFault when the delegate is unknown, not installed, or finds no device."""
    library = LIBRARIES.get(name)
    if library is None:
        raise RuntimeFault(
            f"LiteRT has no delegate {name!r}", hint=f"known: {', '.join([*LIBRARIES, XNNPACK])}"
        )
    try:
        # Asked first: LiteRT's own loader leaves a half-made object behind when the file is missing.
        ctypes.CDLL(library.file)
    except OSError as error:
        raise RuntimeFault(f"delegate {name}: {error}", hint=library.hint) from None
    try:
        return _module().load_delegate(library.file)
    except (ValueError, OSError, AttributeError) as error:
        why = " ".join(str(error).split()) or "it found no device"
        raise RuntimeFault(f"delegate {name}: {library.file} refused to start: {why}") from None


def _spec(detail: Any) -> TensorSpec:
    signature = detail["shape_signature"] if len(detail["shape_signature"]) else detail["shape"]
    dtype = np.dtype(detail["dtype"])
    name = "bytes" if dtype.kind in "OSU" else dtype.name
    return TensorSpec(detail["name"], name, [int(size) for size in signature])


#: What Edge TPU's compiler and its like leave to the CPU on purpose: the ends of a model.
_ON_CPU_BY_DESIGN = frozenset(
    {"CAST", "DEQUANTIZE", "EXPAND_DIMS", "PACK", "QUANTIZE", "RESHAPE", "SHAPE", "SQUEEZE", "STRIDED_SLICE"}
    | {"TFLite_Detection_PostProcess"}
)


def left_over(native: Any) -> list[str] | None:
    """The operators that no delegate took, by name; None when none took any.

    The list of nodes still has those that a delegate replaced: the ones that still run are those that the
    outputs can be followed back to, taking a delegate's node wherever it makes the tensor.
    """
    # `_get_ops_details` would also ask for the types of all tensors, which fails where NumPy has no such type.
    nodes = [
        (native.NodeName(index), native.NodeInputs(index), native.NodeOutputs(index))
        for index in range(native.NumNodes())
    ]
    maker = {int(tensor): index for index, node in enumerate(nodes) for tensor in node[2]}
    delegates = [index for index, node in enumerate(nodes) if node[0] == "DELEGATE"]
    if not delegates:
        return None
    maker |= {int(tensor): index for index in delegates for tensor in nodes[index][2]}
    wanted, runs = [int(tensor) for tensor in native.OutputIndices()], set[int]()
    while wanted:
        index = maker.get(wanted.pop())
        if index is not None and index not in runs:
            runs.add(index)
            wanted += [int(tensor) for tensor in nodes[index][1]]
    return sorted({nodes[index][0] for index in runs} - {"DELEGATE"})


def _interpreter(content: bytes, threads: int, delegate: Any) -> tuple[Any, list[str] | None]:
    """An interpreter, and what `delegate` left of the model (None: all). Raises RuntimeFault."""
    try:
        made = _module().Interpreter(
            model_content=content,
            num_threads=threads,
            experimental_delegates=[delegate] if delegate is not None else None,
        )
        # Before tensors are allocated: LiteRT then lets XNNPACK have the rest, which looks the same.
        left = left_over(made._interpreter)
        made.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise RuntimeFault(f"LiteRT refused the model: {error}") from None
    return made, left


class TfliteModel:
    """One interpreter; its inputs are resized when their shapes change. See port.Model.

    Quantised models take and give their raw integers. Text is bytes objects coming out; bfloat16 is uint16
    both ways.
    """

    def __init__(self, content: bytes, load: LoadOptions) -> None:
        """Raises RuntimeFault when LiteRT refuses the model, or no delegate asked for can be loaded."""
        self.provider = ""
        self._interpreter: Any = self._open(content, load)
        try:
            self._inputs = {detail["name"]: detail for detail in self._interpreter.get_input_details()}
            self._outputs = {detail["name"]: detail for detail in self._interpreter.get_output_details()}
        except ValueError as error:
            raise RuntimeFault(f"LiteRT cannot name the types of the model's tensors: {error}") from None
        self.inputs = [_spec(detail) for detail in self._inputs.values()]
        self.outputs = [_spec(detail) for detail in self._outputs.values()]
        # Where the signature fixes every dimension, the interpreter may still be resized by its first one;
        # an accelerator's delegate has compiled the shapes stated.
        resizable = self.provider in (XNNPACK, CPU)
        self._signature = Signature(
            [
                TensorSpec(spec.name, spec.dtype, [-1, *spec.shape[1:]]) if resizable and spec.shape else spec
                for spec in self.inputs
            ]
        )
        self._text_in = {spec.name for spec in self.inputs if spec.dtype == "bytes"}
        self._text_out = {spec.name for spec in self.outputs if spec.dtype == "bytes"}
        self._raw_in = {spec.name for spec in self.inputs if spec.dtype == "bfloat16"}
        self._raw_out = {spec.name for spec in self.outputs if spec.dtype == "bfloat16"}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def _open(self, content: bytes, load: LoadOptions) -> Any:
        """On the first provider that runs the model; with the CPU among them it may have the rest."""
        asked = load.providers or (XNNPACK,)
        cpu = not {XNNPACK, CPU}.isdisjoint(asked)
        faults: list[RuntimeFault] = []
        for name in asked:
            if name in (XNNPACK, CPU):
                interpreter, _ = _interpreter(content, load.threads, None)
                self.provider = CPU if left_over(interpreter._interpreter) is None else XNNPACK
                return interpreter
            try:
                interpreter, left = _interpreter(content, load.threads, _delegate(name))
            except RuntimeFault as fault:
                faults.append(fault)
                log.warning("%s", fault)
                continue
            rest = set(left or []) - _ON_CPU_BY_DESIGN
            if left is not None and (cpu or not rest):
                self.provider = f"{name}+{CPU}" if rest else name
                return interpreter
            what = f"leaves to the CPU: {', '.join(sorted(rest))}" if left else "takes no part of the model"
            faults.append(RuntimeFault(f"delegate {name} {what}"))
            log.warning("%s", faults[-1])
        raise faults[0]

    def infer(self, inputs: Arrays) -> Arrays:
        """Raises BadInput naming the tensor at fault, RuntimeFault; the model stays usable."""
        feed = self._signature.check(inputs)
        try:
            self._resize(feed)
            for name, values in feed.items():
                if name in self._text_in:
                    values = encoded(values)
                elif name in self._raw_in:
                    values = values.view(self._inputs[name]["dtype"])
                self._interpreter.set_tensor(self._inputs[name]["index"], values)
            self._interpreter.invoke()
            results = {
                name: self._interpreter.get_tensor(detail["index"]) for name, detail in self._outputs.items()
            }
        except (ValueError, RuntimeError) as error:
            # Whatever it has allocated now, the next request must not rely on it.
            self._shapes = {}
            differs = disagreement(self._signature.specs, feed)
            if differs:
                raise BadInput(f"{differs}; LiteRT: {error}") from None
            raise RuntimeFault(f"LiteRT: {error}") from None
        for name in self._text_out:
            results[name] = encoded(results[name])
        for name in self._raw_out:
            results[name] = results[name].view(np.uint16)
        return results

    def _resize(self, feed: Arrays) -> None:
        shapes = {name: values.shape for name, values in feed.items()}
        if shapes == self._shapes:
            return
        for name, shape in shapes.items():
            self._interpreter.resize_tensor_input(self._inputs[name]["index"], shape)
        self._interpreter.allocate_tensors()
        self._shapes = shapes
