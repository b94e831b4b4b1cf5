"""What does a retrained model cost on the link, as a delta from the version before, against plain zstd?

python -m benchmarks.deltas [--quick] [--json FILE]

The models are trained here on the Shuttle sensors: a dense autoencoder (scikit-learn, exported by skl2onnx,
its fp16 and int8 forms by onnxruntime's tools) on the first half of the rows, then going on with all of them;
and the recipes of this project, trained from scratch on a third and on two thirds of the rows.
Sizes are in percent of the file; `peer` is zstd -19 of the whole file.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zstandard
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from skl2onnx import to_onnx
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPRegressor

from benchmarks.report import Row, arguments, finish, median, spread
from edgeward.delta import apply, make
from models import recipes
from models.datasets import Dataset, load_named

Rows = npt.NDArray[np.float32]
RATE = 1e-3


@dataclass(frozen=True)
class Case:
    """Two versions of one file.

    `target` is what the delta should be at most, in percent of the file, `moved` by how much of their mean
    size the weights moved on average, in percent.
    """

    work: str
    before: bytes
    after: bytes
    target: float | None = None
    moved: float | None = None


def scaled(data: Dataset) -> Rows:
    """The rows without an anomaly, as the recipe `anomaly-autoencoder-tiny` scales them."""
    assert data.labels is not None
    normal = data.values[data.labels == 0]
    width = np.percentile(normal, 95, axis=0) - np.percentile(normal, 5, axis=0)
    rows: Rows = np.clip((normal - np.median(normal, axis=0)) / np.where(width > 0, width, 1.0), -5, 5)
    return rows.astype(np.float32)


def trained(rows: Rows, hidden: int, passes: int, seed: int) -> MLPRegressor:
    net = MLPRegressor(
        hidden_layer_sizes=(hidden, hidden),
        activation="tanh",
        learning_rate_init=RATE,
        max_iter=passes,
        batch_size=128,
        random_state=seed,
    )
    return net.fit(rows, rows)


def went_on(net: MLPRegressor, rows: Rows, rate: float) -> MLPRegressor:
    """One more pass from where the weights are: all of them move."""
    after = copy.deepcopy(net)
    after.set_params(warm_start=True, learning_rate_init=rate, max_iter=1)
    return after.fit(rows, rows)


def last_layer(net: MLPRegressor, rows: Rows) -> MLPRegressor:
    """The last layer fitted anew (least squares on what the layers before it give), the others as they were."""
    after = copy.deepcopy(net)
    given = rows
    for weights, bias in zip(net.coefs_[:-1], net.intercepts_[:-1], strict=True):
        given = np.tanh(given @ weights + bias)
    given = np.hstack([given, np.ones((len(given), 1), np.float32)])
    solved = np.linalg.lstsq(given, rows, rcond=1e-4)[0].astype(np.float32)
    after.coefs_[-1], after.intercepts_[-1] = solved[:-1], solved[-1]
    return after


def movement(before: MLPRegressor, after: MLPRegressor) -> float:
    old, new = (np.concatenate([layer.ravel() for layer in net.coefs_]) for net in (before, after))
    return float(100 * np.abs(new - old).mean() / np.abs(old).mean())


def forms(net: MLPRegressor, rows: Rows) -> dict[str, bytes]:
    """The model as fp32, fp16 and int8 ONNX files."""
    model = to_onnx(net, rows[:1], target_opset=17)
    half = convert_float_to_float16(copy.deepcopy(model))
    # The converter leaves fp16 weights as variable-length integers; most tools write them as they are.
    for weights in half.graph.initializer:
        weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights), weights.name))
    with tempfile.TemporaryDirectory() as folder:
        whole, quantized = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        whole.write_bytes(model.SerializeToString())
        quantize_dynamic(whole, quantized, weight_type=QuantType.QInt8)
        return {
            "fp32": whole.read_bytes(),
            "fp16": half.SerializeToString(),
            "int8": quantized.read_bytes(),
        }


def networks(rows: Rows, hidden: int, passes: int, seed: int) -> list[Case]:
    net = trained(rows[: len(rows) // 2], hidden, passes, seed)
    before = forms(net, rows)
    wanted = {"fp32": 58.8, "fp16": 33.5, "int8": 5.4}
    cases = []
    for how, rate in (("fine-tuned", RATE / 100), ("trained further", RATE)):
        after = went_on(net, rows, rate)
        made, moved = forms(after, rows), movement(net, after)
        for form in before:
            target = wanted[form] if how == "fine-tuned" else None
            cases.append(Case(f"{form}, {how}", before[form], made[form], target, moved))
    anew = forms(last_layer(net, rows), rows)["fp32"]
    share = 100 * net.coefs_[-1].size / sum(weights.size for weights in net.coefs_)
    cases.append(Case(f"fp32, last layer anew ({share:.1f} % of the weights)", before["fp32"], anew, 3.9))
    return cases


def from_scratch(data: Dataset, seed: int) -> list[Case]:
    """The recipes of the demo and their two versions."""
    cases = []
    for name in ("anomaly-autoencoder-tiny", "anomaly-detection"):
        recipe = recipes.find(name)
        parameters = recipe.parameters | {"seed": seed}
        before, after = (
            recipe.train(data.part(share), parameters).exported[0].content for share in ("0:0.35", "0:0.7")
        )
        cases.append(Case(f"recipe {name}, from scratch", before, after))
    return cases


@dataclass(frozen=True)
class Sent:
    share: float
    plain: float
    codec: str
    make_rate: float
    apply_rate: float


def sent(case: Case) -> Sent:
    """Percent of the file, and MB/s of making and applying."""
    size = len(case.after)
    began = time.perf_counter()
    delta = make(case.before, case.after)
    making = time.perf_counter() - began
    applying = 0.0
    if delta is not None:
        began = time.perf_counter()
        made = apply(delta.content, case.before, size=size)
        applying = time.perf_counter() - began
        if made != case.after:
            raise AssertionError(f"{case.work}: the delta makes something else")
    plain = len(zstandard.ZstdCompressor(level=19).compress(case.after))
    return Sent(
        100 * (len(delta.content) if delta else size) / size,
        100 * plain / size,
        delta.codec.name if delta else "whole file",
        size / making / 1e6,
        size / applying / 1e6 if applying else 0.0,
    )


def measured(seeds: list[int], cases_of: Callable[[int], list[Case]]) -> tuple[list[Row], list[str]]:
    results: dict[str, list[tuple[Case, Sent]]] = {}
    for seed in seeds:
        for case in cases_of(seed):
            results.setdefault(case.work, []).append((case, sent(case)))
    rows, codecs = [], []
    for work, found in results.items():
        case, ours = found[0][0], [result.share for _, result in found]
        rows.append(
            Row(
                f"{work}, {len(case.after) / 1e3:,.0f} KB",
                "% of raw",
                median(ours),
                peer=median([result.plain for _, result in found]),
                peer_name="zstd -19",
                target=f"<= {case.target}" if case.target else "",
                spread=spread(ours),
                holds=median(ours) <= case.target if case.target else None,
            )
        )
        note = f"{work}: {', '.join(sorted({result.codec for _, result in found}))}"
        moved = [each.moved for each, _ in found if each.moved is not None]
        codecs.append(f"{note}; weights moved by {median(moved):.2g} %" if moved else note)
    rates = [result for _, result in results["fp32, fine-tuned"]]
    for work, values in (
        ("making a delta, fp32, fine-tuned", [result.make_rate for result in rates]),
        ("applying it", [result.apply_rate for result in rates]),
    ):
        rows.append(Row(work, "MB/s", median(values), spread=spread(values)))
    return rows, codecs


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    hidden, passes, seeds = (128, 3, [7]) if options.quick else (512, 6, [7, 8, 9])
    warnings.simplefilter("ignore", ConvergenceWarning)
    logging.disable(logging.WARNING)  # the quantizer's advice
    data = load_named("shuttle")
    rows = scaled(data)

    def cases(seed: int) -> list[Case]:
        return networks(rows, hidden, passes, seed) + from_scratch(data, seed)

    table, codecs = measured(seeds, cases)
    finish("Deltas of retrained models", table, options.json, codecs)


if __name__ == "__main__":
    main()
