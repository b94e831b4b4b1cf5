"""CSV: one sample per line, in a message or in a file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from agent.streams.decode import times
from agent.streams.decode.columns import (
    MAX_SAMPLES,
    arrival,
    check_count,
    clean_text,
    keep_finite,
    settle_times,
)
from agent.streams.samples import Samples
from edgeward.errors import InvalidDocument
from edgeward.wire.streams import PayloadSource, TimeUnit


class TableForm:
    """Which columns of a header are the time, the key and the features.

    Raises InvalidDocument when none of the columns is a feature, or one that is needed occurs twice.
    A feature without a column is missing in every sample.
    """

    def __init__(
        self,
        header: Sequence[str],
        features: Sequence[str],
        *,
        time: str = "",
        time_unit: TimeUnit = "s",
        key: str = "",
        fields: Mapping[str, str] | None = None,
    ) -> None:
        names = [name.strip() for name in header]
        columns = [(fields or {}).get(feature, feature) for feature in features]
        for name in {time, key, *columns} - {""}:
            if names.count(name) > 1:
                raise InvalidDocument(f"column {name!r} occurs {names.count(name)} times")
        where = {name: index for index, name in enumerate(names)}
        self.features = tuple(features)
        self.columns = [where.get(name) for name in columns]
        self.width = len(names)
        self._time, self._time_unit, self._time_name = where.get(time), time_unit, time
        self._key = where.get(key) if key else None
        self._keyed = bool(key)
        if all(column is None for column in self.columns):
            raise InvalidDocument(
                f"no column is a feature: {clean_text(', '.join(names))!r}",
                hint=f"expected {', '.join(columns[:5])}",
            )

    def samples(self, rows: Sequence[Sequence[str]], arrived: float) -> Samples:
        """`rows` of text cells as samples. A line with too many or too few cells is a problem."""
        problems: dict[int, str] = {}
        if any(len(row) != self.width for row in rows):
            rows = [self._fit(row, index, problems) for index, row in enumerate(rows)]
        columns = list(zip(*rows, strict=True)) if rows else [()] * self.width
        at = self._times(columns, len(rows), arrived, problems)
        values = np.full((len(rows), len(self.features)), np.nan)
        for index, column in enumerate(self.columns):
            if column is not None:
                values[:, index] = _numbers(columns[column])
        keep_finite(values, self.features, problems)
        keys: tuple[str, ...] = ()
        if self._keyed:
            cells = columns[self._key] if self._key is not None else [""] * len(rows)
            keys = tuple(clean_text(cell) for cell in cells)
        return Samples(at, values, keys, problems=problems)

    def _fit(self, row: Sequence[str], index: int, problems: dict[int, str]) -> Sequence[str]:
        if len(row) == self.width:
            return row
        # Which cell is missing cannot be told, so none is trusted.
        problems[index] = f"{len(row)} cells in a line, expected {self.width}"
        return [""] * self.width

    def _times(
        self, columns: Sequence[Sequence[str]], count: int, arrived: float, problems: dict[int, str]
    ) -> npt.NDArray[np.int64]:
        if not self._time_name:
            return np.full(count, arrival(arrived))
        cells = columns[self._time] if self._time is not None else [""] * count
        misfits = dict(problems)
        at = settle_times(
            times.of_cells(cells, self._time_unit),
            arrived,
            f"{self._time_name}: {times.describe(self._time_unit)}",
            problems,
        )
        problems.update(misfits)
        return at


class CsvDecoder:
    """`columns` name the cells; without them the message's first line does. The delimiter is told from it."""

    def __init__(self, source: PayloadSource, features: Sequence[str]) -> None:
        for name in source.fields:
            if name not in features:
                raise InvalidDocument("not one of the features", field=f"spec.source.fields.{name}")
        self._source = source
        self._features = tuple(features)
        self._form = self._form_of(source.columns) if source.columns else None

    def decode(self, payload: bytes, arrived: float, topic: str = "") -> list[Samples]:
        """Raises InvalidDocument for what is no text or has no column that is a feature."""
        try:
            text = payload.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InvalidDocument(f"not UTF-8: {error.reason} at byte {error.start}") from None
        rows = read_rows(io.StringIO(text, newline=""), delimiter_of(text.partition("\n")[0]))
        first = next(rows, None)
        if first is None:
            return []
        form = self._form or self._form_of(first)
        lines = list(islice(rows, MAX_SAMPLES + 1))
        if self._form is not None and [cell.strip() for cell in first] != self._source.columns:
            lines.insert(0, first)
        check_count(len(lines))
        return [form.samples(lines, arrived)] if lines else []

    def _form_of(self, header: Sequence[str]) -> TableForm:
        source = self._source
        return TableForm(
            header,
            self._features,
            time=source.time,
            time_unit=source.time_unit,
            key=source.key,
            fields=source.fields,
        )


def delimiter_of(line: str) -> str:
    """Comma, unless the first line has none but semicolons or tabs."""
    return next((mark for mark in ",;\t" if mark in line), ",")


def read_rows(text: Iterator[str] | io.TextIOBase, delimiter: str) -> Iterator[list[str]]:
    """The rows of cells, blank lines left out. Raises InvalidDocument where the table is broken."""
    reader = csv.reader(text, delimiter=delimiter)
    try:
        yield from (row for row in reader if row)
    except csv.Error as error:
        raise InvalidDocument(f"not CSV: line {reader.line_num}: {error}") from None


def _numbers(cells: Sequence[str]) -> npt.NDArray[np.float64]:
    """`[n]`, NaN for an empty cell and for what is no number."""
    # Python's float takes 1_000, which no sensor means.
    if "_" not in "".join(cells):
        try:
            return np.fromiter(map(float, cells), np.float64, len(cells))
        except ValueError:
            pass
    return np.fromiter(map(_number, cells), np.float64, len(cells))


def _number(cell: str) -> float:
    try:
        return float(cell) if "_" not in cell else np.nan
    except ValueError:
        return np.nan
