"""A day of trends, sorted as a whole: what a compaction cannot do that joins files one after the other.

In a process of its own: it takes several hundred megabytes for a while, which an ingester must not.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, write_deltalake

from edgeward.errors import EdgewardError
from trends.layout import ORDER, WRITER
from trends.queries.files import data_files, local_path

BATCH = 8_192


def sort_apart(root: str, day: str, folder: Path | None, target_bytes: int, commit: dict[str, str]) -> None:
    """`sort_day` in a process that ends with it; `commit` is what the commit carries. Raises what that raises."""
    with (
        TemporaryDirectory(prefix="edgeward-sort-", dir=folder) as scratch,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart,
    ):
        apart.submit(_sort, root, day, scratch, target_bytes, commit).result()


def _sort(root: str, day: str, scratch: str, target_bytes: int, commit: dict[str, str]) -> None:
    hooks = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
    sort_day(root, day, scratch, target_bytes, CommitProperties(custom_metadata=commit), hooks)


def sort_day(
    root: str,
    day: str,
    scratch: str,
    target_bytes: int,
    commit: CommitProperties,
    hooks: PostCommitHookProperties,
) -> None:
    """Write the rows of one day of the table in the folder `root` anew, sorted as a whole, as one commit.

    What does not fit into memory goes through files in `scratch`. Raises DeltaError, duckdb.Error, and
    EdgewardError instead of losing a row.
    """
    opened = DeltaTable(root)
    files = [local_path(Path(root), file.path) for file in data_files(opened) if file.day == day]
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": "128MB",
        "threads": 1,
        "preserve_insertion_order": False,
        "temp_directory": scratch,
    }
    with duckdb.connect(":memory:", config=config) as database:
        held = "read_parquet(?, hive_partitioning=false, union_by_name=true)"
        models = database.execute(
            f"SELECT digest, count(*) FROM {held} GROUP BY 1 ORDER BY 1",  # noqa: S608  # a constant
            [files],
        ).fetchall()

        def batches() -> Iterator[pa.RecordBatch]:
            # One model after the other: of each, the sort takes its share of the day only.
            for digest, count in models:
                ordered = database.sql(
                    f"SELECT ?::VARCHAR AS date, * FROM {held} WHERE digest IS NOT DISTINCT FROM ?"  # noqa: S608  # names of this module
                    f" ORDER BY {', '.join(ORDER)}",
                    params=[day, files, digest],
                )
                for batch in ordered.to_arrow_reader(BATCH):
                    count -= batch.num_rows
                    yield batch
                if count:
                    raise EdgewardError(
                        f"{day}: {count} rows of model {digest} got lost while they were sorted"
                    )

        first = next(source := batches())
        write_deltalake(
            opened,
            pa.RecordBatchReader.from_batches(first.schema, chain([first], source)),
            mode="overwrite",
            predicate=f"date = '{day}'",
            target_file_size=target_bytes,
            writer_properties=WRITER,
            commit_properties=commit,
            post_commithook_properties=hooks,
        )
