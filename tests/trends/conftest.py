"""A trend store with rows of several sites, models and streams, put in as its journal holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import datasketches
import numpy as np
import pytest

from edgeward.identifiers import DeviceName
from edgeward.wire.rows import AlarmRow, ResultRow, Row, TrendRow, encode_rows
from edgeward.wire.topics import Lane
from trends.journal import Journal
from trends.queries.engine import Engine
from trends.tables import Tables

_LANES: dict[type[Row], Lane] = {TrendRow: "trend", ResultRow: "result", AlarmRow: "alarm"}


class Plant:
    #: 2026-03-02, a Monday.
    start = 1_772_409_600_000_000
    minute = 60_000_000
    old, new, other = "a1" * 32, "b2" * 32, "c3" * 32

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = Journal(folder / "journal.db")
        self.tables = Tables(folder / "tables", self.journal)
        self.engine = Engine(self.tables, self.journal)
        self._next = 0

    def put(self, *rows: Row, site: str = "north", device: str = "d1", flush: bool = True) -> None:
        with self.journal.transaction():
            for row in rows:
                lane, encoded = _LANES[type(row)], encode_rows([row])
                self.journal.append(DeviceName(site, device), "e", lane, self.start, self._next, 1, encoded)
                self._next += 1
        if flush:
            self.tables.flush()

    def trend(
        self,
        minute: int,
        values: list[float],
        *,
        digest: str = old,
        stream: str = "press",
        series: str = "output:score",
        variant: str = "fp32",
        edges: tuple[float, ...] = (),
        sketched: bool = True,
        missing: int = 0,
    ) -> TrendRow:
        array = np.array(values, np.float64)
        sketch = datasketches.kll_floats_sketch(200)
        sketch.update(array.astype(np.float32))
        mean = float(array.mean()) if values else 0.0
        histogram = np.bincount(
            np.searchsorted(edges, array, side="right"), minlength=len(edges) + 1
        ).tolist()
        return TrendRow(
            self.start + minute * self.minute, self.minute, stream, 1, digest, variant, "CPU", series, len(values),
            missing, mean, float(((array - mean) ** 2).sum()), float(array.min()) if values else 0.0,
            float(array.max()) if values else 0.0, list(edges), histogram if edges else [],
            bytes(sketch.serialize()) if sketched and values else b"",
        )  # fmt: skip

    def result(self, minute: int, value: float, *, digest: str = old, stream: str = "press") -> ResultRow:
        at = self.start + minute * self.minute
        return ResultRow(at, stream, 1, "k", "se", minute, digest, "fp32", "CPU", {"score": value}, value > 5)

    def alarm(self, minute: int, *, digest: str = old, stream: str = "press") -> AlarmRow:
        at = self.start + minute * self.minute
        return AlarmRow(at, stream, 1, "k", "se", minute, digest, "fp32", "CPU", 9.0, 5.0)


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    made = Plant(tmp_path)
    yield made
    made.journal.close()


@pytest.fixture
def new_plant(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Plant]:
    """For property tests: a fresh one for each example."""
    return lambda: Plant(tmp_path_factory.mktemp("plant"))
