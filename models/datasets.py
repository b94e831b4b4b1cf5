"""Data sets: the ones that ship inside Python packages, and your own CSV files."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeward.errors import InvalidDocument, MissingDependency

LABEL = "label"


@dataclass(frozen=True)
class Dataset:
    """`values` is float32 `[rows, features]` in time order; `labels` is int8 `[rows]`, 1 for an anomaly, or None."""

    name: str
    features: list[str]
    values: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int8] | None

    @property
    def rows(self) -> int:
        return len(self.values)

    def digest(self) -> str:
        """SHA-256 over names, values and labels: the same data has the same digest wherever it came from."""
        state = hashlib.sha256("\x1f".join(self.features).encode())
        state.update(np.ascontiguousarray(self.values, dtype="<f4").tobytes())
        if self.labels is not None:
            state.update(self.labels.tobytes())
        return state.hexdigest()

    def select(self, features: list[str]) -> Dataset:
        """Only these features, in this order. Raises InvalidDocument."""
        for feature in features:
            if feature not in self.features:
                raise InvalidDocument(
                    f"has no column {feature!r}",
                    source=self.name,
                    hint=f"its columns are {', '.join(self.features)}",
                )
        columns = [self.features.index(feature) for feature in features]
        return Dataset(self.name, features, self.values[:, columns], self.labels)

    def part(self, share: str) -> Dataset:
        """The rows of a share such as `0:0.35` (fractions, start inclusive). Raises InvalidDocument."""
        first, last = parse_share(share)
        rows = slice(int(first * self.rows), int(last * self.rows))
        if rows.start >= rows.stop:
            raise InvalidDocument(f"{share} of {self.rows} rows of {self.name} is nothing", field="rows")
        labels = None if self.labels is None else self.labels[rows]
        return Dataset(self.name, self.features, self.values[rows], labels)


def parse_share(text: str) -> tuple[float, float]:
    """`0.7:1.0` as two fractions. Raises InvalidDocument."""
    start, colon, end = text.partition(":")
    try:
        first, last = float(start), float(end)
    except ValueError:
        first, last = 1.0, 0.0
    if not colon or not 0 <= first < last <= 1:
        raise InvalidDocument(
            f"{text!r} is not a share of rows", hint="expected e.g. 0:0.7 with 0 <= a < b <= 1"
        )
    return first, last


@dataclass(frozen=True)
class Shipped:
    """A CSV inside an installed package; `label` names its 0/1 column, `skip` those that are no numbers."""

    package: str
    path: str
    label: str
    about: str
    skip: tuple[str, ...] = ()


SHIPPED = {
    "shuttle": Shipped(
        "river",
        "datasets/shuttle.csv.gz",
        "anomaly",
        "NASA Statlog Shuttle: 49,097 x 9 sensor readings, 3,511 labelled anomalies (river)",
    ),
    "water-flow": Shipped(
        "river",
        "datasets/water-flow.csv",
        "",
        "Flow through a water pipe: 1,268 hourly readings, no labels (river)",
        skip=("Time",),
    ),
}


def load_named(name: str) -> Dataset:
    """Raises InvalidDocument for an unknown name, MissingDependency without the package that ships it."""
    shipped = SHIPPED.get(name)
    if shipped is None:
        raise InvalidDocument(
            f"unknown dataset {name!r}", hint=f"one of {', '.join(SHIPPED)}, or --data FILE.csv"
        )
    found = importlib.util.find_spec(shipped.package)
    if found is None or found.origin is None:
        raise MissingDependency(f"{shipped.package} is not installed", hint="pip install 'edgeward[train]'")
    path = Path(found.origin).parent / shipped.path
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        header = file.readline().strip().split(",")
        kept = [index for index, column in enumerate(header) if column not in shipped.skip]
        table = np.loadtxt(file, delimiter=",", dtype=np.float32, ndmin=2, usecols=kept)
    columns = [header[index] for index in kept]
    features = [column for column in columns if column != shipped.label]
    labels = table[:, columns.index(shipped.label)].astype(np.int8) if shipped.label else None
    return Dataset(name, features, table[:, [columns.index(feature) for feature in features]], labels)


def load_csv(path: Path, features: list[str] | None = None) -> Dataset:
    """Numbers with a header line; a column `label` (0 or 1) is taken as labels.

    Raises InvalidDocument naming file, line and column for anything else.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            # An empty line, as editors leave one at the end, is no row.
            numbered = [(reader.line_num, line) for line in reader if line]
    except OSError as error:
        raise InvalidDocument(f"cannot read it: {error.strerror}", source=str(path)) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidDocument(f"not a CSV file in UTF-8: {error}", source=str(path)) from None
    if not header or not numbered:
        raise InvalidDocument("expected a header line and rows", source=str(path))
    repeated = [name for index, name in enumerate(header) if name in header[:index]]
    if repeated:
        raise InvalidDocument(f"has two columns {repeated[0]!r}", source=str(path))
    wanted = features or [name for name in header if name != LABEL]
    missing = [name for name in wanted if name not in header]
    if missing:
        raise InvalidDocument(
            f"has no column {missing[0]!r}", source=str(path), hint=f"its columns are {', '.join(header)}"
        )
    if not wanted:
        raise InvalidDocument(f"expected a column besides {LABEL!r}", source=str(path))
    columns = [header.index(name) for name in wanted]
    label = header.index(LABEL) if LABEL in header else None
    values = np.empty((len(numbered), len(wanted)), np.float64)
    labels = np.zeros(len(numbered), np.int8)
    for row, (number, line) in enumerate(numbered):
        source = f"{path}:{number}"
        if len(line) != len(header):
            raise InvalidDocument(f"has {len(line)} cells, expected {len(header)}", source=source)
        for target, column in enumerate(columns):
            try:
                values[row, target] = float(line[column])
            except ValueError:
                raise InvalidDocument(
                    f"expected a number, got {line[column]!r}", source=source, field=header[column]
                ) from None
        if label is not None:
            if line[label].strip() not in ("0", "1"):
                raise InvalidDocument(f"expected 0 or 1, got {line[label]!r}", source=source, field=LABEL)
            labels[row] = int(line[label])
    fits = np.abs(values) <= np.finfo(np.float32).max  # false for NaN, too
    if not fits.all():
        row, column = np.argwhere(~fits)[0]
        raise InvalidDocument(
            f"expected a finite number of 32 bits, got {values[row, column]:g}",
            source=f"{path}:{numbered[row][0]}",
            field=wanted[column],
        )
    return Dataset(path.stem, wanted, values.astype(np.float32), None if label is None else labels)


def write_csv(dataset: Dataset, path: Path) -> None:
    """Features and, if there are labels, the column `label`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*dataset.features, *([LABEL] if dataset.labels is not None else [])])
        for index, row in enumerate(dataset.values):
            labels = [] if dataset.labels is None else [int(dataset.labels[index])]
            writer.writerow([*(f"{value:.9g}" for value in row), *labels])
