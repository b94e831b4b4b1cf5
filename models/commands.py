"""`edgeward train`, `package`, `release`, `publish`, `dataset` and `recipes`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edgeward.cli.context import TokenFile, Url, connect
from edgeward.clock import Clock, SystemClock
from edgeward.errors import MissingDependency, UsageError

out = Console(highlight=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    app.command()(train)
    app.command()(publish)
    recipes = typer.Typer(help="Recipes: what `edgeward train` can train.", no_args_is_help=True)
    recipes.command(name="list")(recipes_list)
    app.add_typer(recipes, name="recipes")
    package = typer.Typer(help="Model packages.", no_args_is_help=True)
    package.command(name="create")(package_create)
    package.command(name="check")(package_check)
    app.add_typer(package, name="package")
    release = typer.Typer(help="Release signing keys.", no_args_is_help=True)
    release.command(name="init")(release_init)
    app.add_typer(release, name="release")
    dataset = typer.Typer(help="Data sets that ship with Python packages.", no_args_is_help=True)
    dataset.command(name="list")(dataset_list)
    dataset.command(name="export")(dataset_export)
    app.add_typer(dataset, name="dataset")


def _missing(error: ImportError) -> MissingDependency:
    return MissingDependency(f"{error.name} is not installed", hint="pip install 'edgeward[train]'")


def _progress(clock: Clock) -> Callable[[str], None]:
    """Prints each step with the seconds since the first one."""
    start = clock.monotonic()
    return lambda text: out.print(f"{clock.monotonic() - start:6.1f} s  {text}", highlight=False)


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe's name; `edgeward recipes list` shows them.")
    ] = None,
    filename: Annotated[
        Path | None, typer.Option("-f", "--filename", help="A training file instead.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="A shipped data set; `edgeward dataset list`.")] = "",
    data: Annotated[
        str, typer.Option(help="Your CSV: numbers with a header; column `label` holds 0 or 1.")
    ] = "",
    model: Annotated[str, typer.Option(help="The model's name.")] = "",
    version: Annotated[int | None, typer.Option(min=1, help="The version to make.", show_default="1")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="The package folder to write.")] = None,
    share: Annotated[
        str, typer.Option("--train", help="Share of rows to train on.", show_default="0:0.7")
    ] = "",
    holdout: Annotated[
        str, typer.Option(help="Share of rows to judge on; never trained on.", show_default="0.7:1.0")
    ] = "",
    parameter: Annotated[
        list[str] | None, typer.Option("--set", help="A recipe parameter, as name=value.")
    ] = None,
) -> None:
    """Train a recipe and write a model package.

    Example: `edgeward train anomaly-detection --dataset shuttle --model shuttle-anomaly --version 1 --out package`
    """
    try:
        from models import train as training
    except ImportError as error:
        raise _missing(error) from None
    if (recipe is None) == (filename is None):
        raise UsageError("expected either a recipe or -f FILE", hint="see `edgeward train --help`")
    if folder is None:
        raise UsageError("no package folder given", hint="pass --out FOLDER")
    if filename is not None:
        if dataset or data or model or parameter or version or share or holdout:
            raise UsageError("a training file says all but --out", hint="change the file, or leave -f away")
        wish = training.read_training(filename)
    else:
        if not model:
            raise UsageError("no model name given", hint="pass --model NAME")
        given = {}
        for pair in parameter or []:
            name, equals, value = pair.partition("=")
            if not equals:
                raise UsageError(f"{pair!r} is not a parameter", hint="expected --set name=value")
            given[name] = value
        wish = training.Training(
            recipe or "",
            model,
            version or 1,
            dataset,
            data,
            share or "0:0.7",
            holdout or "0.7:1.0",
            parameters=given,
        )
    clock = SystemClock()
    step = _progress(clock)
    outcome = training.train(wish, folder, clock, step)
    step("done")
    for form, off in outcome.parity.items():
        out.print(f"  {form}: differs from the trained model by at most {off:.3g}")
    for name, figure in outcome.quality.items():
        out.print(f"  {name}: {figure:.4g}")
    manifest = outcome.package.manifest
    out.print(f"{manifest.model} version {manifest.version} in {folder}, digest {outcome.package.digest}")


def publish(
    package: Annotated[Path, typer.Argument(help="A package folder.")],
    keys: Annotated[Path, typer.Option("--keys", help="The folder with the release keys.")],
    url: Annotated[str | None, Url] = None,
    token_file: Annotated[Path | None, TokenFile] = None,
) -> None:
    """Sign a package and publish it. Publishing the same content again changes nothing.

    Example: `edgeward publish package --keys release-keys`
    """
    try:
        from models.package import load_package
        from models.release import publish as do
    except ImportError as error:
        raise _missing(error) from None
    checked = load_package(package)
    with connect(url, token_file) as client:
        do(checked, keys, client, SystemClock())
    out.print(
        f"published {checked.manifest.model} version {checked.manifest.version}, digest {checked.digest}"
    )


def recipes_list() -> None:
    """List the recipes and their parameters. Example: `edgeward recipes list`"""
    try:
        from models.recipes import RECIPES
    except ImportError as error:
        raise _missing(error) from None
    for recipe in RECIPES.values():
        out.print(f"{recipe.name}: {recipe.about}")
        for name, value in recipe.parameters.items():
            out.print(f"    {name}={value}")


def package_create(
    folder: Annotated[Path, typer.Option("--out", help="The package folder to write.")],
    model: Annotated[str, typer.Option(help="The model's name.")],
    version: Annotated[int, typer.Option(min=1, help="The version.")],
    onnx: Annotated[Path | None, typer.Option(help="An ONNX file: variant `onnx-cpu`.")] = None,
    tflite: Annotated[Path | None, typer.Option(help="A TFLite file: variant `tflite-cpu`.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="A further form, NAME=FILE; each device takes the fastest that is good enough."),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PROVIDER,...: where a variant is meant to run, best first."),
    ] = None,
    quality: Annotated[
        list[str] | None, typer.Option(help="NAME=NUMBER: a variant's quality, larger is better.")
    ] = None,
    golden_inputs: Annotated[
        Path | None,
        typer.Option(help="CSV rows, or an .npz with an array per input; the outputs become the reference."),
    ] = None,
    golden_from: Annotated[
        Path | None, typer.Option(help="A package whose reference this file must reproduce.")
    ] = None,
    atol: Annotated[float | None, typer.Option(min=0, help="How far golden outputs may be off.")] = None,
    rtol: Annotated[float | None, typer.Option(min=0, help="The same, as a share of the value.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Alarm when the last output is above this.")] = None,
    skip_golden_check: Annotated[
        bool, typer.Option("--skip-golden-check", help="Leave it to the devices' self-test to refuse it.")
    ] = False,
) -> None:
    """Package a model from elsewhere.

    Example: `edgeward package create --onnx model.onnx --golden-inputs rows.csv --model m --version 1 --out package`

    Two forms: `edgeward package create --onnx m.onnx --variant int8=m-int8.onnx --quality onnx-cpu=0.91
    --quality int8=0.90 --golden-inputs images.npz --atol 0.05 --rtol 0.1 --model m --version 2 --out package`
    """
    try:
        from models.bring import Brought, Reference, bring, parse_variant
        from models.package import GOLDEN_ATOL, GOLDEN_RTOL
    except ImportError as error:
        raise _missing(error) from None
    brought = [Brought("onnx-cpu", onnx, "onnx")] if onnx else []
    brought += [Brought("tflite-cpu", tflite, "tflite")] if tflite else []
    brought += [parse_variant(text) for text in variant or []]
    if not brought:
        raise UsageError("expected --onnx, --tflite or --variant")
    if (golden_inputs is None) == (golden_from is None):
        raise UsageError("expected either --golden-inputs or --golden-from")
    names = [item.name for item in brought]
    meant = _pairs(provider or [], names, "--provider")
    worth = _pairs(quality or [], names, "--quality")
    try:
        brought = [
            replace(
                item,
                providers=tuple(filter(None, meant.get(item.name, "").split(","))),
                quality=float(worth[item.name]) if item.name in worth else None,
            )
            for item in brought
        ]
    except ValueError:
        raise UsageError("--quality: expected NAME=NUMBER") from None
    tolerance = None
    if atol is not None or rtol is not None:
        tolerance = (
            atol if atol is not None else GOLDEN_ATOL,
            rtol if rtol is not None else GOLDEN_RTOL,
        )
    package = bring(
        brought,
        folder,
        model=model,
        version=version,
        clock=SystemClock(),
        reference=Reference(golden_inputs, golden_from),
        threshold=threshold,
        check=not skip_golden_check,
        tolerance=tolerance,
    )
    out.print(f"{model} version {version} in {folder}, digest {package.digest}")


def _pairs(texts: list[str], names: list[str], option: str) -> dict[str, str]:
    """`NAME=VALUE` of known variants. Raises UsageError."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in names:
            raise UsageError(
                f"{option}: {text!r} names no variant", hint=f"NAME=VALUE, NAME one of {', '.join(names)}"
            )
        found[name] = value
    return found


def package_check(package: Annotated[Path, typer.Argument(help="A package folder.")]) -> None:
    """Check every byte of a package against its manifest. Example: `edgeward package check package`"""
    from models.package import load_package

    checked = load_package(package)
    out.print(
        f"{checked.manifest.model} version {checked.manifest.version} is whole, digest {checked.digest}"
    )


def release_init(
    keys: Annotated[Path, typer.Option("--keys", help="Where the release keys are, or are to be made.")],
    url: Annotated[str | None, Url] = None,
    token_file: Annotated[Path | None, TokenFile] = None,
) -> None:
    """Make the release keys and install the first release root at the controller.

    Keep the folder off the controller: who holds it decides what the fleet may run.
    Example: `edgeward release init --keys release-keys`
    """
    try:
        from models.release import init
    except ImportError as error:
        raise _missing(error) from None
    with connect(url, token_file) as client:
        init(keys, client, SystemClock())
    out.print(f"release root installed; the keys are in {keys}")


def dataset_list() -> None:
    """List the data sets. Example: `edgeward dataset list`"""
    try:
        from models.datasets import SHIPPED
    except ImportError as error:
        raise _missing(error) from None
    for name, shipped in SHIPPED.items():
        out.print(f"{name}: {shipped.about}")


def dataset_export(
    name: Annotated[str, typer.Argument(help="The data set.")],
    file: Annotated[Path, typer.Option("--out", help="The CSV to write.")],
    rows: Annotated[str, typer.Option(help="Share of rows, in time order.")] = "0:1.0",
) -> None:
    """Write a data set, or a part of it, as CSV.

    Example: `edgeward dataset export shuttle --rows 0.7:1.0 --out heldout.csv`
    """
    try:
        from models.datasets import load_named, write_csv
    except ImportError as error:
        raise _missing(error) from None
    part = load_named(name).part(rows)
    write_csv(part, file)
    out.print(f"{part.rows} rows x {len(part.features)} features written to {file}")
