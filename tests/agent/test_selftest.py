"""Golden vectors: numbers within tolerance, text exactly, and whether rows may be joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from agent.runtime.port import Arrays
from agent.slots import selftest
from edgeward.errors import PackageError, RuntimeFault
from edgeward.wire.package import GoldenTensor, GoldenVectors, TensorSpec
from edgeward.wire.tensors import pack_elements


def golden(name: str, values: Any) -> GoldenTensor:
    array = np.asarray(values)
    if array.dtype.kind == "S":
        return GoldenTensor(name, "bytes", list(array.shape), pack_elements(array.reshape(-1).tolist()))
    return GoldenTensor(name, array.dtype.name, list(array.shape), array.tobytes())


class Fake:
    def __init__(self, infer: Callable[[Arrays], Arrays]) -> None:
        self.infer = infer


def test_numbers_may_be_off_by_the_tolerance_and_no_more() -> None:
    vectors = GoldenVectors([], [golden("y", np.float32([1.0, 100.0]))])
    assert selftest.judge(vectors, {"y": np.float32([1.0, 100.05])}, 0.0, 1e-3).passed
    verdict = selftest.judge(vectors, {"y": np.float32([1.0, 101.0])}, 0.0, 1e-3)
    assert not verdict.passed and verdict.measured == pytest.approx(1.0)
    assert verdict.limit == pytest.approx(0.1) and "1 of 2" in verdict.message
    assert not selftest.judge(vectors, {"y": np.float32([1.0, np.nan])}, 1e9, 0.0).passed


def test_wrong_outputs_are_named() -> None:
    vectors = GoldenVectors([], [golden("label", np.int64([1])), golden("score", np.float32([1]))])
    missing = selftest.judge(vectors, {"score": np.float32([1])}, 1.0, 0.0)
    assert not missing.passed and "outputs 'score', expected 'label', 'score'" in missing.message
    extra = {"label": np.int64([1]), "score": np.float32([1]), "more": np.float32([1])}
    assert "'more'" in selftest.judge(vectors, extra, 1.0, 0.0).message
    shape = selftest.judge(vectors, {"label": np.int64([1, 1]), "score": np.float32([1])}, 1.0, 0.0)
    assert not shape.passed and "shape [2], expected [1]" in shape.message


def test_text_must_be_the_same() -> None:
    vectors = GoldenVectors([], [golden("label", np.array([b"cat", b"dog"]))])
    assert selftest.judge(vectors, {"label": np.array(["cat", "dog"], object)}, 9.0, 9.0).passed
    assert selftest.judge(vectors, {"label": np.array([b"cat", b"dog"], object)}, 9.0, 9.0).passed
    verdict = selftest.judge(vectors, {"label": np.array(["cat", "cow"], object)}, 9.0, 9.0)
    assert not verdict.passed and "1 of 2 golden texts differ" in verdict.message
    number = selftest.judge(vectors, {"label": np.float32([1, 2])}, 9.0, 9.0)
    assert not number.passed and "type float32, expected bytes" in number.message
    with pytest.raises(PackageError, match="label"):
        selftest.to_array(GoldenTensor("label", "bytes", [1], b"\xff\xff\xff\xff"))


ROWS = {"x": np.float32([[1, 2], [3, 4], [5, 7]])}


@pytest.mark.parametrize(
    ("infer", "independent"),
    [
        (lambda given: {"y": given["x"] * 2}, True),
        (lambda given: {"y": np.array([str(row) for row in given["x"].tolist()], object)}, True),
        (lambda given: {"y": given["x"] - given["x"].mean(axis=0)}, False),
        (lambda given: {"y": given["x"].mean(axis=0, keepdims=True)}, False),
        (lambda given: {"y": given["x"].sum()}, False),
        (lambda given: {"y": given["x"], **({"z": given["x"]} if len(given["x"]) > 1 else {})}, False),
    ],
)
def test_rows_may_be_joined_only_when_each_alone_gives_the_same(
    infer: Callable[[Arrays], Arrays], independent: bool
) -> None:
    assert selftest.row_independent(Fake(infer), ROWS, (1e-6, 1e-6)) is independent


def test_what_shows_nothing_does_not_count_as_shown() -> None:
    double = Fake(lambda given: {"y": given["x"] * 2})
    centred = Fake(lambda given: {"y": given["x"] - given["x"].mean(axis=0)})
    assert not selftest.row_independent(double, {"x": np.float32([[1, 2]])}, (0, 0))
    assert not selftest.row_independent(centred, {"x": np.float32([[1, 2], [1, 2]])}, (0, 0))
    assert not selftest.row_independent(double, {"x": np.float32(1.0)}, (0, 0))

    def refuse(given: Arrays) -> Arrays:
        if len(given["x"]) == 1:
            raise RuntimeFault("expected 3 rows")
        return {"y": given["x"]}

    assert not selftest.row_independent(Fake(refuse), ROWS, (0, 0))


def test_one_example_is_the_first_row_where_the_model_lets_it() -> None:
    free, fixed = TensorSpec("x", "float32", [-1, 2]), TensorSpec("x", "float32", [3, 2])
    assert selftest.first_row(ROWS, [free])["x"].tolist() == [[1, 2]]
    assert selftest.first_row(ROWS, [fixed])["x"].shape == (3, 2)
