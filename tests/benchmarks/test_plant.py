"""An enrolled agent as the benchmarks and its users run it: all processes are real."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

from benchmarks import models
from benchmarks.peers import free_port
from benchmarks.plant import SlotModel, plant


def ask(url: str, body: dict[str, object] | None = None) -> int:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(url, data, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_an_agent_that_starts_again_is_not_ready_before_its_models_are(tmp_path: Path) -> None:
    rows = np.random.default_rng(7).random((4, 9), np.float32)
    request = {
        "inputs": [
            {"name": "input", "shape": [1, 9], "datatype": "FP32", "data": rows[0].astype(float).tolist()}
        ]
    }
    with plant(
        tmp_path / "plant", [SlotModel("default", "boosting", models.tabular(), {"input": rows})]
    ) as agent:
        agent.stop()
        port = free_port()
        agent.start("--serve", f"127.0.0.1:{port}")
        base, seen = f"http://127.0.0.1:{port}", set()
        until = time.monotonic() + 60
        while 200 not in seen and time.monotonic() < until:
            try:
                seen.add(ask(f"{base}/v2/health/ready"))
            except urllib.error.URLError:
                continue
        assert 200 in seen
        assert ask(f"{base}/v2/models/boosting/infer", request) == 200
        assert ask(f"{base}/v2/models/nothing") == 404
