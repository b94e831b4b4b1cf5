"""Statistics with their sketch, and the drift figure."""

from __future__ import annotations

import datasketches
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.streams.sketches import LiveBaseline, Sketch, Statistics, psi
from edgeward.wire.package import FeatureBaseline

NUMBERS = st.lists(st.floats(-1e6, 1e6) | st.sampled_from([float("nan"), float("inf")]), max_size=50)


@settings(deadline=None)
@given(parts=st.lists(NUMBERS, min_size=1, max_size=5))
def test_parts_merge_to_the_statistics_of_all_values(parts: list[list[float]]) -> None:
    statistics = Statistics([-1.0, 1.0])
    for part in parts:
        statistics.add(np.array(part))
    values = np.array([value for part in parts for value in part if np.isfinite(value)])
    assert statistics.count == len(values)
    assert statistics.missing == sum(map(len, parts)) - len(values)
    if len(values) == 0:
        assert statistics.sketch.encoded() == b"" and statistics.histogram == []
        return
    assert statistics.mean == pytest.approx(values.mean(), abs=1e-6)
    assert statistics.m2 == pytest.approx(((values - values.mean()) ** 2).sum(), rel=1e-6, abs=1e-3)
    assert (statistics.minimum, statistics.maximum) == (values.min(), values.max())
    bins = [int((values < -1).sum()), int(((values >= -1) & (values < 1)).sum()), int((values >= 1).sum())]
    assert statistics.histogram == bins
    read = datasketches.kll_floats_sketch.deserialize(statistics.sketch.encoded())
    assert read.n == len(values)
    if len(values) < 200:
        wanted = np.sort(values.astype(np.float32))[(len(values) - 1) // 2]
        assert read.get_quantile(0.5, inclusive=True) == pytest.approx(wanted)


def test_a_sketch_stays_small_and_near_the_quantiles() -> None:
    sketch, values = Sketch(), np.random.default_rng(0).normal(size=100_000)
    for part in np.split(values, 100):
        sketch.add(part)
    encoded = sketch.encoded()
    assert len(encoded) < 3000
    read = datasketches.kll_floats_sketch.deserialize(encoded)
    for rank in (0.05, 0.5, 0.95):
        assert abs(float((values <= read.get_quantile(rank)).mean()) - rank) < 0.055


def test_numbers_beyond_32_bits_stay_finite() -> None:
    sketch = Sketch()
    sketch.add(np.array([-1e300, 1e300]))
    read = datasketches.kll_floats_sketch.deserialize(sketch.encoded())
    assert np.isfinite([read.get_min_value(), read.get_max_value()]).all()


def test_drift_is_measured_in_the_bins_of_the_baseline() -> None:
    live = LiveBaseline({"a": FeatureBaseline(edges=[0.0], proportions=[0.5, 0.5])})
    assert live.psi() == {}
    live.add(["b", "a"], np.array([[9.0, -1.0], [9.0, 1.0]]))
    assert live.psi() == {"a": 0.0} and live.rows == 2
    live.add(["b", "a"], np.array([[9.0, 1.0]] * 8))
    assert live.psi()["a"] == pytest.approx(psi([0.5, 0.5], [1, 9])) and live.psi()["a"] > 0.25
    assert psi([0.5, 0.5], [0, 0]) == 0.0


def test_one_absurd_number_does_not_cost_its_bucket() -> None:
    statistics = Statistics([])
    statistics.add(np.array([1.0, 1e200, -1e300, np.inf, np.nan, 3.0]))
    assert (statistics.count, statistics.missing, statistics.mean, statistics.m2) == (2, 4, 2.0, 2.0)
    statistics.add(np.full(1000, 9e149) * np.array([1, -1] * 500))
    assert np.isfinite([statistics.mean, statistics.m2]).all()
