"""The GPU benchmark runs here with another provider: its figures do not matter, its verdicts do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest

from benchmarks import gpu

TINY: dict[str, Any] = {"cnn": (lambda: gpu.models.cnn(4, 8), "image", (3, 8, 8))}


def rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: Any, *arguments: str
) -> list[dict[str, Any]]:
    file = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick", "--json", str(file), *arguments])
    module.main()
    made: list[dict[str, Any]] = msgspec.json.decode(file.read_bytes())["rows"]
    return made


def test_without_the_provider_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = rows(monkeypatch, tmp_path, gpu, "--provider", "NoExecutionProvider")
    assert len(made) == 6
    assert {row["holds"] for row in made} == {row["ours"] for row in made} == {None}
    assert "nothing measured: onnxruntime has no NoExecutionProvider here" in capsys.readouterr().out


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has CUDA")
def test_a_build_with_the_provider_and_no_gpu_claims_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "onnx_providers", lambda runtime, folder: [gpu.CUDA])
    monkeypatch.setattr(gpu, "WORKS", TINY)
    made = rows(monkeypatch, tmp_path, gpu)
    assert {row["ours"] for row in made} == {None}
    assert "none of CUDAExecutionProvider is in this onnxruntime" in capsys.readouterr().out


def test_every_batch_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "WORKS", TINY)
    made = rows(monkeypatch, tmp_path, gpu, "--provider", "CPUExecutionProvider")
    assert [row["work"] for row in made] == ["cnn, batch 1", "cnn, batch 8", "cnn, batch 32"]
    assert all(row["ours"] > 0 and row["limit"] > 0 and row["holds"] is not None for row in made)


def test_different_answers_are_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "WORKS", TINY)
    monkeypatch.setattr(gpu.Raw, "infer", lambda self, inputs: np.zeros((1, 10), np.float32) + 9)
    with pytest.raises(RuntimeError, match="the answers differ"):
        rows(monkeypatch, tmp_path, gpu, "--provider", "CPUExecutionProvider")
