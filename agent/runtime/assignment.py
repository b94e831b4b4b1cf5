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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime

from agent.runtime.onnx_options import CPU

RECORD = "session.record_ep_graph_assignment_info"

#: Nodes that only move or compute shapes: on the CPU by design next to every accelerator.
_SHAPE_WORK = frozenset(
    {"Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Gather", "MemcpyFromHost", "MemcpyToHost"}
    | {"Range", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Unsqueeze"}
)


def decide(nodes: Iterable[tuple[str, str]], asked: list[str]) -> str:
    """The provider of most nodes, each given as (provider, operator); shape work on the CPU does not count.

    Among equals the one asked for first; the CPU when there are no nodes.
    """
    counts = Counter(name for name, operator in nodes if name != CPU or operator not in _SHAPE_WORK)
    if not counts:
        return CPU
    order = {name: index for index, name in enumerate(asked)}
    return min(counts, key=lambda name: (-counts[name], order.get(name, len(order))))


def provider_of(session: Any, content: bytes, asked: list[str]) -> str:
    """The provider that runs the model; the CPU when nothing shows that another does."""
    if session.get_providers() == [CPU]:
        return CPU
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    try:
        if ask is not None:
            return decide(
                ((part.ep_name, node.op_type) for part in ask() for node in part.get_nodes()), asked
            )
        return decide(profiled(content, session), asked)
    except Exception:  # noqa: BLE001  # onnxruntime's exceptions share no base; what is not shown is not claimed
        return CPU


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
