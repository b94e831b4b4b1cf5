"""One contract for every adapter, and for every way to run it: alone, in a worker, in the agent's process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from agent.runtime.engine import Engine
from agent.runtime.port import Arrays, LoadOptions, load
from edgeward.errors import RuntimeFault
from edgeward.wire.package import Runtime
from edgeward.wire.slots import SlotPolicy
from models.recipes.tflite import TfliteGraph

RNG = np.random.default_rng(7)
WEIGHTS, BIAS = RNG.normal(size=(3, 2)).astype(np.float32), RNG.normal(size=2).astype(np.float32)


def onnx_model(
    nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], constants: list[Any]
) -> bytes:
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(name, *info) for name, info in inputs.items()],
        [helper.make_tensor_value_info(name, *info) for name, info in outputs.items()],
        constants,
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    return bytes(made.SerializeToString())


def dense_onnx() -> bytes:
    constants = [onnx.numpy_helper.from_array(WEIGHTS, "w"), onnx.numpy_helper.from_array(BIAS, "b")]
    return onnx_model(
        [helper.make_node("Gemm", ["x_0", "w", "b"], ["y"])],
        {"x_0": (TensorProto.FLOAT, [None, 3])},
        {"y": (TensorProto.FLOAT, [None, 2])},
        constants,
    )


def dense_tflite() -> bytes:
    graph = TfliteGraph("dense")
    source = graph.input("x", 3)
    return graph.finish("y", graph.dense(source, WEIGHTS, BIAS, tanh=False))


DENSE: dict[Runtime, Callable[[], bytes]] = {"onnx": dense_onnx, "tflite": dense_tflite}
Open = Callable[[Runtime, bytes], Any]


@pytest.fixture(params=["adapter", "worker", "in-process"])
def opened(request: pytest.FixtureRequest) -> Iterator[Open]:
    if request.param == "adapter":
        yield lambda runtime, content: load(runtime, content, LoadOptions())
        return
    engine = Engine()
    engine.start()
    isolation = "process" if request.param == "worker" else "in-process"
    yield lambda runtime, content: engine.open(runtime, content, "m:1", SlotPolicy(isolation=isolation))
    engine.stop()


@pytest.fixture(params=["onnx", "tflite"])
def model(request: pytest.FixtureRequest, opened: Open) -> Any:
    return opened(request.param, DENSE[request.param]())


def rows(count: int) -> np.ndarray:
    return RNG.normal(size=(count, 3)).astype(np.float32)


def test_it_states_its_signature_and_where_it_runs(model: Any) -> None:
    (x,), (y,) = model.inputs, model.outputs
    assert (x.name, x.dtype, x.shape) == ("x_0", "float32", [-1, 3])
    assert (y.dtype, y.shape) == ("float32", [-1, 2])
    assert model.provider in ("CPUExecutionProvider", "XNNPACK")


def test_it_computes_what_the_reference_computes_for_any_number_of_rows(model: Any) -> None:
    for count in (1, 5, 1, 32, 5):
        x = rows(count)
        (got,) = model.infer({"x_0": x}).values()
        assert got.dtype == np.float32 and got.shape == (count, 2)
        np.testing.assert_allclose(got, x @ WEIGHTS + BIAS, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({}, "input x_0 is missing, expected float32"),
        ({"x_0": np.zeros((1, 3))}, "input x_0 is float64, expected float32"),
        ({"x_0": np.zeros((1, 4), np.float32)}, r"input x_0 has shape \[1, 4\], expected \[-1, 3\]"),
        ({"x_0": np.zeros(3, np.float32)}, r"input x_0 has shape \[3\], expected \[-1, 3\]"),
        ({"x_0": np.zeros((1, 3), np.float32), "z": np.zeros(1)}, "unknown input z, the model takes x_0"),
        ({"x_0": np.array([["a", "b", "c"]], object)}, "input x_0 is bytes, expected float32"),
    ],
)
def test_a_request_that_does_not_fit_names_the_tensor_and_costs_nothing_else(
    model: Any, bad: Arrays, says: str
) -> None:
    with pytest.raises(RuntimeFault, match=says):
        model.infer(bad)
    x = rows(2)
    (got,) = model.infer({"x_0": x}).values()
    np.testing.assert_allclose(got, x @ WEIGHTS + BIAS, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("runtime", ["onnx", "tflite"])
@pytest.mark.parametrize(
    "content", [b"", b"rubbish", b"\x08\x08\x12\x04more", b"\x1c\x00\x00\x00TFL3" + bytes(64)]
)
def test_what_is_no_model_is_refused(opened: Open, runtime: Runtime, content: bytes) -> None:
    with pytest.raises(RuntimeFault):
        opened(runtime, content)
    with pytest.raises(RuntimeFault):
        opened(runtime, DENSE["tflite" if runtime == "onnx" else "onnx"]())


def test_an_answer_stays_what_it_is_when_the_model_answers_again(model: Any) -> None:
    first = next(iter(model.infer({"x_0": rows(1)}).values()))
    kept = first.copy()
    model.infer({"x_0": rows(1)})
    assert np.array_equal(first, kept)


# --- what only ONNX has ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (TensorProto.FLOAT16, "float16"), (TensorProto.DOUBLE, "float64"), (TensorProto.INT8, "int8"),
        (TensorProto.INT16, "int16"), (TensorProto.INT32, "int32"), (TensorProto.INT64, "int64"),
        (TensorProto.UINT8, "uint8"), (TensorProto.UINT16, "uint16"), (TensorProto.UINT32, "uint32"),
        (TensorProto.UINT64, "uint64"), (TensorProto.BOOL, "bool"), (TensorProto.BFLOAT16, "bfloat16"),
    ],
)  # fmt: skip
def test_every_type_crosses_unchanged(opened: Open, kind: int, dtype: str) -> None:
    model = opened(
        "onnx",
        onnx_model(
            [helper.make_node("Identity", ["x"], ["y"])], {"x": (kind, [None])}, {"y": (kind, [None])}, []
        ),
    )
    assert model.inputs[0].dtype == model.outputs[0].dtype == dtype
    raw = "uint16" if dtype == "bfloat16" else dtype
    x = (
        RNG.integers(0, 2, size=5).astype(raw)
        if dtype == "bool"
        else RNG.integers(0, 100, size=5).astype(raw)
    )
    got = model.infer({"x": x})["y"]
    assert got.dtype == x.dtype and got.tolist() == x.tolist()


def test_texts_cross_as_utf8(opened: Open) -> None:
    text = (TensorProto.STRING, [None, None])
    model = opened(
        "onnx", onnx_model([helper.make_node("Identity", ["x"], ["y"])], {"x": text}, {"y": text}, [])
    )
    x = np.array([["Größe", ""], ["a" * 1000, "b"]], object)
    got = model.infer({"x": x})["y"]
    as_text = [item.decode() if isinstance(item, bytes) else item for item in got.reshape(-1).tolist()]
    assert got.shape == (2, 2) and as_text == x.reshape(-1).tolist()
    with pytest.raises(RuntimeFault, match="not UTF-8"):
        model.infer({"x": np.array([[b"\xff"]], object)})


def test_several_inputs_and_outputs_keep_their_names(opened: Open) -> None:
    number = (TensorProto.FLOAT, [None])
    nodes = [helper.make_node("Sub", ["a", "b"], ["less"]), helper.make_node("Add", ["a", "b"], ["more"])]
    model = opened(
        "onnx", onnx_model(nodes, {"a": number, "b": number}, {"more": number, "less": number}, [])
    )
    one, two = np.array([5], np.float32), np.array([3], np.float32)
    got = model.infer({"b": two, "a": one})
    assert {name: values.tolist() for name, values in got.items()} == {"more": [8], "less": [2]}


def test_an_optimised_graph_is_kept_used_again_and_not_believed_blindly(tmp_path: Path) -> None:
    options = LoadOptions(compiled=str(tmp_path / "compiled"))
    x = rows(3)
    want = x @ WEIGHTS + BIAS
    for change in ("", "again", "changed", "gone"):
        files = sorted((tmp_path / "compiled").glob("*.onnx"))
        if change == "changed":
            (kept,) = files
            kept.write_bytes(kept.read_bytes()[:-1] + b"\x00")
        elif change == "gone":
            files[0].unlink()
        np.testing.assert_allclose(
            load("onnx", dense_onnx(), options).infer({"x_0": x})["y"], want, rtol=1e-5, atol=1e-5
        )
        assert len(sorted((tmp_path / "compiled").glob("*.onnx"))) == 1
    assert (tmp_path / "compiled").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("runtime", ["onnx", "tflite"])
def test_big_endian_numbers_are_refused_or_turned_never_misread(runtime: Runtime) -> None:
    x = rows(2)
    turned = x.astype(">f4")
    with pytest.raises(RuntimeFault, match="big-endian"):
        load(runtime, DENSE[runtime](), LoadOptions()).infer({"x_0": turned})
    engine = Engine()
    engine.start()
    try:
        (got,) = engine.open(runtime, DENSE[runtime](), "m:1").infer({"x_0": turned}).values()
    finally:
        engine.stop()
    np.testing.assert_allclose(got, x @ WEIGHTS + BIAS, rtol=1e-5, atol=1e-5)
