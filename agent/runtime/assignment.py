"""Where a model's nodes really run in onnxruntime.

`get_providers()` lists what was registered, and a registered provider may have got no node at all. Strict
loading (`session.disable_cpu_ep_fallback`) does not answer the question either: CUDA leaves the nodes that
compute shapes to the CPU on purpose, so that it would refuse models that run well. So the session is asked
for each node's provider (onnxruntime >= 1.24), or, where it cannot say, one run is profiled.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime

from agent.runtime.onnx_options import CPU

RECORD = "session.record_ep_graph_assignment_info"

#: Nodes that only move or state shapes: whoever runs nothing else does not run the model.
_SHAPE_WORK = frozenset(
    {"Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Gather", "Identity", "MemcpyFromHost"}
    | {"MemcpyToHost", "Range", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Unsqueeze"}
)
#: What shapes and indices are computed with; accelerators leave that to the CPU, where its inputs are.
_ON_CPU_BY_DESIGN = _SHAPE_WORK | {
    "Add", "And", "Ceil", "Div", "Equal", "Flatten", "Floor", "Greater", "If", "Less", "Loop", "Max", "Min",
    "Mod", "Mul", "NonZero", "Not", "Or", "ReduceProd", "ScatterND", "Split", "Sub", "Where",
}  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """`provider` runs most of the model. `left` says what an accelerator leaves to the CPU; empty: nothing.

    Shape work on the CPU does not count.
    """

    provider: str
    left: str = ""


def decide(nodes: Iterable[tuple[str, str]], asked: Sequence[str]) -> Placement:
    """The placement of nodes, each given as (provider, operator).

    An accelerator that runs fewer nodes than the CPU does not run the model. Among equals the one asked for
    first.
    """
    everything = list(nodes)
    accelerated = [(name, operator) for name, operator in everything if name != CPU]
    on_cpu = Counter(kind for name, kind in everything if name == CPU and kind not in _ON_CPU_BY_DESIGN)
    at_work = [name for name, operator in accelerated if operator not in _SHAPE_WORK]
    if not at_work and not on_cpu:
        at_work = [name for name, _ in accelerated]
    if not at_work:
        return Placement(CPU, "it runs no node of the model")
    counts = Counter(at_work)
    order = {name: index for index, name in enumerate(asked)}
    most = min(counts, key=lambda name: (-counts[name], order.get(name, len(order))))
    kinds = ", ".join(f"{number} x {kind}" for kind, number in on_cpu.most_common(5))
    left = f"{on_cpu.total()} nodes run on the CPU: {kinds}" if on_cpu else ""
    return Placement(CPU if on_cpu.total() > len(at_work) else most, left)


def placement_of(session: Any, content: bytes, asked: Sequence[str]) -> Placement:
    """Where the session runs the model; the CPU when nothing shows that another does."""
    if session.get_providers() == [CPU]:
        return decide([], asked)
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    try:
        if ask is not None:
            return decide(
                ((part.ep_name, node.op_type) for part in ask() for node in part.get_nodes()), asked
            )
        return decide(profiled(content, session), asked)
    except Exception:  # noqa: BLE001  # onnxruntime's exceptions share no base; what is not shown is not claimed
        return Placement(CPU, "onnxruntime does not say where it runs the model")


_NUMPY = {"float": "float32", "double": "float64", "string": "object"}


def profiled(content: bytes, like: Any) -> list[tuple[str, str]]:
    """(provider, operator) of each node in one run on zeros, every free dimension 1.

    `like` is a session of the same model; its providers and their options are used. Raises what onnxruntime
    raises when the model cannot run on zeros.
    """
    settings = like.get_provider_options()
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "run")
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            content, options, providers=[(name, settings.get(name, {})) for name in like.get_providers()]
        )
        feed = {}
        for item in session.get_inputs():
            shape = [size if isinstance(size, int) else 1 for size in item.shape]
            kind = item.type.removeprefix("tensor(").removesuffix(")")
            if kind == "string":
                feed[item.name] = np.array([""] * math.prod(shape), object).reshape(shape)
            else:
                feed[item.name] = np.zeros(shape, _NUMPY.get(kind, kind))
        session.run(None, feed)
        events = msgspec.json.decode(Path(session.end_profiling()).read_bytes())
    return [
        (event["args"]["provider"], event["args"].get("op_name", ""))
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    ]
