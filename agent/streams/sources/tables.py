"""Rows of CSV and Parquet files, in chunks. Parquet needs the extra `agent-parquet`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agent.streams.decode import times
from agent.streams.decode.columns import arrival, clean_text, keep_finite, settle_times
from agent.streams.decode.tables import TableForm, delimiter_of, read_rows
from agent.streams.samples import Samples
from edgeward.errors import InvalidDocument, MissingDependency
from edgeward.wire.streams import FilesSource, TimeUnit

CHUNK_ROWS: Final = 1000

# What reads the rows of a file from a given one on: (path, first row) -> parts in order.
Reader = Callable[[Path, int], Iterator[Samples]]


def csv_reader(spec: FilesSource, features: Sequence[str], now: Callable[[], float]) -> Reader:
    """Raises, while rows are read, InvalidDocument for what is no table and OSError for what cannot be read."""

    def read(path: Path, first: int) -> Iterator[Samples]:
        with path.open(encoding="utf-8-sig", newline="") as text:
            try:
                delimiter = delimiter_of(text.readline())
                text.seek(0)
                rows = read_rows(text, delimiter)
                header = next(rows, None)
                if header is None:
                    return
                form = TableForm(header, features, time=spec.time, time_unit=spec.time_unit, key=spec.key)
                rows = islice(rows, first, None)
                while chunk := list(islice(rows, CHUNK_ROWS)):
                    yield form.samples(chunk, now())
            except UnicodeDecodeError as error:
                raise InvalidDocument(f"not UTF-8: {error.reason} at byte {error.start}") from None

    return read


def parquet_reader(spec: FilesSource, features: Sequence[str], now: Callable[[], float]) -> Reader:
    """Raises MissingDependency without pyarrow; while rows are read, the same as `csv_reader`."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependency(
            "Parquet files need pyarrow", hint="pip install 'edgeward[agent-parquet]'"
        ) from error

    def read(path: Path, first: int) -> Iterator[Samples]:
        try:
            with pq.ParquetFile(path) as file:
                present = set(file.schema_arrow.names)
                if not present & set(features):
                    raise InvalidDocument(
                        f"no column is a feature: {clean_text(', '.join(file.schema_arrow.names))!r}"
                    )
                wanted = [name for name in dict.fromkeys((*features, spec.time, spec.key)) if name in present]
                skip = first
                for batch in file.iter_batches(CHUNK_ROWS, columns=wanted):
                    if skip >= batch.num_rows:
                        skip -= batch.num_rows
                        continue
                    rest, skip = batch.slice(skip), 0
                    yield _samples(rest, spec, features, now())
        except (pa.ArrowException, ValueError) as error:
            raise InvalidDocument(f"not Parquet: {error}") from None

    return read


def _samples(batch: Any, spec: FilesSource, features: Sequence[str], arrived: float) -> Samples:
    count = batch.num_rows
    problems: dict[int, str] = {}
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    event_time: npt.NDArray[np.int64] = np.full(count, arrival(arrived))
    if spec.time:
        at = (
            _times(columns[spec.time], spec.time_unit)
            if spec.time in columns
            else np.full(count, times.NO_TIME)
        )
        problem = f"{spec.time}: {times.describe(spec.time_unit)}"
        event_time = settle_times(at, arrived, problem, problems)
    values = np.full((count, len(features)), np.nan)
    for index, name in enumerate(features):
        if name in columns:
            values[:, index] = _numbers(columns[name])
    keep_finite(values, features, problems)
    keys: tuple[str, ...] = ()
    if spec.key:
        cells = columns[spec.key].to_pylist() if spec.key in columns else [None] * count
        keys = tuple("" if cell is None else clean_text(str(cell)) for cell in cells)
    return Samples(event_time, values, keys, problems=problems)


def _numbers(column: Any) -> npt.NDArray[np.float64]:
    """NaN for nulls, and for a whole column that is no numbers: text is no reading, whatever it looks like."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        return np.full(len(column), np.nan)
    numbers = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return np.asarray(numbers, dtype=np.float64)


def _times(column: Any, unit: TimeUnit) -> npt.NDArray[np.int64]:
    import pyarrow as pa

    if pa.types.is_timestamp(column.type):
        # A timestamp says its own unit.
        whole = column.cast(pa.timestamp("us", tz=column.type.tz), safe=False).cast(pa.int64()).to_pylist()
        return times.column(whole, "us")
    return times.column(column.to_pylist(), unit)
