"""Queries over the tables: right, pruned, bound, and refused with the field that is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeward.errors import InvalidDocument, NotFound
from edgeward.wire.trend_query import LineageQuery, TrendQuery, check_query, decode_question
from trends.models import dimension
from trends.queries.engine import Engine, Stop, Stopped
from trends.queries.files import File, Wanted, local_path, prune
from trends.queries.plan import plan
from trends.queries.pools import LIMIT, POINTS, Pool, summed_up

ALL = ["count", "missing", "mean", "stddev", "minimum", "maximum"]


def ask(plant: Any, **changes: Any) -> list[dict[str, Any]]:
    given = {"series": ["output:score"], "rollup": "", **changes}
    answer: list[dict[str, Any]] = plant.engine.ask(TrendQuery(**given)).to_pylist()
    return answer


def test_figures_are_those_of_all_values_and_late_ones_count_where_they_belong(plant: Any) -> None:
    plant.put(plant.trend(0, [1.0, 2.0], missing=3), plant.trend(61, [10.0]))
    plant.put(plant.trend(1, [3.0, 4.0]), flush=False)
    first, second = ask(plant, rollup="1h", quantiles=[0.5, 0.95])
    assert (first["count"], first["missing"], first["mean"]) == (4, 3, 2.5)
    assert first["stddev"] == pytest.approx(float(np.std([1.0, 2.0, 3.0, 4.0])))
    assert (first["minimum"], first["maximum"], first["p50"], first["p95"]) == (1.0, 4.0, 2.0, 4.0)
    assert first["start"].isoformat() == "2026-03-02T00:00:00+00:00"
    assert (second["count"], second["p50"]) == (1, 10.0)


def test_rows_without_values_count_as_missing_and_change_nothing_else(plant: Any) -> None:
    plant.put(plant.trend(0, [5.0, 7.0]), plant.trend(1, [], missing=4))
    (row,) = ask(plant, quantiles=[0.5])
    assert (row["count"], row["missing"], row["mean"], row["minimum"], row["maximum"]) == (
        2,
        4,
        6.0,
        5.0,
        7.0,
    )
    assert row["stddev"] == 1.0 and row["p50"] == 5.0
    plant.put(plant.trend(1500, [], missing=2))
    _, empty = ask(plant, rollup="1d")
    assert (empty["count"], empty["missing"], empty["mean"], empty["stddev"], empty["maximum"]) == (
        0,
        2,
        None,
        None,
        None,
    )


def test_weeks_begin_on_monday(plant: Any) -> None:
    plant.put(plant.trend(0, [1.0]), plant.trend(7 * 1440 - 1, [1.0]), plant.trend(7 * 1440, [1.0]))
    assert [row["count"] for row in ask(plant, rollup="7d")] == [2, 1]


def test_histograms_add_up_and_are_null_where_edges_differ(plant: Any) -> None:
    plant.put(plant.trend(0, [1.0, 6.0], edges=(5.0,)), plant.trend(1, [7.0], edges=(5.0,)))
    (row,) = ask(plant, measures=["histogram"])
    assert row == {"edges": [5.0], "histogram": [1, 2]}
    plant.put(plant.trend(2, [7.0], edges=(6.0,)))
    assert ask(plant, measures=["histogram"]) == [{"edges": None, "histogram": None}]


def test_groups_and_filters(plant: Any) -> None:
    plant.put(
        plant.trend(0, [1.0]), plant.trend(0, [2.0], digest=plant.new), plant.trend(0, [3.0], stream="oven")
    )
    plant.put(plant.trend(0, [9.0], digest=plant.new), site="south")
    by_site = ask(plant, group_by=["site", "stream"], measures=["count"])
    assert by_site == [
        {"site": "north", "stream": "oven", "count": 1},
        {"site": "north", "stream": "press", "count": 2},
        {"site": "south", "stream": "press", "count": 1},
    ]
    for filters, count in (
        ({"digest": [plant.new]}, 2),
        ({"digest": [plant.new[:6]]}, 2),
        ({"digest": ["b3"]}, None),
        ({"digest": [plant.new[:4], plant.old]}, 4),
        ({"site": ["north"], "stream": ["press", "oven"]}, 3),
        ({"site": []}, None),
        ({"site": ["north' OR 1=1 --"]}, None),
    ):
        found = ask(plant, filters=filters, measures=["count"])
        assert (found[0]["count"] if found else None) == count, filters


def test_models_group_and_filter_by_what_the_dimension_knows(plant: Any) -> None:
    plant.put(
        plant.trend(0, [1.0]),
        plant.trend(0, [2.0], digest=plant.new),
        plant.trend(0, [3.0], digest=plant.other),
    )
    with pytest.raises(NotFound, match="models --refresh"):
        ask(plant, filters={"model": ["pump"]})
    known = dimension(plant.engine.seen(), plant.engine.models.table(), {}).to_pylist()
    for row, version in zip(known, (1, 2), strict=False):
        row |= {"model": "pump", "version": version}
    plant.engine.models.write(pa.Table.from_pylist(known, schema=plant.engine.models.table().schema))
    found = ask(plant, group_by=["model", "version"], measures=["mean"])
    assert sorted(found, key=str) == [
        {"model": "pump", "version": 1, "mean": 1.0}, {"model": "pump", "version": 2, "mean": 2.0},
        {"model": None, "version": None, "mean": 3.0},
    ]  # fmt: skip
    assert ask(plant, filters={"model": ["pump"], "version": ["2"]}, measures=["mean"]) == [{"mean": 2.0}]
    assert ask(plant, filters={"model": ["pump"], "digest": [plant.other]}, measures=["mean"]) == []


def test_results_are_asked_the_same_way(plant: Any) -> None:
    plant.put(plant.result(0, 1.0), plant.result(1, 3.0), plant.result(2, 9.0, digest=plant.new))
    (row,) = ask(plant, source="results", filters={"digest": [plant.old]}, measures=ALL)
    assert (row["count"], row["mean"], row["stddev"], row["maximum"]) == (2, 2.0, 1.0, 3.0)
    two = ask(
        plant,
        source="results",
        series=["output:score", "output:none"],
        group_by=["series"],
        measures=["count", "missing"],
    )
    assert two == [
        {"series": "output:none", "count": 0, "missing": 3}, {"series": "output:score", "count": 3, "missing": 0}
    ]  # fmt: skip


def test_an_older_file_without_a_column_is_read(plant: Any) -> None:
    from deltalake import write_deltalake

    from trends.schemas import SCHEMAS

    plant.put(plant.trend(0, [1.0]), flush=False)
    rows = plant.engine._waiting("trends")[0].drop_columns(["sketch"])
    write_deltalake(plant.tables.uri("trends"), rows, partition_by=["date"])
    plant.put(plant.trend(1440, [2.0]))
    assert "sketch" in SCHEMAS["trends"].names
    assert [row["p50"] for row in ask(plant, rollup="1d", quantiles=[0.5])] == [None, 2.0]


def test_only_files_that_can_hold_the_answer_are_opened(plant: Any) -> None:
    for day in range(4):
        plant.put(plant.trend(day * 1440, [1.0], digest=(plant.old, plant.new)[day % 2]))
    query = TrendQuery(
        series=["output:score"], since="2026-03-03", until="2026-03-05", filters={"digest": [plant.new[:8]]}
    )
    prepared = plant.engine.prepare(query)
    assert len(prepared.files) == 1 and "date=2026-03-03" in prepared.files[0]
    assert len(plant.engine.prepare(TrendQuery(series=["output:score"])).files) == 4
    assert plant.engine.prepare(TrendQuery(series=["output:other"])).files == []


@given(
    st.sets(st.text("abc", min_size=1, max_size=4), min_size=1),
    st.text("abc", min_size=1, max_size=4),
    st.integers(1, 4),
)
def test_pruning_never_loses_a_file_that_holds_the_value(held: set[str], wanted: str, cut: int) -> None:
    """Statistics may be cut off, a value may be the beginning of one."""
    file = File("f", "2026-03-02", 1, {"digest": min(held)[:cut]}, {"digest": max(held)[:cut]})
    if any(value.startswith(wanted) for value in held):
        assert prune([file], Wanted(values={"digest": [wanted]})) == [file]


def test_a_path_that_leads_out_of_the_table_is_refused(plant: Any) -> None:
    assert local_path(plant.folder, "date=1/a%20b.parquet") == f"{plant.folder}/date=1/a b.parquet"
    for path in ("../journal.db", "/etc/passwd", "a/../../x", "%2e%2e/x"):
        with pytest.raises(InvalidDocument, match="outside of the table"):
            local_path(plant.folder, path)


def test_a_reader_of_some_sites_sees_no_other(plant: Any) -> None:
    plant.put(plant.trend(0, [1.0]), plant.result(0, 1.0))
    plant.put(plant.trend(0, [2.0]), plant.result(0, 2.0), site="south")
    plant.engine = Engine(plant.tables, plant.journal, sites=frozenset({"south"}))
    assert ask(plant, group_by=["site"], measures=["mean"]) == [{"site": "south", "mean": 2.0}]
    assert ask(plant, filters={"site": ["north"]}) == []
    assert ask(plant, source="results", measures=["mean"]) == [{"mean": 2.0}]
    rows = [
        row for batch in plant.engine.lineage(LineageQuery(digest=plant.old)) for row in batch.to_pylist()
    ]
    assert [row["site"] for row in rows] == ["south"]
    assert plant.engine.count("results", ["site"], {}, plant.start, plant.start + 1) == {("south",): 1}


def test_lineage_has_every_prediction_in_order_of_time(plant: Any) -> None:
    plant.put(
        *(plant.result(minute, 1.0, digest=(plant.old, plant.new)[minute % 2]) for minute in (5, 3, 2, 1, 0))
    )
    rows = [
        row for batch in plant.engine.lineage(LineageQuery(digest=plant.new[:6])) for row in batch.to_pylist()
    ]
    assert [row["source_seq"] for row in rows] == [1, 3, 5]
    assert rows[0]["outputs"] == [("score", 1.0)] and rows[0]["provider"] == "CPU"
    (none,) = plant.engine.lineage(LineageQuery(digest=plant.other))
    assert none.num_rows == 0 and "source_seq" in none.schema.names


def test_a_query_that_is_stopped_says_why(plant: Any) -> None:
    plant.put(plant.trend(0, [1.0]), plant.result(0, 1.0))
    stop = Stop()
    stop.stop("it took longer than 1 s")
    with pytest.raises(Stopped, match="longer than 1 s"):
        plant.engine.ask(TrendQuery(series=["output:score"], quantiles=[0.5]), stop)
    with pytest.raises(Stopped, match="longer than 1 s"):
        list(plant.engine.lineage(LineageQuery(digest=plant.old), stop))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"series": []}, "series: names no series"),
        ({"series": ["score"]}, "'score' is not a series"),
        ({"series": ["feature:x"], "source": "results"}, "ask trends for features"),
        ({"rollup": "91d"}, "rollup: '91d' is not a width"),
        ({"rollup": "0m"}, "rollup: '0m' is not a width"),
        ({"rollup": "1²h"}, "is not a width"),
        ({"since": "now"}, "since: 'now' is not a time"),
        ({"since": "2026-03-02", "until": "2026-03-02"}, "until: .* is not after"),
        ({"quantiles": [1.0]}, "quantiles: 1.0 is no quantile"),
        ({"quantiles": [math.nan]}, "quantiles: nan is no quantile"),
        ({"quantiles": [0.5] * 21}, "quantiles: more than 20"),
        ({"quantiles": [0.5], "source": "results"}, "neither sketches nor histograms"),
        ({"measures": [], "quantiles": []}, "measures: asks for nothing"),
        ({"limit": 0}, "limit: 0 is out of range"),
        ({"group_by": ["site", "site"]}, "groupBy: a column stands there twice"),
        ({"filters": {"series": ["x"]}}, "filters.series: is no filter"),
        ({"filters": {"site": ["x" * 300]}}, "filters.site: a value is longer"),
        ({"filters": {"site": ["x"] * 1001}}, "filters.site: more than 1000"),
    ],
)  # fmt: skip
def test_a_bad_question_names_its_field(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidDocument, match=says):
        check_query(TrendQuery(**{"series": ["output:score"], **changes}))


@pytest.mark.parametrize(
    "body",
    [
        b"{}", b"[]", b"{", b'{"trend": {"series": ["output:x"], "groupBy": ["1; drop table trends"]}}',
        b'{"trend": {"series": ["output:x"], "table": "x"}}', b'{"trend": {"series": "output:x"}}',
        b'{"lineage": {"digest": "xyz"}}', b'{"lineage": {"digest": "a1a1a1"}, "trend": {"series": ["output:x"]}}',
        b'{"trend": {"series": ["output:x"], "filters": {"colour": ["red"]}}}',
    ],
)  # fmt: skip
def test_a_body_that_is_no_question_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidDocument):
        decode_question(body)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=3), st.text(min_size=1, max_size=20))
def test_nothing_that_a_person_wrote_is_in_the_sql(values: list[str], name: str) -> None:
    query = TrendQuery(series=["output:" + name], filters={"site": values, "digest": values})
    made = plan(query, check_query(TrendQuery(series=["output:x"])), None)
    other = plan(
        TrendQuery(series=["output:x"], filters={"site": ["y"] * len(values), "digest": ["y"] * len(values)}),
        check_query(TrendQuery(series=["output:x"])), None,
    )  # fmt: skip
    if all(len(value) != 64 for value in values):
        assert made.rows == other.rows
    assert made.parameters.count("output:" + name) >= 1
    assert duckdb.extract_statements(made.rows)


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 50)), min_size=1, max_size=300),
    st.integers(1, 40),
)
def test_summing_up_keeps_the_weight_and_moves_ranks_by_half_a_share(
    items: list[tuple[float, int]], points: int
) -> None:
    made = summed_up(list(items), points)
    total = sum(weight for _, weight in items)
    assert sum(weight for _, weight in made) == total and len(made) <= points
    for value, _ in made:
        held = sum(weight for item, weight in made if item < value)
        below = sum(weight for item, weight in items if item < value)
        upto = sum(weight for item, weight in items if item <= value)
        share = total / points + 1
        assert below - share <= held <= upto + share


def test_a_large_pool_stays_small_and_right() -> None:
    import datasketches

    random = np.random.default_rng(5)
    pool, values = Pool(), random.gamma(2.0, size=400_000)
    for part in np.split(values, 4000):
        sketch = datasketches.kll_floats_sketch(200)
        sketch.update(part.astype(np.float32))
        pool.add(len(part), bytes(sketch.serialize()))
    held = len(pool._items) + sum(len(level or ()) for level in pool._levels)
    assert held < LIMIT + 12 * POINTS
    for point, value in zip((0.01, 0.5, 0.99), pool.quantiles((0.01, 0.5, 0.99)), strict=True):
        assert value is not None
        assert abs(float((values <= value).mean()) - point) < 0.005


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30), min_size=1, max_size=8))
def test_any_split_into_buckets_gives_the_figures_of_all_values(
    new_plant: Callable[[], Any], parts: list[list[float]]
) -> None:
    plant = new_plant()
    plant.put(*(plant.trend(minute, part) for minute, part in enumerate(parts)))
    (row,) = ask(plant, quantiles=[0.25, 0.5, 0.9])
    plant.journal.close()
    flat = sorted(value for part in parts for value in part)
    assert row["count"] == len(flat)
    assert row["mean"] == pytest.approx(np.mean(flat), abs=1e-9)
    assert row["stddev"] == pytest.approx(np.std(flat), abs=1e-6)
    for name, point in (("p25", 0.25), ("p50", 0.5), ("p90", 0.9)):
        assert row[name] == flat[max(1, math.ceil(point * len(flat))) - 1]
