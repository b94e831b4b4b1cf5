"""Models that misbehave, and the workers that let them."""

from __future__ import annotations

import http.client
import json
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from agent.runtime import process
from tests.agent.conftest import doubler


def bad(what: str, place: str, version: int = 0) -> bytes:
    """`y = 2 x`, with a fault for `bad_child`."""
    model = onnx.ModelProto.FromString(doubler())
    model.doc_string = f"fault:{what}:{place} {version}"
    return bytes(model.SerializeToString())


def let_them(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """From now on workers are `bad_child`: real processes under the agent's real supervision."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.faults.bad_child "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    patch.setattr(process, "sys", SimpleNamespace(executable=str(script)))


def ask(
    connection: http.client.HTTPConnection, value: float, path: str = "/v2/models/m/infer"
) -> tuple[int, Any]:
    """One row over REST: the status, and what was answered."""
    row = [value, 1.0, 2.0, 3.0]
    wish = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": row}]}
    connection.request("POST", path, json.dumps(wish))
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())
