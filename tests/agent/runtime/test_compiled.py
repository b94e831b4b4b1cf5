"""Compiled forms: used when they are what was kept, made again otherwise."""

from __future__ import annotations

import platform
import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from agent.runtime import onnx as adapter
from agent.runtime import onnx_options
from agent.runtime.compiled import CompiledFile, CompiledFolder, key, processor
from agent.runtime.onnx import OnnxModel
from agent.runtime.onnx_options import Compilation, provider_options
from agent.runtime.port import LoadOptions
from tests.agent.runtime import graphs

X = np.ones((2, 3), np.float32)
WANT = X @ graphs.WEIGHTS + graphs.BIAS


def test_key_keeps_parts_apart() -> None:
    assert key("ab", "c") != key("a", "bc")
    assert key("ab", b"c") == key(b"ab", "c")


def test_file_is_read_back_only_as_it_was_kept(tmp_path: Path) -> None:
    form = CompiledFile(tmp_path / "forms", "a.onnx")
    assert form.read() is None
    assert not form.keep()
    form.draft.write_bytes(b"graph")
    assert form.keep()
    assert form.read() == b"graph"
    assert sorted(path.name for path in form.path.parent.iterdir()) == ["a.onnx", "a.onnx.sha256"]
    form.path.write_bytes(b"grapH")
    assert form.read() is None
    form.draft.write_bytes(b"again")
    assert form.keep()
    assert form.read() == b"again"


def test_a_draft_that_cannot_be_removed_costs_nothing(tmp_path: Path) -> None:
    form = CompiledFile(tmp_path, "a.onnx")
    form.draft.mkdir()  # as unlink fails on a broken disk, also for root
    form.discard()
    assert not form.keep() and form.read() is None


@pytest.mark.parametrize("damage", ["no record", "empty record", "binary record"])
def test_file_without_its_record_is_not_read(tmp_path: Path, damage: str) -> None:
    form = CompiledFile(tmp_path, "a.onnx")
    form.draft.write_bytes(b"graph")
    form.keep()
    record = tmp_path / "a.onnx.sha256"
    if damage == "no record":
        record.unlink()
    else:
        record.write_bytes(b"" if damage == "empty record" else b"\xff\xfe")
    assert form.read() is None


def test_folders_are_for_their_owner_only(tmp_path: Path) -> None:
    for path in (CompiledFile(tmp_path / "a", "x").path.parent, CompiledFolder(tmp_path / "b").path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_folder_that_is_as_sealed_stays(tmp_path: Path) -> None:
    folder = CompiledFolder(tmp_path / "engines")
    (folder.path / "sub").mkdir()
    (folder.path / "sub" / "engine").write_bytes(b"engine")
    folder.seal()
    assert (CompiledFolder(tmp_path / "engines").path / "sub" / "engine").read_bytes() == b"engine"


@pytest.mark.parametrize("change", ["changed", "added", "record gone", "record damaged"])
def test_folder_that_differs_is_emptied(tmp_path: Path, change: str) -> None:
    folder = CompiledFolder(tmp_path / "engines")
    engine = folder.path / "engine"
    engine.write_bytes(b"engine")
    folder.seal()
    record = tmp_path / "engines.sha256"
    if change == "changed":
        engine.write_bytes(b"enginE")
    elif change == "added":
        (folder.path / "other").write_bytes(b"")
    elif change == "record gone":
        record.unlink()
    else:
        record.write_bytes(b"{")
    assert list(CompiledFolder(tmp_path / "engines").path.iterdir()) == []


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What sessions are opened from."""
    opened: list[bytes] = []
    real = onnxruntime.InferenceSession

    def session(source: bytes, *arguments: Any, **named: Any) -> Any:
        opened.append(source)
        return real(source, *arguments, **named)

    monkeypatch.setattr(adapter.onnxruntime, "InferenceSession", session)
    return opened


def run(folder: Path, content: bytes | None = None, **options: Any) -> None:
    model = OnnxModel(content or graphs.onnx_dense(), LoadOptions(compiled=str(folder), **options))
    assert model.provider == "CPUExecutionProvider"
    np.testing.assert_allclose(model.infer({"x": X})["y"], WANT, rtol=1e-6)


def test_optimised_graph_is_made_once(tmp_path: Path, sources: list[bytes]) -> None:
    run(tmp_path)
    (form,) = tmp_path.glob("*.onnx")
    made = form.read_bytes()
    run(tmp_path)
    assert sources == [graphs.onnx_dense(), made]
    assert made != graphs.onnx_dense()
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_graph_is_refused_and_made_again(tmp_path: Path, sources: list[bytes]) -> None:
    run(tmp_path)
    (form,) = tmp_path.glob("*.onnx")
    made = form.read_bytes()
    # A valid model that answers otherwise: only the digest shows it.
    form.write_bytes(graphs.onnx_model_of(graphs.WEIGHTS * 2))
    run(tmp_path)
    assert sources == [graphs.onnx_dense()] * 2
    assert form.read_bytes() == made


def test_graph_that_the_runtime_refuses_does_not_cost_the_model(tmp_path: Path, sources: list[bytes]) -> None:
    run(tmp_path)
    (path,) = tmp_path.glob("*.onnx")
    form = CompiledFile(tmp_path, path.name)
    form.draft.write_bytes(b"no model")
    assert form.keep()
    run(tmp_path)
    assert sources[1:] == [b"no model", graphs.onnx_dense()]


def test_graph_belongs_to_its_model_and_version(
    tmp_path: Path, sources: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    other = OnnxModel(graphs.onnx_model_of(graphs.WEIGHTS * 2), LoadOptions(compiled=str(tmp_path)))
    np.testing.assert_allclose(other.infer({"x": X})["y"], WANT * 2 - graphs.BIAS, rtol=1e-6)
    monkeypatch.setattr(adapter.onnxruntime, "__version__", "99")
    run(tmp_path)
    assert sources[2] == graphs.onnx_dense()
    assert len(list(tmp_path.glob("*.onnx"))) == 3


def test_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    run(blocked / "forms")


def test_refused_model_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="does not run the model"):
        OnnxModel(b"nonsense", LoadOptions(compiled=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_providers_get_memory_limits_and_cache_folders(tmp_path: Path) -> None:
    load = LoadOptions(threads=3, gpu_memory_bytes=1 << 30)
    limit = str(1 << 30)
    assert provider_options("CUDAExecutionProvider", load, None) == {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "gpu_mem_limit": limit,
    }
    trt = provider_options("TensorrtExecutionProvider", load, tmp_path)
    assert trt["trt_engine_cache_path"] == trt["trt_timing_cache_path"] == str(tmp_path)
    assert trt["trt_engine_cache_enable"] == trt["trt_timing_cache_enable"] == "1"
    assert provider_options("TensorrtExecutionProvider", LoadOptions(), None) == {}
    assert provider_options("MIGraphXExecutionProvider", load, tmp_path) == {
        "migraphx_mem_limit": limit,
        "migraphx_model_cache_dir": str(tmp_path),
    }
    assert provider_options("OpenVINOExecutionProvider", load, tmp_path) == {
        "num_of_threads": "3",
        "cache_dir": str(tmp_path),
    }
    assert provider_options("CPUExecutionProvider", load, tmp_path) == {}


@pytest.mark.parametrize(
    ("providers", "folder", "file"),
    [
        (["CPUExecutionProvider"], False, True),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], False, False),
        (["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"], True, False),
        (["QNNExecutionProvider", "CPUExecutionProvider"], False, True),
        (["UnknownExecutionProvider", "CPUExecutionProvider"], False, False),
    ],
)
def test_each_provider_keeps_its_own_kind_of_form(
    tmp_path: Path, providers: list[str], folder: bool, file: bool
) -> None:
    begun = Compilation.begin(b"model", providers, LoadOptions(compiled=str(tmp_path)))
    assert (begun.folder is not None, begun.active) == (folder, file)
    options = onnxruntime.SessionOptions()
    assert begun.prepare(options) is None
    context = "QNNExecutionProvider" in providers
    assert bool(options.optimized_model_filepath) == (file and not context)
    if context:
        assert options.get_session_config_entry("ep.context_enable") == "1"


def test_an_unfinished_form_is_not_taken(tmp_path: Path) -> None:
    load = LoadOptions(compiled=str(tmp_path))
    options = onnxruntime.SessionOptions()
    begun = Compilation.begin(b"model", ["CPUExecutionProvider"], load)
    begun.prepare(options)
    Path(options.optimized_model_filepath).write_bytes(b"half a gra")
    begun.end()
    assert Compilation.begin(b"model", ["CPUExecutionProvider"], load).prepare(options) is None
    assert list(tmp_path.iterdir()) == []
    begun.prepare(options)
    Path(options.optimized_model_filepath).write_bytes(b"graph")
    begun.keep()
    assert Compilation.begin(b"model", ["CPUExecutionProvider"], load).prepare(options) == b"graph"


def test_forms_of_other_providers_memory_and_processors_are_not_taken(
    tmp_path: Path, sources: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    run(tmp_path, gpu_memory_bytes=1 << 30)
    # The card was moved to another board, whose CPU cannot do what the graph was optimised for.
    monkeypatch.setattr(onnx_options, "processor", lambda: "aarch64 neon")
    run(tmp_path)
    assert sources == [graphs.onnx_dense()] * 3
    folders = {
        str(Compilation.begin(b"model", [name], LoadOptions(compiled=str(tmp_path))).folder)
        for name in ("TensorrtExecutionProvider", "OpenVINOExecutionProvider")
    }
    assert len(folders) == 2


def test_processors_differ_by_what_they_can_do(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    file = tmp_path / "proc/cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: sse avx2 \n")
    avx2 = processor(tmp_path)
    file.write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    arm = processor(tmp_path)
    assert avx2.endswith("sse avx2") and arm.endswith("fp asimd")
    assert processor(tmp_path / "nowhere") == f"{platform.machine()} "


def test_engines_built_for_later_shapes_are_kept(tmp_path: Path) -> None:
    load = LoadOptions(compiled=str(tmp_path))
    begun = Compilation.begin(b"model", ["TensorrtExecutionProvider"], load)
    begun.end()
    assert begun.folder is not None
    (begun.folder / "engine").write_bytes(b"for two rows")
    begun.ran({"x": X})
    again = Compilation.begin(b"model", ["TensorrtExecutionProvider"], load)
    assert again.folder is not None
    assert [path.name for path in again.folder.iterdir()] == ["engine"]
