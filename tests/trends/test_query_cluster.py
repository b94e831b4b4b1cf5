"""The same queries on a Dask cluster give the same answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

distributed = pytest.importorskip("distributed")

from edgeward.errors import UsageError  # noqa: E402
from edgeward.wire.trend_query import TrendQuery  # noqa: E402
from trends.queries import cluster  # noqa: E402
from trends.queries.engine import Engine  # noqa: E402


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Two workers, each a process of its own."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as local,
        distributed.Client(local) as made,
    ):
        yield made


queries = st.builds(
    TrendQuery,
    series=st.sampled_from([["output:score"], ["output:score", "feature:speed"]]),
    rollup=st.sampled_from(["", "1m", "1h", "1d", "7d"]),
    group_by=st.lists(
        st.sampled_from(["site", "stream", "series", "model", "digest", "variant"]), unique=True, max_size=3
    ),
    measures=st.lists(
        st.sampled_from(["count", "missing", "mean", "stddev", "minimum", "maximum", "histogram"]),
        unique=True,
        min_size=1,
    ),
    quantiles=st.lists(st.sampled_from([0.05, 0.5, 0.95, 0.99]), unique=True, max_size=3),
    since=st.sampled_from(["", "2026-03-03"]),
    filters=st.sampled_from([{}, {"site": ["south"]}, {"digest": ["b2"]}]),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(queries, st.integers(0, 1000), st.integers(1, 3))
def test_dask_and_duckdb_agree(
    client: Any, new_plant: Callable[[], Any], query: TrendQuery, seed: int, files_per_task: int
) -> None:
    plant, draw = new_plant(), random.Random(seed)
    for _ in range(draw.randint(1, 4)):
        rows = [
            plant.trend(
                draw.randrange(4 * 1440), [draw.gauss(5, 2) for _ in range(draw.randint(0, 300))],
                digest=draw.choice([plant.old, plant.new]), stream=draw.choice(["press", "oven"]),
                series=draw.choice(["output:score", "feature:speed"]), edges=draw.choice([(5.0,), (5.0,), (4.0, 6.0)]),
                variant=draw.choice(["fp32", "int8"]), missing=draw.randint(0, 2), sketched=draw.random() < 0.95,
            )
            for _ in range(draw.randint(1, 12))
        ]  # fmt: skip
        plant.put(*rows, site=draw.choice(["north", "south"]), flush=draw.random() < 0.8)
    here = plant.engine.ask(query).to_pylist()
    there = cluster.ask(plant.engine, query, client, files_per_task=files_per_task).to_pylist()
    plant.journal.close()
    assert len(here) == len(there)
    for ours, theirs in zip(here, there, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if isinstance(value, float) and not name.startswith("p"):
                assert theirs[name] == pytest.approx(value, rel=1e-9, abs=1e-7), name
            else:
                assert theirs[name] == value, name


def test_a_cluster_query_keeps_to_the_readers_sites(client: Any, plant: Any) -> None:
    plant.put(plant.trend(0, [1.0]))
    plant.put(plant.trend(0, [2.0]), site="south")
    engine = Engine(plant.tables, plant.journal, sites=frozenset({"south"}))
    answer = cluster.ask(engine, TrendQuery(series=["output:score"], rollup="", measures=["mean"]), client)
    assert answer.to_pylist() == [{"mean": 2.0}]


def test_tables_that_are_not_in_a_folder_are_refused(client: Any, plant: Any) -> None:
    plant.put(plant.trend(0, [1.0]))
    plant.tables._place.options = {"some": "option"}
    with pytest.raises(UsageError, match="not in a folder"):
        cluster.ask(plant.engine, TrendQuery(series=["output:score"]), client)
    assert plant.engine.ask(
        TrendQuery(series=["output:score"], rollup="", measures=["count"])
    ).to_pylist() == [{"count": 1}]
