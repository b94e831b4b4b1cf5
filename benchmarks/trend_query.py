"""A trend query over 100 million rows, beside DuckDB alone on the same Parquet files.

    python -m benchmarks.trend_query [--quick] [--folder DIR] [--json FILE]

The rows are synthetic, one minute each, in 90 days: 16 models on 96 devices with 8 series each. They are
written once to a temporary folder as the store's upkeep leaves a day that is over (Delta, a file a day, sorted
as a whole), and removed afterwards; about 1.7 GB, without sketches, which the question does not read.
The question: 90 days of one model's score, by hour. DuckDB alone gets all files and the same question as a
person would write it; it is also asked in the form that this product uses, and the faster of the two is the
limit.
"""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from benchmarks.report import Row, arguments, finish, median, spread
from edgeward.wire.trend_query import TrendQuery
from trends.journal import Journal
from trends.layout import WRITER, sorted_trends
from trends.queries.engine import Engine
from trends.schemas import SCHEMAS
from trends.tables import Tables

DAYS = 90
MODELS, DEVICES, SERIES = 16, 96, 8
FIRST = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
_MINUTE = 60_000_000
_RUNS = 7


def _digest(model: int) -> str:
    return f"{model * 0x9E3779B97F4A7C15 % (1 << 64):016x}" * 4


def _chosen(names: list[str], index: np.ndarray) -> pa.Array:
    return pa.DictionaryArray.from_arrays(
        pa.array(index.astype(np.int32)), pa.array(names)
    ).dictionary_decode()


def day_rows(day: int, minutes: int, seed: int = 7) -> pa.Table:
    """The trend rows of one day, `minutes` per device and series, in the order of arrival (by time)."""
    random = np.random.default_rng([seed, day])
    start = int((FIRST + datetime.timedelta(days=day)).timestamp()) * 1_000_000
    per_minute = DEVICES * SERIES
    n = minutes * per_minute
    row = np.arange(n)
    device, series = row // SERIES % DEVICES, row % SERIES
    bucket = start + row // per_minute * (1440 // minutes) * _MINUTE
    # Sensors have few digits; so have the statistics here, or the folder would be twice as large.
    mean = np.round(series + np.sin(row / per_minute / 60) + random.normal(0, 0.2, n), 3)
    half = np.round(random.gamma(2.0, 0.3, n), 3)
    same = {"site": "north", "epoch": "e", "variant": "fp32", "provider": "CPU"}
    columns: dict[str, pa.Array] = {name: pa.repeat(value, n) for name, value in same.items()}
    columns |= {
        "date": pa.repeat((FIRST + datetime.timedelta(days=day)).date().isoformat(), n),
        "device": _chosen([f"device-{index:02d}" for index in range(DEVICES)], device),
        "seq": pa.array(day * n + row),
        "received": pa.array(bucket + _MINUTE, pa.timestamp("us", tz="UTC")),
        "bucket": pa.array(bucket, pa.timestamp("us", tz="UTC")),
        "width": pa.repeat(_MINUTE, n),
        "stream": _chosen([f"stream-{index}" for index in range(MODELS)], device % MODELS),
        "revision": pa.repeat(1, n),
        "digest": _chosen([_digest(index) for index in range(MODELS)], device % MODELS),
        "series": _chosen(["output:score", *(f"feature:f{index}" for index in range(1, SERIES))], series),
        "count": pa.array(random.integers(50, 61, n)),
        "missing": pa.repeat(0, n),
        "mean": pa.array(mean),
        "m2": pa.array(np.round(half * half * 20, 3)),
        "minimum": pa.array(mean - half),
        "maximum": pa.array(mean + half),
    }
    schema = SCHEMAS["trends"]
    return pa.table(
        [columns[field.name] if field.name in columns else pa.nulls(n, field.type) for field in schema],
        schema=schema,
    )


def generate(folder: Path, minutes: int) -> int:
    rows = 0
    for day in range(DAYS):
        table = sorted_trends(day_rows(day, minutes))
        rows += table.num_rows
        write_deltalake(
            str(folder / "trends"),
            table,
            mode="append",
            partition_by=["date"],
            writer_properties=WRITER,
        )
    DeltaTable(str(folder / "trends")).create_checkpoint()
    return rows


def timed(works: dict[str, Callable[[], int]], runs: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """In turns, so that what else the machine does meets all of them."""
    took: dict[str, list[float]] = {name: [] for name in works}
    found = {name: work() for name, work in works.items()}  # the first run warms the page cache
    for _ in range(runs):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            took[name].append(time.perf_counter() - begin)
    return took, found


_ALONE = """
SELECT {hour} AS start, sum("count") AS "count", sum(missing) AS missing,
    sum("count" * mean) / sum("count") AS mean, min(minimum) AS minimum, max(maximum) AS maximum
FROM read_parquet(?, hive_partitioning=true)
WHERE digest = ? AND series = 'output:score' AND date >= ? AND date < ? GROUP BY 1 ORDER BY 1
"""
_PLAIN = "time_bucket(INTERVAL 1 HOUR, bucket)"
_ARITHMETIC = "make_timestamptz(epoch_us(bucket) // 3600000000 * 3600000000)"


def alone(folder: Path, hour: str) -> int:
    with duckdb.connect() as database:
        database.execute("SET TimeZone='UTC'")
        until = (FIRST + datetime.timedelta(days=DAYS)).date().isoformat()
        values = [
            str(folder / "trends" / "date=*" / "*.parquet"),
            _digest(3),
            FIRST.date().isoformat(),
            until,
        ]
        return len(database.execute(_ALONE.format(hour=hour), values).fetchall())


def measure(folder: Path, rows: int, runs: int) -> tuple[list[Row], list[str]]:
    journal = Journal(folder / "journal.db")
    engine = Engine(Tables(folder, journal), journal)
    until = (FIRST + datetime.timedelta(days=DAYS)).isoformat()

    def query(*measures: str) -> TrendQuery:
        return TrendQuery(
            series=["output:score"], since=FIRST.isoformat(), until=until, rollup="1h",
            filters={"digest": [_digest(3)]}, measures=list(measures),  # type: ignore[arg-type]  # literals below
        )  # fmt: skip

    same = query("count", "missing", "mean", "minimum", "maximum")
    wider = query("count", "mean", "stddev")
    took, found = timed(
        {
            "ours": lambda: engine.ask(same).num_rows,
            "time_bucket": lambda: alone(folder, _PLAIN),
            "arithmetic": lambda: alone(folder, _ARITHMETIC),
            "stddev": lambda: engine.ask(wider).num_rows,
        },
        runs,
    )
    journal.close()
    assert set(found.values()) == {DAYS * 24}, found
    ours = took["ours"]
    forms = {name: took[name] for name in ("time_bucket", "arithmetic")}
    limit = min(median(part) for part in forms.values())
    both = {name: round(median(part), 3) for name, part in forms.items()}
    holds = median(ours) <= 1.3 * limit and median(ours) <= 1.0
    table = [
        Row(
            "90 days by hour, one model",
            "s",
            median(ours),
            limit,
            None,
            "",
            "<= 1.3 x limit, <= 1 s",
            spread(ours),
            holds,
        ),
        Row("the same with stddev", "s", median(took["stddev"]), None, None, "", "", spread(took["stddev"])),
    ]
    return table, [f"{rows:,} rows; DuckDB alone, by form of the question: {both}"]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--folder", type=Path, help="keep the rows here, and use them if they are there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgeward-trends-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        minutes = 72 if options.quick else 1440
        rows = DAYS * minutes * DEVICES * SERIES
        if not (folder / "trends").exists():
            rows = generate(folder, minutes)
        table, notes = measure(folder, rows, 3 if options.quick else _RUNS)
    finish("Trend query", table, options.json, notes)


if __name__ == "__main__":
    main()
