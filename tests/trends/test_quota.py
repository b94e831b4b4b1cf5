"""A device that sends too much is put off, and loses nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgeward.identifiers import DeviceName
from trends.quota import Quota, Quotas

A, B = DeviceName("north", "a"), DeviceName("north", "b")


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 500), st.integers(1, 5000)), max_size=60),
)
def test_no_span_of_time_stores_more_than_its_share_and_one_burst(
    asked: list[tuple[float, int, int]],
) -> None:
    quota = Quota(rows=10, bytes=100, seconds=60)
    quotas, now, taken = Quotas(quota), 0.0, []
    for wait, rows, size in asked:
        now += wait
        if quotas.allows(A, rows, size, now):
            taken.append((now, rows, size))
    for index, (start, _, _) in enumerate(taken):
        for end, _, _ in taken[index:]:
            inside = [each for each in taken if start <= each[0] <= end]
            for column, rate in ((1, quota.rows), (2, quota.bytes)):
                # The last may be larger than all that there was.
                before = sum(each[column] for each in inside[:-1])
                assert before <= rate * (end - start) + rate * quota.seconds + 1e-6


@given(st.integers(1, 10**9))
def test_what_is_put_off_passes_in_the_end(rows: int) -> None:
    quotas = Quotas(Quota(rows=10, bytes=1e12, seconds=60))
    assert quotas.allows(A, rows, 1, 0.0)
    later = 1e10
    assert quotas.allows(A, rows, 1, later) and not quotas.allows(A, 601, 1, later)


def test_one_device_costs_no_other_anything_and_a_clock_that_stands_gives_nothing() -> None:
    quotas = Quotas(Quota(rows=10, bytes=1e9, seconds=1))
    assert (
        quotas.allows(A, 10, 1, 5.0) and not quotas.allows(A, 1, 1, 5.0) and not quotas.allows(A, 1, 1, 4.0)
    )
    assert quotas.allows(B, 10, 1, 5.0)
    assert quotas.allows(A, 1, 1, 5.1)
