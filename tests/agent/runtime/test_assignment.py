"""What really runs a model, by onnxruntime's and LiteRT's own word."""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from ai_edge_litert.schema_py_generated import TensorType
from onnx import TensorProto, helper

from agent.runtime import assignment
from agent.runtime.assignment import decide, profiled, provider_of
from agent.runtime.delegates import LIBRARIES, Library
from agent.runtime.onnx import OnnxModel
from agent.runtime.port import LoadOptions
from agent.runtime.tflite import TfliteModel
from edgeward.errors import RuntimeFault
from tests.agent.runtime import graphs

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
ASKED = [TENSORRT, CUDA, CPU]


@pytest.mark.parametrize(
    ("nodes", "used"),
    [
        ([], CPU),
        ([(CPU, "Conv")], CPU),
        ([(CUDA, "Conv"), (CPU, "Shape"), (CPU, "Gather"), (CPU, "Concat")], CUDA),
        ([(CUDA, "Conv"), (CPU, "NonMaxSuppression"), (CPU, "TopK")], CPU),
        ([(CUDA, "Conv"), (CPU, "TopK")], CUDA),
        ([(TENSORRT, "Conv"), (CUDA, "Conv")], TENSORRT),
        ([(CUDA, "Conv"), (CUDA, "Relu"), (TENSORRT, "Conv")], CUDA),
        # An accelerator that only moves shapes does run nodes, but the work is elsewhere.
        ([(CUDA, "Reshape"), (CPU, "Conv"), (CPU, "Conv")], CPU),
    ],
)
def test_most_nodes_decide(nodes: list[tuple[str, str]], used: str) -> None:
    assert decide(nodes, ASKED) == used


class Session:
    """A session whose accelerator is registered and gets `accelerated` of the nodes."""

    def __init__(self, accelerated: bool) -> None:
        self._name = CUDA if accelerated else CPU

    def get_providers(self) -> list[str]:
        return [CUDA, CPU]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        name = self._name

        class Node:
            op_type = "Conv"

        class Part:
            ep_name = name

            @staticmethod
            def get_nodes() -> list[Any]:
                return [Node()]

        return [Part()]


def test_a_registered_provider_without_nodes_is_not_claimed() -> None:
    assert provider_of(Session(accelerated=True), b"", ASKED) == CUDA
    assert provider_of(Session(accelerated=False), b"", ASKED) == CPU


def test_what_cannot_be_shown_is_not_claimed() -> None:
    class Silent(Session):
        def get_provider_graph_assignment_info(self) -> list[Any]:
            raise RuntimeError("not recorded")

    assert provider_of(Silent(accelerated=True), b"", ASKED) == CPU


def test_the_session_is_asked_to_record_the_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def ask(session: Any, content: bytes, asked: list[str]) -> str:
        seen.extend(
            (part.ep_name, node.op_type)
            for part in session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        )
        return CPU

    monkeypatch.setattr("agent.runtime.onnx.provider_of", ask)
    OnnxModel(graphs.onnx_dense(), LoadOptions())
    assert seen
    assert {name for name, _ in seen} == {CPU}


def test_older_releases_are_asked_by_a_profiled_run(monkeypatch: pytest.MonkeyPatch) -> None:
    content = graphs.onnx_two()
    session = onnxruntime.InferenceSession(content, providers=[CPU])
    assert sorted(profiled(content, session)) == [(CPU, "Add"), (CPU, "Mul")]

    class Older(Session):
        get_provider_graph_assignment_info = None  # type: ignore[assignment]

    monkeypatch.setattr(assignment, "profiled", lambda content, like: [(CUDA, "Conv")])
    assert provider_of(Older(accelerated=True), b"", ASKED) == CUDA


def test_a_profiled_run_feeds_text() -> None:
    content = graphs.onnx_same(TensorProto.STRING)
    session = onnxruntime.InferenceSession(content, providers=[CPU])
    assert profiled(content, session) == [(CPU, "Identity")]


def test_onnx_says_cpu_when_cuda_was_asked_of_a_build_without_it(caplog: pytest.LogCaptureFixture) -> None:
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this build has CUDA")
    assert OnnxModel(graphs.onnx_dense(), LoadOptions(providers=(CUDA,))).provider == CPU


def test_threads_are_as_asked_and_do_not_spin() -> None:
    options = OnnxModel(graphs.onnx_dense(), LoadOptions(threads=3))._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_the_session_may_not_turn_to_other_providers_while_it_runs() -> None:
    """onnxruntime does so after some faults, once, with a printed line only."""
    assert not OnnxModel(graphs.onnx_dense(), LoadOptions())._session._enable_fallback


def test_raw_values_may_lie_in_any_order() -> None:
    """They are handed over by address, so their order in memory counts."""
    x = np.arange(6, dtype=np.uint16).reshape(2, 3).T
    assert not x.flags.c_contiguous
    for model in (
        OnnxModel(graphs.onnx_same(TensorProto.BFLOAT16), LoadOptions()),
        TfliteModel(graphs.tflite_same(TensorType.BFLOAT16), LoadOptions()),
    ):
        np.testing.assert_array_equal(model.infer({"x": x})["y"], x)


def test_outputs_that_are_no_tensors_are_refused_by_name() -> None:
    sequence = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        [helper.make_node("SequenceConstruct", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [sequence],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(RuntimeFault, match=r"output y is a seq\(tensor\(float\)\), not a tensor"):
        OnnxModel(model.SerializeToString(), LoadOptions())


def test_a_model_cannot_read_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_bytes(np.ones(3, np.float32).tobytes())
    monkeypatch.chdir(tmp_path)
    outside = TensorProto(name="b", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    for name, value in (("location", "secret"), ("length", "12")):
        entry = outside.external_data.add()
        entry.key, entry.value = name, value
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 3])],
        [outside],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(RuntimeFault, match="refused the model"):
        OnnxModel(model.SerializeToString(), LoadOptions())


def test_text_that_is_no_utf8_is_named() -> None:
    model = OnnxModel(graphs.onnx_same(TensorProto.STRING), LoadOptions())
    with pytest.raises(RuntimeFault, match="input x: element 1 is not UTF-8"):
        model.infer({"x": np.array([[b"a", b"\xff"]], object)})
    with pytest.raises(RuntimeFault, match="input x: element 0: expected text, got float"):
        model.infer({"x": np.array([[1.5, "a"]], object)})


@pytest.mark.parametrize("name", list(LIBRARIES))
def test_a_delegate_that_is_not_installed_is_a_clear_fault(name: str) -> None:
    library = LIBRARIES[name]
    with pytest.raises(RuntimeFault, match=f"delegate {name}: {library.file}") as fault:
        TfliteModel(graphs.tflite_dense(), LoadOptions(providers=(name,)))
    assert library.hint in str(fault.value)


def test_an_unknown_delegate_is_a_clear_fault() -> None:
    with pytest.raises(RuntimeFault, match=r"no delegate 'NPU' \(known: EdgeTPU, GPU, NNAPI, XNNPACK\)"):
        TfliteModel(graphs.tflite_dense(), LoadOptions(providers=("NPU",)))


def test_lite_falls_to_the_cpu_where_that_was_named_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = TfliteModel(graphs.tflite_dense(), LoadOptions(providers=("EdgeTPU", "XNNPACK")))
    assert model.provider == "XNNPACK"
    assert "libedgetpu.so.1" in caplog.text


def test_lite_does_not_claim_xnnpack_for_what_it_leaves_alone() -> None:
    assert TfliteModel(graphs.tflite_same(TensorType.INT64), LoadOptions()).provider == "CPU"


#: TfliteDelegate's layout (tensorflow/lite/core/c/common.h); Prepare that claims no node.
_IDLE = """
#include <stdlib.h>
typedef struct D { void *data; int (*prepare)(void *, struct D *); void *rest[8]; } D;
static int prepare(void *context, D *delegate) { return 0; }
D *tflite_plugin_create_delegate(char **k, char **v, size_t n, void (*report)(const char *)) {
    if (getenv("EDGEWARD_TEST_NO_DEVICE")) { report("no device"); return NULL; }
    D *made = calloc(1, sizeof(D)); made->prepare = prepare; return made;
}
void tflite_plugin_destroy_delegate(D *delegate) { free(delegate); }
"""


@pytest.fixture
def idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EdgeTPU library that starts, and takes nothing of any model."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "idle.c").write_text(_IDLE)
    built = tmp_path / "libidle.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", built, tmp_path / "idle.c"], check=True)
    monkeypatch.setitem(LIBRARIES, "EdgeTPU", Library(str(built), ""))


@pytest.mark.usefixtures("idle")
def test_a_delegate_that_takes_nothing_is_not_claimed() -> None:
    """XNNPACK's own part of the model must not be taken for the delegate's."""
    with pytest.raises(RuntimeFault, match="EdgeTPU takes no part of the model"):
        TfliteModel(graphs.tflite_dense(), LoadOptions(providers=("EdgeTPU",)))
    model = TfliteModel(graphs.tflite_dense(), LoadOptions(providers=("EdgeTPU", "XNNPACK")))
    assert model.provider == "XNNPACK"


@pytest.mark.usefixtures("idle")
def test_a_delegate_without_its_device_is_a_clear_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEWARD_TEST_NO_DEVICE", "1")
    with pytest.raises(RuntimeFault, match=r"delegate EdgeTPU: .* refused to start: .*no device"):
        TfliteModel(graphs.tflite_dense(), LoadOptions(providers=("EdgeTPU",)))
