"""The same queries through Dask: each worker merges some of the files, and what they found is merged again.

Workers read the files themselves, so the tables' folder must be where they can reach it under the same path.
They run the same SQL as the engine here; a trend row and many of them merged have one form.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from edgeward.errors import UsageError
from edgeward.wire.trend_query import TrendQuery
from trends.queries.engine import (
    Engine,
    Stop,
    arrow_of,
    batches_of,
    connected,
    make_source,
    merge_details,
    with_details,
)
from trends.queries.plan import Plan, answer_sql, details_sql, merged_sql
from trends.queries.pools import Details

if TYPE_CHECKING:
    from distributed import Client

#: Files of one task: a day has a few, and a task should take longer than its round trip.
FILES = 8

Part = tuple[pa.Table, dict[tuple[object, ...], Details]]


def part(plan: Plan, files: list[str], fresh: pa.Table, models: pa.Table) -> Part:
    """What a worker does: merge the rows of `files` and `fresh`, by key."""
    with tempfile.TemporaryDirectory(prefix="edgeward-query-") as spill, connected(spill) as database:
        make_source(database, files, fresh)
        database.register("models", models)
        merged = arrow_of(database, merged_sql(plan, plan.rows), plan.parameters)
        if not plan.details:
            return merged, {}
        return merged, merge_details(plan, batches_of(database, details_sql(plan), plan.parameters), Stop())


def joined(first: Part, second: Part) -> Part:
    """Two parts as one, not merged yet but for sketches and histograms."""
    details = first[1]
    for key, item in second[1].items():
        details.setdefault(key, Details()).merge(item)
    return pa.concat_tables([first[0], second[0]]), details


def ask(engine: Engine, query: TrendQuery, client: Client, *, files_per_task: int = FILES) -> pa.Table:
    """As `Engine.ask`, with the work on the cluster of `client`.

    Means and deviations may differ from it in the last digits (sums in another order), quantiles only where a
    group has more than 2^15 sketched values. Raises InvalidDocument, and UsageError for tables that are not in a folder.
    """
    prepared = engine.prepare(query)
    if prepared.elsewhere:
        raise UsageError(
            "these tables are not in a folder",
            hint="workers read files; ask on this machine, or use Spark or Trino",
        )
    made, models = prepared.plan, engine.models.names()
    groups = [
        prepared.files[first : first + files_per_task]
        for first in range(0, len(prepared.files), files_per_task)
    ]
    nothing = prepared.fresh.slice(0, 0)
    tasks: list[tuple[list[str], pa.Table]] = [(files, nothing) for files in groups]
    tasks.append(([], prepared.fresh))
    futures: list[Any] = [
        client.submit(part, made, files, fresh, models, pure=False) for files, fresh in tasks
    ]
    parts: list[Part] = client.gather(futures)  # type: ignore[no-untyped-call]  # distributed has no types for it
    whole = parts[0]
    for item in parts[1:]:
        whole = joined(whole, item)
    with tempfile.TemporaryDirectory(prefix="edgeward-query-") as spill, connected(spill) as database:
        database.register("parts_found", whole[0])
        answer = arrow_of(database, answer_sql(made, merged_sql(made, "SELECT * FROM parts_found")), ())
    return with_details(made, answer, whole[1]) if made.details else answer
