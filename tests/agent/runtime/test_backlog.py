"""Order, joining and second tries of requests, against what they must always fulfil."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.runtime import recovery
from agent.runtime.backlog import MAX_ATTEMPTS, Backlog, Batch
from agent.runtime.port import Tensor
from agent.runtime.tensors import join, split, to_array, to_tensor
from edgeward.wire.tensors import pack_elements, unpack_elements


def request(rows: int, width: int = 2, first: float = 0.0) -> list[Tensor]:
    values = np.full((rows, width), first, np.float32)
    return [to_tensor("x", values)]


def nothing(*_: Any) -> None:
    pass


@settings(max_examples=200)
@given(st.data())
def test_every_request_runs_once_in_order_and_within_the_batch_limit(data: st.DataObject) -> None:
    limit = data.draw(st.integers(1, 12))
    backlog = Backlog(1000, limit)
    numbers: dict[int, int] = {}
    added, taken = 0, []
    for _ in range(data.draw(st.integers(1, 40))):
        if data.draw(st.booleans()):
            inputs = request(data.draw(st.integers(0, 5)), data.draw(st.integers(1, 2)))
            backlog.add(inputs, nothing, added)
            numbers[id(inputs)] = added
            keep = inputs  # noqa: F841  # the id must stay taken
            taken.append(("added", inputs))
            added += 1
        elif len(backlog):
            before = backlog.rows()
            batch = backlog.take(0)
            assert len(batch.requests) == 1 or batch.rows <= limit
            assert batch.rows <= max(before, batch.requests[0].rows)
            assert len({item.key for item in batch.requests}) == 1
            taken.append(("ran", [numbers[id(item.inputs)] for item in batch.requests]))
    while len(backlog):
        taken.append(("ran", [numbers[id(item.inputs)] for item in backlog.take(0).requests]))
    ran = [number for what, batch in taken if what == "ran" for number in batch]
    assert ran == list(range(added))


def test_after_a_loss_those_that_ran_are_tried_alone_and_once_more() -> None:
    backlog = Backlog(100, 64)
    for number in range(4):
        backlog.add(request(1, first=number), nothing, number)
    running, sent = backlog.take(0), Batch([], 0)
    running.started = 1
    backlog.add(request(1, first=9), nothing, 9)
    sent = backlog.take(0)
    assert len(running.requests) == 4
    assert backlog.put_back([running, sent]) == []
    assert backlog.suspect
    order = []
    while backlog.suspect:
        batch = backlog.take(0)
        order += [int(to_array(item.inputs[0])[0, 0]) for item in batch.requests]
        assert len(batch.requests) == 1, "a suspect runs alone"
    assert order == [0, 1, 2, 3]
    assert backlog.take(0).requests[0].attempts == 0, "what was only sent is no suspect"


def test_two_losses_are_enough() -> None:
    backlog = Backlog(100, 64)
    backlog.add(request(1), nothing, 0)
    for attempt in range(MAX_ATTEMPTS):
        batch = backlog.take(0)
        batch.started = 1
        failed = backlog.put_back([batch])
        assert len(failed) == (attempt == MAX_ATTEMPTS - 1)
    assert len(backlog) == 0


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.booleans())
def test_joined_and_split_rows_are_the_same_rows(rows: list[int], texts: bool) -> None:
    def values(count: int, base: int) -> np.ndarray:
        if texts:
            made = np.empty((count, 2), object)
            for index in range(count):
                made[index] = [b"a" * (base + index), str(base).encode()]
            return made
        return np.arange(base, base + 3 * count, dtype=np.float64).reshape(count, 3)

    requests = [[to_tensor("x", values(count, 10 * index))] for index, count in enumerate(rows)]
    parts = split(join(requests), rows)
    assert parts is not None
    for part, original in zip(parts, requests, strict=True):
        assert part[0].shape == original[0].shape
        assert bytes(part[0].data) == bytes(original[0].data)


def test_outputs_that_do_not_keep_to_rows_cannot_be_split() -> None:
    assert split([to_tensor("mean", np.zeros((1, 2), np.float32))], [1, 1]) is None
    assert split([to_tensor("scalar", np.float32(1.0).reshape(()))], [1]) is None


@given(st.binary(max_size=64))
def test_any_bytes_are_elements_or_refused(data: bytes) -> None:
    try:
        items = unpack_elements(data)
    except ValueError:
        return
    assert pack_elements(items) == data


def test_losses_wait_longer_and_longer_and_make_a_loop() -> None:
    state, delays, began = recovery.Losses(), [], []
    for number in range(8):
        state, delay, loops = recovery.lost(state, float(number))
        delays.append(delay)
        began.append(loops)
    assert delays == [*recovery.BACKOFF, recovery.BACKOFF[-1]]
    assert began.count(True) == 1 and began[recovery.LOOP_LOSSES - 1]
    assert recovery.quiet(state, 30.0) == (state, False)
    state, ended = recovery.quiet(state, 7.0 + recovery.LOOP_SECONDS)
    assert ended and not state.looping
    assert recovery.lost(recovery.answered(state), 100.0)[1] == 0.0, "an answer resets the wait"
