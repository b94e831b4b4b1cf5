"""Recipes, packages and bad input, on the real data and the real runtimes."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from agent.runtime.engine import Engine
from agent.slots import selftest
from edgeward.clock import ManualClock
from edgeward.errors import Conflict, DigestMismatch, InvalidDocument, PackageError, UsageError
from models import train as training
from models.bring import Brought, Reference, bring, parse_variant
from models.datasets import load_csv, load_named, write_csv
from models.inspect import LoadedModel, largest_error, to_bfloat16
from models.metrics import best_f1_threshold, detection
from models.package import Package, golden_array, load_package

CLOCK = ManualClock()


def quiet(text: str) -> None:
    """Progress is for people."""


def wish(recipe: str, /, **changes: object) -> training.Training:
    values = {"recipe": recipe, "model": "shuttle", "version": 1, "dataset": "shuttle", "train": "0:0.35"}
    return training.Training(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def forest(tmp_path_factory: pytest.TempPathFactory) -> training.Outcome:
    return training.train(wish("anomaly-detection"), tmp_path_factory.mktemp("f") / "package", CLOCK, quiet)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> training.Outcome:
    return training.train(
        wish("anomaly-autoencoder-tiny"), tmp_path_factory.mktemp("t") / "package", CLOCK, quiet
    )


@pytest.fixture(params=["forest", "tiny"])
def outcome(request: pytest.FixtureRequest) -> training.Outcome:
    made: training.Outcome = request.getfixturevalue(request.param)
    return made


def test_a_recipe_detects_what_it_never_saw(outcome: training.Outcome) -> None:
    assert outcome.quality["auc"] > 0.98
    assert outcome.quality["precision"] > 0.85
    assert outcome.quality["recall"] > 0.85


def test_the_packaged_file_reproduces_the_golden_vectors(outcome: training.Outcome) -> None:
    package = load_package(outcome.package.folder)
    (variant,) = package.manifest.variants
    loaded = LoadedModel(package.blob(variant.blob).read_bytes(), variant.runtime, "blob")
    golden = package.golden()
    got = loaded.run({tensor.name: golden_array(tensor) for tensor in golden.inputs})
    for tensor in golden.outputs:
        off, limit = largest_error(
            got[tensor.name], golden_array(tensor), package.manifest.golden.atol, package.manifest.golden.rtol
        )
        assert off <= limit
    assert [spec.shape[0] for spec in variant.inputs] == [-1]


def test_baselines_are_distributions(outcome: training.Outcome) -> None:
    manifest = outcome.package.manifest
    assert set(manifest.baseline) == set(manifest.features)
    for baseline in manifest.baseline.values():
        assert sum(baseline.proportions) == pytest.approx(1)
        assert baseline.edges == sorted(set(baseline.edges))


def test_training_is_repeatable(forest: training.Outcome, tmp_path: Path) -> None:
    again = training.train(wish("anomaly-detection"), tmp_path / "again", CLOCK, quiet)
    assert again.package.digest == forest.package.digest


def test_lineage_says_what_was_trained_on_what(forest: training.Outcome) -> None:
    lineage = forest.package.manifest.lineage
    assert (lineage.recipe, lineage.dataset, lineage.split, lineage.rows) == (
        "anomaly-detection", "shuttle", "0:0.35", 17183,
    )  # fmt: skip
    assert lineage.dataset_digest == load_named("shuttle").digest()


def flipped(package: Package, target: Path) -> Path:
    """A copy with one bit of its model changed."""
    (target / "blobs").mkdir(parents=True)
    for name in ("manifest.json", "manifest.sha256"):
        (target / name).write_bytes((package.folder / name).read_bytes())
    for blob in package.manifest.blobs():
        (target / "blobs" / blob.digest).write_bytes(package.blob(blob).read_bytes())
    victim = target / "blobs" / package.manifest.variants[0].blob.digest
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    return target


def test_one_flipped_bit_is_refused(tiny: training.Outcome, tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch, match="the package was changed"):
        load_package(flipped(tiny.package, tmp_path / "p"))


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_a_flipped_bit_is_found_before_anything_is_signed(
    tiny: training.Outcome, tmp_path: Path, name: str
) -> None:
    """Version 1 becomes 3: still a manifest, but not the one that was made."""
    copy = tmp_path / "p"
    shutil.copytree(tiny.package.folder, copy)
    content = bytearray((copy / name).read_bytes())
    place = content.index(b'"version":1') + 10 if name.endswith("json") else 3
    content[place] ^= 2
    (copy / name).write_bytes(content)
    with pytest.raises(DigestMismatch, match=r"manifest\.json.*the package was changed"):
        load_package(copy)


def test_a_missing_blob_and_a_strange_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDocument, match="cannot read it"):
        load_package(tmp_path)
    (tmp_path / "manifest.json").write_text('{"model": 1}')
    (tmp_path / "manifest.sha256").write_text(hashlib.sha256(b'{"model": 1}').hexdigest())
    with pytest.raises(InvalidDocument, match=r"manifest\.json"):
        load_package(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x80\x04\x95\x10\x00\x00", "pickle"),
        (b"just text", "not an ONNX model"),
        (b"\x08\x08\x12\x07rubbish" + bytes(200), "not a valid ONNX model"),
        (b"", "empty"),
    ],
)
def test_a_file_that_is_no_onnx_model(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(PackageError, match=says):
        bring(
            [Brought("onnx-cpu", file, "onnx")],
            tmp_path / "p",
            model="m",
            version=1,
            clock=CLOCK,
            reference=Reference(tmp_path / "x.csv"),
        )
    assert not (tmp_path / "p").exists(), "nothing half-made"


def test_bring_your_own_onnx(forest: training.Outcome, tmp_path: Path) -> None:
    file = tmp_path / "own.onnx"
    file.write_bytes(forest.package.blob(forest.package.manifest.variants[0].blob).read_bytes())
    rows = tmp_path / "rows.csv"
    write_csv(load_named("shuttle").part("0.9:0.92"), rows)
    own = [Brought("onnx-cpu", file, "onnx")]
    more: dict[str, Any] = {"model": "own", "version": 3, "clock": CLOCK, "reference": Reference(rows)}
    package = bring(own, tmp_path / "p", threshold=0.5, **more)
    assert package.manifest.features == load_named("shuttle").features
    assert load_package(tmp_path / "p").digest == package.digest
    with pytest.raises(Conflict, match="not an empty folder"):
        bring(own, tmp_path / "p", **more)


def test_wrong_outputs_are_refused_unless_asked_for(forest: training.Outcome, tmp_path: Path) -> None:
    other = training.train(wish("anomaly-detection", train="0:0.1"), tmp_path / "other", CLOCK, quiet)
    file = tmp_path / "wrong.onnx"
    file.write_bytes(other.package.blob(other.package.manifest.variants[0].blob).read_bytes())
    arguments: dict[str, Any] = {
        "model": "shuttle",
        "version": 3,
        "clock": CLOCK,
        "reference": Reference(package=forest.package.folder),
    }
    wrong = [Brought("onnx-cpu", file, "onnx")]
    with pytest.raises(PackageError, match="off its golden values"):
        bring(wrong, tmp_path / "p", **arguments)
    assert bring(wrong, tmp_path / "p", check=False, **arguments).manifest.version == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", r"no column 'c'.*its columns are a, b"),
        ("a,b,c\n1,2,x\n", r"data\.csv:2: c: expected a number, got 'x'"),
        ("a,b,c\n1,2\n", r"data\.csv:2: has 2 cells, expected 3"),
        ("a,b,c,label\n1,2,3,7\n", r"data\.csv:2: label: expected 0 or 1"),
        ("a,b,c\n1,2,nan\n", r"data\.csv:2: c: expected a finite number"),
        ("a,b,c\n1,2,3\n\n1,2,1e39\n", r"data\.csv:4: c: expected a finite number of 32 bits, got 1e\+39"),
        ("a,b,c\n", "expected a header line and rows"),
        ("\n1,2,3\n", "expected a header line and rows"),
    ],
)
def test_a_bad_csv_names_file_line_and_column(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text(text)
    with pytest.raises(InvalidDocument, match=says):
        load_csv(file, ["a", "b", "c"])


def test_empty_lines_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text("a,b\n1,2\n\n3,4\n\n\n")
    assert load_csv(file).values.tolist() == [[1, 2], [3, 4]]
    file.write_text("label\n1\n")
    with pytest.raises(InvalidDocument, match=r"data\.csv: expected a column besides 'label'"):
        load_csv(file)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": "astrology"}, r"unknown recipe 'astrology'.*anomaly-detection"),
        ({"dataset": "moon"}, r"unknown dataset 'moon'.*shuttle"),
        ({"train": "0.9:0.1"}, "not a share"),
        ({"parameters": {"leaves": 3}}, r"no parameter 'leaves'.*trees"),
        ({"parameters": {"trees": "many"}}, "trees: expected int"),
        ({"data": "x.csv"}, "either a dataset or a data file"),
    ],
)
def test_bad_training_wishes(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidDocument, match=says):
        training.train(wish("anomaly-detection", **changes), tmp_path / "p", CLOCK, quiet)
    assert not (tmp_path / "p").exists()


def test_a_training_file_refuses_unknown_fields(tmp_path: Path) -> None:
    file = tmp_path / "training.yaml"
    file.write_text("recipe: anomaly-detection\nmodel: m\nversion: 1\ncolour: red\n")
    with pytest.raises(InvalidDocument, match=r"training\.yaml.*unknown field `colour`"):
        training.read_training(file)


def test_detection_figures() -> None:
    scores = np.array([0.1, 0.4, 0.6, 0.9], np.float32)
    labels = np.array([0, 1, 0, 1], np.int8)
    figures = detection(scores, labels, 0.5)
    assert (figures["precision"], figures["recall"], figures["auc"]) == (0.5, 0.5, 0.75)
    assert "auc" not in detection(scores, np.zeros(4, np.int8), 0.5)
    assert 0.6 < best_f1_threshold(scores, np.array([0, 0, 0, 1], np.int8)) < 0.9


def two_inputs(path: Path, scale: float = 1.0) -> Path:
    """`total = scale * sum(image) + offset`, with a batch of exactly two."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [2, 3, 4])
    offset = helper.make_tensor_value_info("offset", TensorProto.FLOAT, [2])
    total = helper.make_tensor_value_info("total", TensorProto.FLOAT, [2])
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])
    factor = helper.make_tensor("factor", TensorProto.FLOAT, [], [scale])
    nodes = [
        helper.make_node("ReduceSum", ["image", "axes"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], ["total"]),
    ]
    graph = helper.make_graph(nodes, "g", [image, offset], [total], [axes, factor])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def test_several_variants_of_any_shape_with_arrays_as_golden_inputs(tmp_path: Path) -> None:
    first, second = two_inputs(tmp_path / "a.onnx"), two_inputs(tmp_path / "b.onnx", 1.01)
    arrays = {"image": np.ones((2, 3, 4), np.float32), "offset": np.array([0.5, 1.5], np.float32)}
    np.savez(tmp_path / "in.npz", **arrays)  # type: ignore[arg-type]  # arrays by name
    forms = [
        Brought("fp32", first, "onnx", ("CUDAExecutionProvider",), 0.9),
        parse_variant(f"quick={second}"),
    ]
    more: dict[str, Any] = {"model": "m", "version": 1, "clock": CLOCK}
    reference = Reference(tmp_path / "in.npz")
    package = bring(forms, tmp_path / "p", reference=reference, tolerance=(0.5, 0.0), **more)
    one, two = package.manifest.variants
    assert (one.providers, one.quality, two.name) == (["CUDAExecutionProvider"], 0.9, "quick")
    assert golden_array(package.golden().outputs[0]).tolist() == [12.5, 13.5]
    with pytest.raises(PackageError, match="off its golden values"):
        bring(forms, tmp_path / "q", reference=reference, **more)
    np.savez(tmp_path / "in.npz", image=arrays["image"])
    with pytest.raises(InvalidDocument, match="the model's inputs are image, offset"):
        bring(forms, tmp_path / "q", reference=reference, **more)
    np.savez(tmp_path / "in.npz", image=arrays["image"], offset=np.ones(3, np.float32))
    with pytest.raises(InvalidDocument, match=r"offset: is float32 \[3\], expected float32 \[2\]"):
        bring(forms, tmp_path / "q", reference=reference, **more)
    np.savez(tmp_path / "in.npz", image=np.array([object()]), offset=arrays["offset"])
    with pytest.raises(InvalidDocument, match="cannot read it"):
        bring(forms, tmp_path / "q", reference=reference, **more)
    with pytest.raises(UsageError, match="not a variant"):
        parse_variant("model.pkl")


def test_a_model_of_texts_is_packaged_with_texts(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node(
                "StringNormalizer", ["text"], ["plain"], case_change_action="LOWER", locale="C.UTF-8"
            )
        ],
        "g",
        [helper.make_tensor_value_info("text", TensorProto.STRING, [None])],
        [helper.make_tensor_value_info("plain", TensorProto.STRING, [None])],
    )
    file = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(file))
    np.savez(tmp_path / "in.npz", text=np.array(["Größe", "", "PUMP"]))
    package = bring(
        [Brought("onnx-cpu", file, "onnx")], tmp_path / "p", model="m", version=1, clock=CLOCK,
        reference=Reference(tmp_path / "in.npz"),
    )  # fmt: skip
    assert [spec.dtype for spec in package.manifest.variants[0].inputs] == ["bytes"]
    (output,) = package.golden().outputs
    assert golden_array(output).tolist() == ["größe".encode(), b"", b"pump"]
    assert load_package(tmp_path / "p").digest == package.digest


@pytest.mark.parametrize("given", ["raw", "ml_dtypes", "csv"])
def test_a_bfloat16_model_is_packaged_and_passes_its_own_test(tmp_path: Path, given: str) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "three"], ["tripled"]),
        helper.make_node("Cast", ["tripled"], ["y"], to=TensorProto.BFLOAT16),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [None, 2]) for name in "xy")
    three = helper.make_tensor("three", TensorProto.FLOAT, [1], [3.0])
    file = tmp_path / "m.onnx"
    graph = helper.make_graph(nodes, "g", [x], [y], [three])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(file))
    values = np.array([[1.0, -2.5], [0.1, 3e30]], np.float32)
    short = values.astype(ml_dtypes.bfloat16)
    assert to_bfloat16(values).tolist() == short.view(np.uint16).tolist()
    source = tmp_path / ("in.csv" if given == "csv" else "in.npz")
    if given == "csv":
        source.write_text("a,b\n1.0,-2.5\n0.1,3e30\n")
    else:
        np.savez(source, x=short if given == "ml_dtypes" else short.view(np.uint16))

    package = bring(
        [Brought("onnx-cpu", file, "onnx")], tmp_path / "p", model="m", version=1, clock=CLOCK,
        reference=Reference(source), tolerance=(0.0, 1e-3),
    )  # fmt: skip

    golden = package.golden()
    assert [tensor.dtype for tensor in (*golden.inputs, *golden.outputs)] == ["bfloat16"] * 2
    tripled = (short.astype(np.float32) * 3).astype(ml_dtypes.bfloat16)
    assert golden_array(golden.outputs[0]).tolist() == tripled.view(np.uint16).tolist()
    engine = Engine()
    engine.start()
    try:
        runner = engine.open("onnx", file.read_bytes(), "m:1")
        inputs = selftest.golden_inputs(golden)
        got = runner.infer(inputs)
        assert selftest.judge(golden, got, 0.0, 1e-3).passed
        assert selftest.row_independent(runner, inputs, (0.0, 1e-3), runner.outputs)
        # The next number of the type is 0.8 % away, though its integer is only one more.
        assert not selftest.judge(golden, {"y": got["y"] + np.uint16(1)}, 0.0, 1e-3).passed
    finally:
        engine.stop()


def test_a_classifier_s_maps_are_refused_with_the_way_out(tmp_path: Path) -> None:
    key = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    maps = helper.make_value_info("p", helper.make_sequence_type_proto(key))
    node = helper.make_node("ZipMap", ["x"], ["p"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])], [maps]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    content = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    with pytest.raises(PackageError, match=r"tensor p has type seq\(map.*zipmap"):
        LoadedModel(content, "onnx", "m.onnx")
