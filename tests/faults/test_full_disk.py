"""What a full disk leaves behind."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from agent.state import State
from agent.streams.execute import Executor
from edgeward.clock import SystemClock
from edgeward.identifiers import DeviceName
from edgeward.wire.streams import Action
from trends.journal import Journal


def test_a_line_that_did_not_fit_is_no_part_of_the_next_one(small_disk: Path) -> None:
    executor = Executor(lambda topic, body: True, small_disk, SystemClock())
    action = Action("log", file="alarms.jsonl")
    executor.run(action, None, {"n": 1}, 0.0)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(900_000))

    executor.run(action, None, {"n": 2, "text": "x" * 300_000}, 0.0)
    filler.unlink()
    executor.run(action, None, {"n": 3}, 0.0)

    lines = (small_disk / "alarms.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in lines] == [1, 3]
    figures = executor.take()
    assert (figures["run"], figures["failed"]) == ({"log": 2}, {"log": 1})


@pytest.mark.parametrize("size", [10_000, 4_000_000], ids=["at its commit", "in the middle"])
def test_a_transaction_that_did_not_fit_is_no_part_of_the_next_one(small_disk: Path, size: int) -> None:
    state = State(small_disk / "state.db")
    state.accept_desired(1, b"one")
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    with pytest.raises(sqlite3.OperationalError, match=r"full|disk I/O"):
        state.accept_desired(2, b"x" * size)
    assert (state.generation(), state.desired()) == (1, b"one")
    filler.unlink()
    state.accept_desired(2, b"two")
    assert (state.generation(), state.desired()) == (2, b"two")
    state.close()


def test_the_trend_journal_says_what_went_wrong_and_goes_on(small_disk: Path) -> None:
    """In the middle of a transaction, SQLite rolls back by itself."""
    journal, name = Journal(small_disk / "journal.db"), DeviceName("north", "a")
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    with pytest.raises(sqlite3.OperationalError, match=r"full|disk I/O"), journal.transaction():
        for number in range(100):
            journal.append(name, "e", "result", 1, number, 1, bytes(100_000))
    filler.unlink()
    with journal.transaction():
        journal.append(name, "e", "result", 1, 0, 1, b"row")
    assert journal.count() == 1
    journal.close()
