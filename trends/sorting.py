"""A day of trends, sorted as a whole: what a compaction cannot do that joins files one after the other.

In a process of its own: it takes several hundred megabytes for a while, which an ingester must not. The file is
written here and added to the table by itself, since deltalake's own writers do not keep an order.
"""

from __future__ import annotations

import json
import shutil
import uuid
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties
from deltalake.transaction import AddAction

from edgeward.errors import EdgewardError
from trends.layout import ORDER, ROW_GROUP
from trends.queries.files import COLUMNS, data_files, local_path
from trends.schemas import PARTITIONS, SCHEMAS

_SCRATCH = "edgeward-sort-"
_SCHEMA = pa.schema([field for field in SCHEMAS["trends"] if field.name != "date"])


def sort_apart(root: str, day: str, folder: Path | None, commit: dict[str, str]) -> None:
    """`sort_day` in a process that ends with it; `commit` is what the commit carries. Raises what that raises."""
    if folder is not None:
        for left in folder.glob(f"{_SCRATCH}*"):  # by a store that was killed
            shutil.rmtree(left, ignore_errors=True)
    with (
        TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart,
    ):
        apart.submit(sort_day, root, day, scratch, commit).result()


def sort_day(root: str, day: str, scratch: str, commit: dict[str, str]) -> None:
    """Write the rows of one day of the table in the folder `root` anew, sorted as a whole, as one commit.

    What does not fit into memory goes through files in `scratch`, on the same file system. Raises DeltaError,
    duckdb.Error, and EdgewardError instead of losing a row.
    """
    opened = DeltaTable(root)
    unknown = {field.name for field in opened.schema().fields} - set(SCHEMAS["trends"].names)
    if unknown:
        raise EdgewardError(f"trends has columns that are not this version's: {', '.join(sorted(unknown))}")
    old = [file for file in data_files(opened) if file.day == day]
    made = Path(scratch) / f"part-{uuid.uuid4()}.snappy.parquet"
    rows, bounds = _write(made, [local_path(Path(root), file.path) for file in old], scratch)
    if rows != sum(file.rows for file in old):
        raise EdgewardError(
            f"trends of {day}: {rows} rows when sorted, {sum(file.rows for file in old)} before"
        )
    path = f"date={day}/{made.name}"
    (Path(root) / path).parent.mkdir(exist_ok=True)
    made.rename(Path(root) / path)
    stats = {
        "numRecords": rows,
        "minValues": {name: low for name, (low, _) in bounds.items()},
        "maxValues": {name: high for name, (_, high) in bounds.items()},
    }
    status = (Path(root) / path).stat()
    opened.create_write_transaction(
        [
            AddAction(
                path, status.st_size, {"date": day}, int(status.st_mtime * 1000), False, json.dumps(stats)
            )
        ],
        "overwrite",
        opened.schema(),
        PARTITIONS["trends"],
        partition_filters=[("date", "=", day)],
        commit_properties=CommitProperties(custom_metadata=commit),
        post_commithook_properties=PostCommitHookProperties(
            create_checkpoint=False, cleanup_expired_logs=False
        ),
    )


def _write(path: Path, files: list[str], scratch: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """How many rows were written, and the least and greatest value of the columns that questions filter by."""
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": "192MB",
        "threads": 1,
        "preserve_insertion_order": False,
        "temp_directory": scratch,
    }
    with (
        duckdb.connect(":memory:", config=config) as database,
        pq.ParquetWriter(path, _SCHEMA, compression="snappy", store_schema=False) as writer,
    ):
        held = "read_parquet(?, hive_partitioning=false, union_by_name=true)"
        bounds = ", ".join(f"min({name}), max({name})" for name in COLUMNS)
        facts = database.execute(f"SELECT {bounds} FROM {held}", [files]).fetchone() or ()  # noqa: S608  # names of this package
        models = database.execute(f"SELECT DISTINCT digest FROM {held} ORDER BY 1", [files]).fetchall()  # noqa: S608  # a constant
        there = {row[0] for row in database.execute(f"DESCRIBE SELECT * FROM {held}", [files]).fetchall()}  # noqa: S608  # a constant
        columns = ", ".join(name if name in there else f"NULL AS {name}" for name in _SCHEMA.names)
        rows, parts, waiting = 0, list[pa.Table](), 0
        # One model after the other: of each, the sort takes its share of the day only.
        for (digest,) in models:
            ordered = database.sql(
                f"SELECT {columns} FROM {held} WHERE digest IS NOT DISTINCT FROM ? ORDER BY {', '.join(ORDER)}",  # noqa: S608  # names of this package
                params=[files, digest],
            )
            for batch in ordered.to_arrow_reader(8_192):
                rows += batch.num_rows
                waiting += batch.num_rows
                parts.append(pa.Table.from_batches([batch]).cast(_SCHEMA))
                if waiting >= ROW_GROUP:
                    writer.write_table(pa.concat_tables(parts), row_group_size=ROW_GROUP)
                    parts, waiting = [], 0
        if parts:
            writer.write_table(pa.concat_tables(parts), row_group_size=ROW_GROUP)
    return rows, {
        name: (facts[2 * at], facts[2 * at + 1])
        for at, name in enumerate(COLUMNS)
        if facts[2 * at] is not None
    }
