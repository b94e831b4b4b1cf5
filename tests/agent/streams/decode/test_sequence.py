"""The columnar sequence against the row by row rule it replaces."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agent.streams.decode.sequence import Position, continue_sequence
from agent.streams.samples import Samples


def numbered(epoch: str, numbers: list[int]) -> Samples:
    count = len(numbers)
    values = np.arange(count, dtype=np.float64).reshape(count, 1)
    return Samples(np.arange(count), values, epoch=epoch, seq=np.array(numbers, dtype=np.int64))


def one_by_one(
    epoch: str, numbers: list[int], position: Position | None
) -> tuple[list[int], Position | None]:
    taken = []
    for index, seq in enumerate(numbers):
        expected = position[1] + 1 if position is not None and position[0] == epoch else 0
        if seq == expected:
            taken.append(index)
            position = (epoch, seq)
    return taken, position


@given(
    st.sampled_from(["e", "f"]),
    st.one_of(
        st.lists(st.integers(0, 12), max_size=40),
        st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda ab: list(range(ab[0], ab[0] + ab[1]))),
    ),
    st.one_of(st.none(), st.tuples(st.sampled_from(["e", "f"]), st.integers(0, 9))),
)
def test_it_takes_what_the_row_wise_rule_takes(
    epoch: str, numbers: list[int], position: Position | None
) -> None:
    expected, after = one_by_one(epoch, numbers, position)
    samples, reached = continue_sequence(numbered(epoch, numbers), position)
    assert samples.values[:, 0].tolist() == expected
    assert reached == after


def test_problems_stay_with_their_samples() -> None:
    samples = numbered("e", [3, 4, 5, 9])
    samples.problems.update({0: "first", 2: "third", 3: "beyond the hole"})
    taken, position = continue_sequence(samples, ("e", 3))
    assert taken.problems == {1: "third"} and position == ("e", 5)
