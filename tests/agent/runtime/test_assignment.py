"""What really runs a model, by onnxruntime's and LiteRT's own word."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from ai_edge_litert.schema_py_generated import TensorType
from onnx import TensorProto, helper

from agent.runtime import assignment, onnx
from agent.runtime.assignment import Placement, decide, placement_of, profiled
from agent.runtime.delegates import LIBRARIES, Library
from agent.runtime.onnx import OnnxModel
from agent.runtime.port import LoadOptions
from agent.runtime.tflite import TfliteModel
from edgeward.errors import RuntimeFault
from tests.agent.runtime import graphs

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
ASKED = [TENSORRT, CUDA, CPU]


@pytest.mark.parametrize(
    ("nodes", "used", "left"),
    [
        ([], CPU, "it runs no node of the model"),
        ([(CPU, "Conv")], CPU, "it runs no node of the model"),
        ([(CPU, "Shape")], CPU, "it runs no node of the model"),
        ([(CUDA, "Conv"), (CPU, "Shape"), (CPU, "Gather"), (CPU, "Mul")], CUDA, ""),
        ([(CUDA, "Conv"), (CPU, "TopK"), (CPU, "Mul")], CUDA, "1 nodes run on the CPU: 1 x TopK"),
        ([(CUDA, "Conv")] + [(CPU, "TopK")] * 2, CPU, "2 nodes run on the CPU: 2 x TopK"),
        ([(TENSORRT, "Conv"), (CUDA, "Conv")], TENSORRT, ""),
        ([(CUDA, "Conv"), (CUDA, "Relu"), (TENSORRT, "Conv")], CUDA, ""),
        ([(CUDA, "Identity")], CUDA, ""),
        # An accelerator that only moves shapes does run nodes, but the work is elsewhere.
        ([(CUDA, "Reshape"), (CPU, "Conv")], CPU, "it runs no node of the model"),
    ],
)
def test_most_nodes_decide_and_shape_work_does_not_count(
    nodes: list[tuple[str, str]], used: str, left: str
) -> None:
    assert decide(nodes, ASKED) == Placement(used, left)


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
    assert placement_of(Session(accelerated=True), b"", ASKED) == Placement(CUDA)
    assert placement_of(Session(accelerated=False), b"", ASKED).provider == CPU


def test_what_cannot_be_shown_is_not_claimed() -> None:
    class Silent(Session):
        def get_provider_graph_assignment_info(self) -> list[Any]:
            raise RuntimeError("not recorded")

    assert placement_of(Silent(accelerated=True), b"", ASKED).provider == CPU


def test_the_session_is_asked_to_record_the_assignment() -> None:
    parts = OnnxModel(graphs.onnx_dense(), LoadOptions())._session.get_provider_graph_assignment_info()
    assert {part.ep_name for part in parts if part.get_nodes()} == {CPU}


def test_older_releases_are_asked_by_a_profiled_run(monkeypatch: pytest.MonkeyPatch) -> None:
    content = graphs.onnx_two()
    session = onnxruntime.InferenceSession(content, providers=[CPU])
    assert sorted(profiled(content, session)) == [(CPU, "Add"), (CPU, "Mul")]

    class Older(Session):
        get_provider_graph_assignment_info = None  # type: ignore[assignment]

    monkeypatch.setattr(assignment, "profiled", lambda content, like: [(CUDA, "Conv")])
    assert placement_of(Older(accelerated=True), b"", ASKED) == Placement(CUDA)


def test_a_profiled_run_feeds_text() -> None:
    content = graphs.onnx_same(TensorProto.STRING)
    session = onnxruntime.InferenceSession(content, providers=[CPU])
    assert profiled(content, session) == [(CPU, "Identity")]


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this build has CUDA")
def test_a_provider_that_is_not_in_this_build_is_named_and_not_replaced() -> None:
    with pytest.raises(RuntimeFault, match=f"none of {CUDA} is in this onnxruntime, which has .*{CPU}"):
        OnnxModel(graphs.onnx_dense(), LoadOptions(providers=(CUDA,)))
    assert OnnxModel(graphs.onnx_dense(), LoadOptions(providers=(CUDA, CPU))).provider == CPU


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """CUDA and TensorRT seem to be in this build; the sessions opened, by their providers."""
    opened: list[list[str]] = []
    real = onnxruntime.InferenceSession

    def session(source: bytes, options: Any, providers: list[tuple[str, Any]], enable_fallback: int) -> Any:
        opened.append([name for name, _ in providers])
        return real(source, options, providers=[CPU], enable_fallback=enable_fallback)

    monkeypatch.setattr(onnx.onnxruntime, "get_available_providers", lambda: ASKED)
    monkeypatch.setattr(onnx.onnxruntime, "InferenceSession", session)
    return opened


def place(monkeypatch: pytest.MonkeyPatch, *placements: Placement) -> None:
    left = iter(placements)
    monkeypatch.setattr(onnx, "placement_of", lambda session, content, asked: next(left))


def test_an_accelerator_that_leaves_work_to_the_cpu_is_refused_unless_the_cpu_was_asked_for(
    accelerated: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Placement(CUDA, "1 nodes run on the CPU: 1 x TopK")
    place(monkeypatch, part)
    with pytest.raises(RuntimeFault, match=f"{CUDA}: 1 nodes run on the CPU: 1 x TopK"):
        OnnxModel(graphs.onnx_dense(), LoadOptions(providers=(CUDA,)))
    place(monkeypatch, part)
    assert OnnxModel(graphs.onnx_dense(), LoadOptions(providers=(CUDA, CPU))).provider == f"{CUDA}+{CPU}"
    assert accelerated == [[CUDA, CPU], [CUDA, CPU]]


def test_an_accelerator_that_does_not_run_the_model_gives_way_to_the_next_one(
    accelerated: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, Placement(CPU, "it runs no node of the model"), Placement(CUDA))
    assert OnnxModel(graphs.onnx_dense(), LoadOptions(providers=(TENSORRT, CUDA))).provider == CUDA
    # What TensorRT does not take would have gone to CUDA, not to the CPU.
    assert accelerated == [[TENSORRT, CUDA, CPU], [CUDA, CPU]]
    place(monkeypatch, *[Placement(CPU, "it runs no node of the model")] * 2)
    assert OnnxModel(graphs.onnx_dense(), LoadOptions(providers=(TENSORRT, CUDA, CPU))).provider == CPU
    assert accelerated[-1] == [CPU]


def test_threads_are_as_asked_and_do_not_spin() -> None:
    options = OnnxModel(graphs.onnx_dense(), LoadOptions(threads=3))._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_the_session_may_not_turn_to_other_providers_while_it_runs() -> None:
    """onnxruntime does so after some faults, once, with a printed line only."""
    assert not OnnxModel(graphs.onnx_dense(), LoadOptions())._session._enable_fallback


def test_nor_where_onnxruntime_does_not_know_that_option(monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnxruntime.InferenceSession

    def session(source: bytes, options: Any, providers: Any, enable_fallback: int) -> Any:
        assert enable_fallback == 0
        return real(source, options, providers=providers)

    monkeypatch.setattr(onnx.onnxruntime, "InferenceSession", session)
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
    with pytest.raises(RuntimeFault, match="does not run the model"):
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


#: As in tensorflow/lite/core/c/common.h, as far as it is used: a delegate that claims the first nodes of a graph.
_DELEGATE = """
#include <stdlib.h>
typedef struct { int size; int data[8]; } Nodes;
typedef struct { void *init, *free; int (*prepare)(void *, void *), (*invoke)(void *, void *); void *rest[12]; }
    Kernel;
typedef struct C { void *before[8]; int (*replace)(struct C *, Kernel, const Nodes *, void *); } Context;
typedef struct D { void *data; int (*prepare)(Context *, struct D *); void *rest[8]; } Delegate;
static int nothing(void *context, void *node) { return 0; }
static int prepare(Context *context, Delegate *delegate) {
    Kernel kernel = {.prepare = nothing, .invoke = nothing};
    Nodes nodes = {atoi(getenv("EDGEWARD_TEST_TAKES")), {0, 1, 2, 3}};
    return nodes.size ? context->replace(context, kernel, &nodes, delegate) : 0;
}
Delegate *tflite_plugin_create_delegate(char **k, char **v, size_t n, void (*report)(const char *)) {
    if (atoi(getenv("EDGEWARD_TEST_TAKES")) < 0) { report("no device"); return NULL; }
    Delegate *made = calloc(1, sizeof(Delegate)); made->prepare = prepare; return made;
}
void tflite_plugin_destroy_delegate(Delegate *delegate) { free(delegate); }
"""


@pytest.fixture(scope="session")
def delegate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("delegate")
    (folder / "made.c").write_text(_DELEGATE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libmade.so", folder / "made.c"], check=True)
    return folder / "libmade.so"


@pytest.fixture
def takes(delegate: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """An EdgeTPU library that takes so many nodes of a model; -1: it finds no device."""
    monkeypatch.setitem(LIBRARIES, "EdgeTPU", Library(str(delegate), ""))
    return lambda nodes: monkeypatch.setenv("EDGEWARD_TEST_TAKES", str(nodes))


def on_edge_tpu(content: bytes, *others: str) -> str:
    return TfliteModel(content, LoadOptions(providers=("EdgeTPU", *others))).provider


def test_a_delegate_that_takes_nothing_is_not_claimed(takes: Callable[[int], None]) -> None:
    """XNNPACK's own part of the model must not be taken for the delegate's."""
    takes(0)
    with pytest.raises(RuntimeFault, match="EdgeTPU takes no part of the model"):
        on_edge_tpu(graphs.tflite_dense())
    assert on_edge_tpu(graphs.tflite_dense(), "XNNPACK") == "XNNPACK"


def test_a_delegate_that_takes_a_part_is_refused_unless_the_cpu_was_asked_for(
    takes: Callable[[int], None],
) -> None:
    takes(1)
    with pytest.raises(RuntimeFault, match="EdgeTPU leaves to the CPU: MUL"):
        on_edge_tpu(graphs.tflite_two())
    assert on_edge_tpu(graphs.tflite_two(), "XNNPACK") == "EdgeTPU+CPU"


def test_a_delegate_that_takes_all_is_claimed(takes: Callable[[int], None]) -> None:
    takes(2)
    assert on_edge_tpu(graphs.tflite_two()) == "EdgeTPU"


def test_the_ends_of_a_model_may_stay_on_the_cpu(takes: Callable[[int], None]) -> None:
    takes(1)
    assert on_edge_tpu(graphs.tflite_dense_reshaped()) == "EdgeTPU"


def test_an_accelerator_takes_the_shapes_that_it_was_compiled_for_only(takes: Callable[[int], None]) -> None:
    takes(1)
    x = np.ones((2, 3), np.float32)
    cpu = TfliteModel(graphs.tflite_dense(1), LoadOptions())
    np.testing.assert_allclose(cpu.infer({"x": x})["y"], x @ graphs.WEIGHTS + graphs.BIAS, rtol=1e-6)
    model = TfliteModel(graphs.tflite_dense(1), LoadOptions(providers=("EdgeTPU",)))
    with pytest.raises(RuntimeFault, match=r"input x: expected shape \[1, 3\], got \[2, 3\]"):
        model.infer({"x": x})


def test_a_delegate_without_its_device_is_a_clear_fault(takes: Callable[[int], None]) -> None:
    takes(-1)
    with pytest.raises(RuntimeFault, match=r"delegate EdgeTPU: .* refused to start: .*no device"):
        on_edge_tpu(graphs.tflite_dense())
