"""Train a recipe, check every exported form against the trained model, and package it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from edgeward.clock import Clock
from edgeward.documents import load_yaml, read_text
from edgeward.errors import InvalidDocument, PackageError
from edgeward.fields import explain, split_error
from edgeward.identifiers import check_name
from edgeward.wire.package import GoldenVectors, Lineage
from models import metrics, recipes
from models.datasets import Dataset, load_csv, load_named, parse_share
from models.inspect import largest_error
from models.package import (
    GOLDEN_ATOL,
    GOLDEN_ROWS,
    GOLDEN_RTOL,
    ModelFile,
    Package,
    baseline_of,
    check_free,
    golden_tensor,
    write_package,
)
from models.recipes.base import Exported, Rows, Trained, merge


class Training(Struct, frozen=True, forbid_unknown_fields=True):
    """A training file: what `edgeward train -f` reads. `data` is a path relative to the file."""

    recipe: str
    model: str
    version: int
    dataset: str = ""
    data: str = ""
    train: str = "0:0.7"
    holdout: str = "0.7:1.0"
    features: list[str] = []
    parameters: dict[str, Any] = {}


def read_training(path: Path) -> Training:
    """Raises InvalidDocument naming file and field."""
    documents = load_yaml(read_text(path), str(path))
    if len(documents) != 1:
        raise InvalidDocument(f"holds {len(documents)} documents, expected one", source=str(path))
    try:
        training: Training = msgspec.convert(documents[0], type=Training)
    except msgspec.ValidationError as error:
        text, field = split_error(error)
        raise InvalidDocument(explain(text, Training, field), source=str(path), field=field) from None
    if training.data:
        training = msgspec.structs.replace(training, data=str(path.parent / training.data))
    return training


@dataclass(frozen=True)
class Outcome:
    """A finished training: the package, its quality on the held-out rows, and the parity of each form."""

    package: Package
    quality: dict[str, float]
    parity: dict[str, float]


def train(training: Training, out: Path, clock: Clock, step: Callable[[str], None]) -> Outcome:
    """`step` is told what happens next, for progress.

    Raises InvalidDocument for bad data or parameters, PackageError when a form disagrees with the
    trained model.
    """
    # Everything that can be wrong with the wish is said before the work begins.
    recipe = recipes.find(training.recipe)
    parameters = merge(recipe, training.parameters)
    check_name(training.model, "model")
    if training.version < 1:
        raise InvalidDocument(f"expected a version >= 1, got {training.version}", field="version")
    check_free(out)
    _check_apart(training.train, training.holdout)
    if bool(training.dataset) == bool(training.data):
        raise InvalidDocument("expected either a dataset or a data file", field="dataset")
    step("reading the data")
    if training.data:
        whole = load_csv(Path(training.data), training.features or None)
    else:
        whole = load_named(training.dataset)
        whole = whole.select(training.features) if training.features else whole
    fitted, held_out = whole.part(training.train), whole.part(training.holdout)
    step(f"training {recipe.name} on {fitted.rows} rows x {len(fitted.features)} features")
    trained = recipe.train(fitted, parameters)
    step("checking each exported form against the trained model")
    parity = {form.name: _parity(trained, form, held_out) for form in trained.exported}
    quality: dict[str, float] = {}
    if held_out.labels is not None:
        scores = trained.exported[0].predict(held_out.values)
        quality = metrics.detection(scores, held_out.labels, trained.decision.threshold)
    step("packaging")
    package = write_package(
        out,
        model=training.model,
        version=training.version,
        files=[
            ModelFile(form.name, form.runtime, form.content, form.inputs, form.outputs, quality.get("auc"))
            for form in trained.exported
        ],
        golden=_golden(trained, held_out.values),
        tolerance=(GOLDEN_ATOL, GOLDEN_RTOL),
        features=whole.features,
        lineage=Lineage(
            recipe.name,
            parameters,
            whole.name,
            whole.digest(),
            fitted.rows,
            training.train,
            trained.libraries,
        ),
        clock=clock,
        decision=trained.decision,
        baseline=baseline_of(fitted.values, fitted.features),
        metrics=quality,
    )
    return Outcome(package, quality, parity)


def _check_apart(train: str, holdout: str) -> None:
    """Rows that were trained on say nothing about the quality elsewhere. Raises InvalidDocument."""
    (first, last), (begin, end) = parse_share(train), parse_share(holdout)
    if first < end and begin < last:
        raise InvalidDocument(
            f"{holdout} overlaps the training rows {train}",
            field="holdout",
            hint="choose rows apart from them",
        )


def _parity(trained: Trained, form: Exported, held_out: Dataset) -> float:
    """The largest difference on the held-out rows. Raises PackageError above the recipe's tolerance."""
    want = trained.reference(held_out.values)
    off, limit = largest_error(form.predict(held_out.values), want, trained.tolerance, trained.tolerance)
    if off > limit:
        raise PackageError(
            f"{form.name} differs from the trained model by {off:.3g}, limit {limit:.3g}: it is not packaged"
        )
    return off


def _golden(trained: Trained, rows: Rows) -> GoldenVectors:
    """Rows spread over the held-out part, with the trained model's own answers."""
    chosen = rows[np.linspace(0, len(rows) - 1, min(GOLDEN_ROWS, len(rows))).astype(int)]
    form = trained.exported[0]
    return GoldenVectors(
        [golden_tensor(form.inputs[0].name, chosen)],
        [golden_tensor(form.outputs[0].name, trained.reference(chosen).reshape(-1, 1))],
    )
