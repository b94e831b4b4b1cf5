"""One contract for every adapter, used directly, in a worker process and in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from ai_edge_litert.schema_py_generated import TensorType
from onnx import TensorProto

from agent.runtime.engine import Engine
from agent.runtime.port import Arrays, BadInput, LoadOptions, load
from edgeward.errors import RuntimeFault
from edgeward.wire.package import TensorSpec
from edgeward.wire.slots import SlotPolicy
from tests.agent.runtime import graphs

RUNTIMES = ["onnx", "tflite"]
WAYS = ["direct", "process", "in-process"]
DENSE = {"onnx": graphs.onnx_dense, "tflite": graphs.tflite_dense}
TWO = {"onnx": graphs.onnx_two, "tflite": graphs.tflite_two}
PROVIDER = {"onnx": "CPUExecutionProvider", "tflite": "XNNPACK"}

#: dtype -> the types of ONNX and of TFLite.
DTYPES = {
    "float32": (TensorProto.FLOAT, TensorType.FLOAT32),
    "float64": (TensorProto.DOUBLE, TensorType.FLOAT64),
    "float16": (TensorProto.FLOAT16, TensorType.FLOAT16),
    "bfloat16": (TensorProto.BFLOAT16, TensorType.BFLOAT16),
    "int8": (TensorProto.INT8, TensorType.INT8),
    "int16": (TensorProto.INT16, TensorType.INT16),
    "int32": (TensorProto.INT32, TensorType.INT32),
    "int64": (TensorProto.INT64, TensorType.INT64),
    "uint8": (TensorProto.UINT8, TensorType.UINT8),
    "uint16": (TensorProto.UINT16, TensorType.UINT16),
    "uint32": (TensorProto.UINT32, TensorType.UINT32),
    "uint64": (TensorProto.UINT64, TensorType.UINT64),
    "bool": (TensorProto.BOOL, TensorType.BOOL),
    "bytes": (TensorProto.STRING, TensorType.STRING),
}

Opened = Callable[[bytes], Any]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine()
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=WAYS)
def opened(request: pytest.FixtureRequest, runtime: Any, engine: Engine) -> Iterator[Opened]:
    """Opens a model the way that the test is about."""
    runners: list[Any] = []

    def open_model(content: bytes) -> Any:
        if request.param == "direct":
            return load(runtime, content, LoadOptions())
        runners.append(engine.open(runtime, content, "test", SlotPolicy(isolation=request.param)))
        return runners[-1]

    yield open_model
    for runner in runners:
        runner.stop()


def rows(count: int, width: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32)


def same(runtime: Any, dtype: str) -> bytes:
    onnx, tflite = DTYPES[dtype]
    return graphs.onnx_same(onnx) if runtime == "onnx" else graphs.tflite_same(tflite)


def test_says_what_it_takes_gives_and_runs_on(runtime: Any, opened: Opened) -> None:
    model = opened(DENSE[runtime]())
    assert model.inputs == [TensorSpec("x", "float32", [-1, 3])]
    assert model.outputs == [TensorSpec("y", "float32", [-1, 2])]
    assert model.provider == PROVIDER[runtime]


def test_equals_the_reference_for_any_number_of_rows(runtime: Any, opened: Opened) -> None:
    model = opened(DENSE[runtime]())
    for count in (1, 5, 64, 5, 1, 3000):
        x = rows(count)
        result = model.infer({"x": x})
        assert list(result) == ["y"]
        assert result["y"].dtype == np.float32
        np.testing.assert_allclose(result["y"], x @ graphs.WEIGHTS + graphs.BIAS, rtol=1e-5, atol=1e-5)


def test_no_rows_give_no_rows(runtime: Any, opened: Opened) -> None:
    assert opened(DENSE[runtime]()).infer({"x": rows(0)})["y"].shape == (0, 2)


def test_several_inputs_and_outputs_keep_their_names(runtime: Any, opened: Opened) -> None:
    model = opened(TWO[runtime]())
    a, b = rows(4), rows(4) + 2
    # In another order than the model's.
    result = model.infer({"b": b, "a": a})
    np.testing.assert_allclose(result["sum"], a + b, rtol=1e-6)
    np.testing.assert_allclose(result["product"], a * b, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_comes_back_as_it_went_in(runtime: Any, opened: Opened, dtype: str) -> None:
    model = opened(same(runtime, dtype))
    assert model.inputs == [TensorSpec("x", dtype, [-1, 2])]
    assert model.outputs == [TensorSpec("y", dtype, [-1, 2])]
    if dtype == "bytes":
        x = np.array([["", "grün"], ["a\0b", "x" * 1000]], object)
        want = [[b"", "grün".encode()], [b"a\0b", b"x" * 1000]]
        assert model.infer({"x": x})["y"].tolist() == want
        assert model.infer({"x": np.array(want, object)})["y"].tolist() == want
        return
    carrier = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    if carrier.kind in "iu":
        info = np.iinfo(carrier)
        x = np.array([[info.min, info.max], [0, 1], [0x3F80 % info.max, 7]], carrier)
    elif carrier.kind == "b":
        x = np.array([[True, False]] * 3)
    else:
        x = np.array([[np.nan, np.inf], [-0.0, 1.5], [-np.inf, np.finfo(carrier).max]], carrier)
    y = model.infer({"x": x})["y"]
    assert y.dtype == carrier
    assert y.tobytes() == x.tobytes()


def test_quantised_models_take_and_give_their_raw_integers(runtime: Any, opened: Opened) -> None:
    model = opened(graphs.onnx_quantised() if runtime == "onnx" else graphs.tflite_quantised())
    assert (model.inputs[0].dtype, model.outputs[0].dtype) == ("int8", "int8")
    x = np.random.default_rng(7).integers(-128, 128, (64, 3)).astype(np.int8)
    y = model.infer({"x": x})["y"]
    want = graphs.quantised_reference(x)
    assert y.dtype == np.int8 and len(np.unique(want)) > 50
    # Half a step for rounding, and a little for the runtimes' fixed-point multipliers.
    assert np.abs(y - want).max() <= 0.51
    with pytest.raises(RuntimeFault, match="input x: expected int8, got uint8"):
        model.infer({"x": x.view(np.uint8)})


@pytest.mark.parametrize("order", ["transposed", "strided", "big-endian", "read-only"])
def test_memory_may_lie_in_any_order(runtime: Any, opened: Opened, order: str) -> None:
    x = rows(3)
    given = {
        "transposed": np.asfortranarray(x),
        "strided": np.repeat(x, 2, axis=0)[::2],
        "big-endian": x.astype(">f4"),
        "read-only": np.frombuffer(x.tobytes(), np.float32).reshape(3, 3),
    }[order]
    result = opened(DENSE[runtime]()).infer({"x": given})
    np.testing.assert_allclose(result["y"], x @ graphs.WEIGHTS + graphs.BIAS, rtol=1e-5, atol=1e-5)


BAD: dict[str, tuple[Arrays, list[str]]] = {
    "missing": ({"a": rows(2)}, ["input b", "missing", "float32 [?, 3]"]),
    "nothing": ({}, ["input a", "missing"]),
    "unknown": ({"a": rows(2), "b": rows(2), "c": rows(2)}, ["input c", "unknown", "a, b"]),
    "wrong dtype": (
        {"a": rows(2).astype(np.float64), "b": rows(2)},
        ["input a", "expected float32", "got float64"],
    ),
    "integers": ({"a": rows(2), "b": rows(2).astype(np.int32)}, ["input b", "got int32"]),
    "text": (
        {"a": np.array([["x"] * 3], object), "b": rows(1)},
        ["input a", "expected float32", "got bytes"],
    ),
    "wrong rank": ({"a": rows(2)[0], "b": rows(2)}, ["input a", "expected shape [?, 3]", "got [3]"]),
    "rank too high": ({"a": rows(2)[None], "b": rows(2)}, ["input a", "[?, 3]", "got [1, 2, 3]"]),
    "wrong width": ({"a": rows(2), "b": rows(2, 4)}, ["input b", "expected shape [?, 3]", "got [2, 4]"]),
    "scalar": ({"a": np.array(1, np.float32), "b": rows(1)}, ["input a", "got []"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named_and_the_model_stays_usable(runtime: Any, opened: Opened, kind: str) -> None:
    model = opened(TWO[runtime]())
    inputs, words = BAD[kind]
    for _ in range(2):
        with pytest.raises(BadInput) as fault:
            model.infer(inputs)
        assert all(word in str(fault.value) for word in words), str(fault.value)
        a = rows(3)
        np.testing.assert_allclose(model.infer({"a": a, "b": a})["sum"], a + a, rtol=1e-6)
    assert getattr(model, "restarts", 0) == 0


def test_rows_that_do_not_go_together_are_refused_by_the_runtime(runtime: Any, opened: Opened) -> None:
    model = opened(TWO[runtime]())
    for _ in range(2):
        with pytest.raises(BadInput, match="inputs differ in their first dimension: a has 2, b has 5; "):
            model.infer({"a": rows(2), "b": rows(5)})
        a = rows(2)
        np.testing.assert_allclose(model.infer({"a": a, "b": a})["sum"], a + a, rtol=1e-6)


def test_numbers_for_text_are_refused(runtime: Any, opened: Opened) -> None:
    model = opened(same(runtime, "bytes"))
    with pytest.raises(BadInput, match="input x: expected bytes, got float32"):
        model.infer({"x": rows(1, 2)})
    assert model.infer({"x": np.array([["a", b"b"]], object)})["y"].tolist() == [[b"a", b"b"]]


def test_what_fails_in_the_model_is_not_the_inputs_fault(engine: Engine) -> None:
    model = engine.open("onnx", graphs.onnx_reshape_to(5), "test")
    with pytest.raises(RuntimeFault, match="onnxruntime") as fault:
        model.infer({"x": rows(1)})
    assert not isinstance(fault.value, BadInput)
    model.stop()


@pytest.mark.parametrize("way", WAYS)
def test_text_that_is_no_utf8_is_the_inputs_fault(engine: Engine, way: Any) -> None:
    content, wrong = same("onnx", "bytes"), np.array([[b"a", b"\xff"]], object)
    model: Any
    if way == "direct":
        model = load("onnx", content, LoadOptions())
    else:
        model = engine.open("onnx", content, "test", SlotPolicy(isolation=way))
    with pytest.raises(BadInput, match="input x: element 1 is not UTF-8"):
        model.infer({"x": wrong})
    assert model.infer({"x": wrong[:, :0].reshape(0, 2)})["y"].shape == (0, 2)


@pytest.mark.parametrize("kind", ["empty", "noise", "cut off", "the other runtime's"])
def test_a_bad_file_is_refused(runtime: Any, opened: Opened, kind: str) -> None:
    whole = DENSE[runtime]()
    content = {
        "empty": b"",
        "noise": np.random.default_rng(7).bytes(4096),
        "cut off": whole[: len(whole) // 2],
        "the other runtime's": DENSE["tflite" if runtime == "onnx" else "onnx"](),
    }[kind]
    with pytest.raises(RuntimeFault):
        opened(content)


def test_two_models_at_once_do_not_mix(runtime: Any, opened: Opened) -> None:
    dense, two = opened(DENSE[runtime]()), opened(TWO[runtime]())
    for _ in range(3):
        x = rows(2)
        np.testing.assert_allclose(two.infer({"a": x, "b": x})["product"], x * x, rtol=1e-6)
        np.testing.assert_allclose(
            dense.infer({"x": x})["y"], x @ graphs.WEIGHTS + graphs.BIAS, rtol=1e-5, atol=1e-5
        )


def test_results_are_not_overwritten_by_the_next_run(runtime: Any, opened: Opened) -> None:
    model = opened(DENSE[runtime]())
    first = model.infer({"x": np.ones((2, 3), np.float32)})["y"]
    before = first.copy()
    model.infer({"x": np.zeros((2, 3), np.float32)})
    np.testing.assert_array_equal(first, before)
