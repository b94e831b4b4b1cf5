"""Checks of readings against a naive reference, over any split into batches."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.streams import keys as keys_module
from agent.streams.keys import Recent, groups
from agent.streams.quality import Quality
from agent.streams.samples import Samples
from edgeward.wire.streams import Check

NOW = 1_700_000_000.0
CHECKS = {
    "a": Check(minimum=-1.0, maximum=2.0, stuck_after=3),
    "c": Check(maximum=1.0),
    "d": Check(stuck_after=2),
}
FEATURES = ["a", "b", "c", "d"]


def samples(
    rows: list[list[float]], keys: tuple[str, ...] = (), problems: dict[int, str] | None = None
) -> Samples:
    return Samples(
        round(NOW * 1e6) + np.arange(len(rows), dtype=np.int64),
        np.array(rows, dtype=float).reshape(len(rows), len(rows[0]) if rows else 4),
        keys,
        problems=problems or {},
    )


def naive(rows: list[list[float]], keys: list[str]) -> tuple[set[int], Counter[str]]:
    bad: set[int] = set()
    counts: Counter[str] = Counter()
    runs: dict[tuple[str, str], tuple[float, int]] = {}
    for index, (row, key) in enumerate(zip(rows, keys, strict=True)):
        for name, value in zip(FEATURES, row, strict=True):
            check = CHECKS.get(name, Check())
            if not math.isfinite(value):
                counts[f"missing:{name}"] += 1
                bad.add(index)
                continue
            if (check.minimum is not None and value < check.minimum) or (
                check.maximum is not None and value > check.maximum
            ):
                counts[f"range:{name}"] += 1
                bad.add(index)
            last, length = runs.get((name, key), (math.nan, 0))
            runs[name, key] = (value, length + 1 if value == last else 1)
            if check.stuck_after is not None and runs[name, key][1] >= check.stuck_after:
                counts[f"stuck:{name}"] += 1
                bad.add(index)
    return bad, counts


READING = st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.5, -3.0, math.nan, math.inf, -math.inf, 1e308])
TABLE = st.lists(st.tuples(st.sampled_from("xyz"), st.lists(READING, min_size=4, max_size=4)), max_size=30)


@settings(deadline=None)
@given(table=TABLE, cuts=st.lists(st.integers(0, 30), max_size=4), keyed=st.booleans())
def test_any_split_marks_and_counts_like_one_reading_at_a_time(
    table: list[tuple[str, list[float]]], cuts: list[int], keyed: bool
) -> None:
    rows = [row for _, row in table]
    keys = [key if keyed else "" for key, _ in table]
    quality = Quality(FEATURES, CHECKS)
    marked: set[int] = set()
    bounds = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    for first, stop in itertools.pairwise(bounds):
        batch = samples(rows[first:stop], tuple(keys[first:stop]) if keyed else ())
        marked |= {first + index for index in quality.apply(batch, NOW).problems}
    assert (marked, quality.counts) == naive(rows, keys)


def test_the_problem_names_feature_reading_and_limit() -> None:
    quality = Quality(FEATURES, CHECKS)
    rows = [[5, 0, 0, 1], [-4, 0, 0, 1], [0, math.nan, 0, 2], [0, math.inf, 0, 3]]
    got = quality.apply(samples(rows, problems={3: "unit"}), NOW)
    assert got.problems == {
        0: "a: 5 is above the maximum 2",
        1: "a: -4 is below the minimum -1",
        2: "b: missing",
        3: "unit",
    }
    again = quality.apply(samples([[0, 0, 0, 3]]), NOW)
    assert again.problems == {0: "a: stuck at 0 for 3 readings, the limit is 3"}
    assert quality.counts["stuck:d"] == 2


def test_good_samples_come_back_as_the_same_object() -> None:
    quality = Quality(FEATURES, {"a": Check(minimum=0.0)})
    good = samples([[1, 2, 3, 4]])
    assert quality.apply(good, NOW) is good
    assert quality.apply(samples([]), NOW).problems == {}


def test_images_pass_unchanged() -> None:
    images = Samples(np.full(2, round(NOW * 1e6)), np.zeros((2, 4, 4, 3), np.uint8))
    assert Quality([], {}).apply(images, NOW) is images


def test_finite_readings_whose_sum_overflows_are_not_missing() -> None:
    quality = Quality(["a", "b"], {})
    assert quality.apply(samples([[1e308, 1e308]]), NOW).problems == {}


def test_the_memory_of_keys_is_bounded() -> None:
    quality = Quality(["d"], {"d": Check(stuck_after=2)})
    for start in range(0, 3 * keys_module.MAX_KEYS, 1000):
        quality.apply(
            samples([[float(i)] for i in range(1000)], tuple(f"k{start + i}" for i in range(1000))), NOW
        )
    assert len(quality._runs[0]) == keys_module.MAX_KEYS
    recent: Recent[int] = Recent(2)
    for key in ("a", "b", "a", "c"):
        recent[key] = 1
    assert list(recent) == ["a", "c"]


def test_groups_keep_the_order_of_samples_and_of_first_appearance() -> None:
    got = [
        (key, None if where is None else where.tolist())
        for key, where in groups(("b", "a", "b", "a", "c"), 5)
    ]
    assert got == [("b", [0, 2]), ("a", [1, 3]), ("c", [4])]
    assert list(groups((), 3)) == [("", None)]
    assert list(groups(("k", "k"), 2)) == [("k", None)]
    assert list(groups((), 0)) == []


@pytest.mark.parametrize(
    ("at", "now", "says"),
    [
        (100.0, NOW, "time: 100 s since 1970 lies before the year 2000"),
        (100.0, 5.0, "time: 100 s since 1970 lies before the year 2000"),
        (NOW + 86_401, NOW, "2023-11-15T22:13:21Z is more than a day ahead of this device's clock"),
        (1e11 - 1, NOW, "5138-11-16T09:46:39Z is more than a day ahead"),
        (NOW + 86_399, NOW, ""),
        (NOW - 10 * 365 * 86_400, NOW, ""),
        (NOW, 5.0, ""),
    ],
)
def test_a_time_that_no_store_takes_is_a_problem_of_its_sample_alone(
    at: float, now: float, says: str
) -> None:
    quality = Quality(["a"], {})
    times = np.array([round(NOW * 1e6), round(at * 1e6)])
    got = quality.apply(Samples(times, np.ones((2, 1))), now)
    if not says:
        assert got.problems == {} and not quality.counts and got.event_time.tolist() == times.tolist()
        return
    assert says in got.problems[1] and list(got.problems) == [1] and quality.counts == {"time": 1}
    assert got.event_time.tolist() == [times[0], round(now * 1e6)]
