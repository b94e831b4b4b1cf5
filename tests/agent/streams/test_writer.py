"""Storing beside the stream: in order, together, and never past a hole."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.outbox.outbox import Outbox
from agent.streams import writer as module
from agent.streams.writer import Writer
from edgeward.clock import ManualClock
from edgeward.errors import Unavailable
from edgeward.wire.rows import ResultRow, Row
from edgeward.wire.topics import Lane

WAIT = 30.0


class Disk(Outbox):
    """A real outbox whose commits can be made to wait or to fail; `entered` counts those that began."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, ManualClock())
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.open.set()
        self.error: Exception | None = None
        self.commits = 0

    def commit_rows(self, *arguments: Any, **named: Any) -> None:
        self.entered.release()
        assert self.open.wait(WAIT)
        if self.error is not None:
            raise self.error
        self.commits += 1
        super().commit_rows(*arguments, **named)


class Rig:
    def __init__(self, folder: Path) -> None:
        self.disk = Disk(folder / "outbox.db")
        self.stop = threading.Event()
        self.positions: list[tuple[str, int] | None] = []
        self.refused = threading.Semaphore(0)
        self.failures: list[Exception] = []
        self.writer = Writer(
            self.disk, "t", self.stop, stored=self.positions.append,
            refused=lambda error: self.refused.release(), failed=self.failures.append,
        )  # fmt: skip
        self.writer.start()

    def put(self, *numbers: int) -> None:
        self.writer.put([row(number) for number in numbers], ("e", numbers[-1]), None)

    def stored(self) -> int:
        return self.disk.lane("result").next_seq


def row(seq: int) -> tuple[Lane, Row]:
    return "result", ResultRow(seq, "s", 1, "", "e", seq, "d", "v", "p", {"score": 0.5}, False)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    made = Rig(tmp_path)
    yield made
    made.stop.set()
    made.disk.open.set()
    made.writer.close()
    made.writer.end(WAIT)
    made.disk.close()


def joined(rig: Rig) -> None:
    rig.writer._thread.join(WAIT)
    assert not rig.writer._thread.is_alive()


def test_what_waits_together_is_one_transaction(rig: Rig) -> None:
    rig.disk.open.clear()
    rig.put(0)
    assert rig.disk.entered.acquire(timeout=WAIT)
    for number in range(1, 5):
        rig.put(number)
    rig.disk.open.set()
    rig.writer.close()
    rig.writer.end(WAIT)
    assert rig.disk.commits == 2 and rig.positions == [("e", 0), ("e", 4)]
    assert rig.stored() == 5 and rig.disk.source("t") == ("e", 4) and rig.writer.waiting == 0


def test_a_disk_that_refuses_is_tried_again(rig: Rig) -> None:
    rig.disk.error = sqlite3.OperationalError("database or disk is full")
    rig.put(0)
    assert all(rig.refused.acquire(timeout=WAIT) for _ in range(3))
    rig.disk.error = None
    rig.writer.close()
    rig.writer.end(WAIT)
    assert rig.stored() == 1 and rig.positions == [("e", 0)]


def test_nothing_follows_what_was_given_up(rig: Rig) -> None:
    rig.disk.error = OSError("no space left")
    rig.put(0)
    assert rig.refused.acquire(timeout=WAIT)
    rig.stop.set()
    joined(rig)
    rig.disk.error = None
    with pytest.raises(Unavailable):
        rig.put(1)
    assert rig.stored() == 0 and rig.positions == [] and rig.failures == []


def test_nothing_follows_an_unexpected_error(rig: Rig) -> None:
    rig.disk.error = ValueError("a mistake of ours")
    rig.put(0)
    joined(rig)
    rig.disk.error = None
    with pytest.raises(Unavailable):
        rig.put(1)
    assert [str(error) for error in rig.failures] == ["a mistake of ours"] and rig.stored() == 0


def test_a_stream_that_waits_for_room_is_let_go_at_the_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 1)
    rig.disk.open.clear()
    rig.put(0)
    assert rig.disk.entered.acquire(timeout=WAIT)
    outcome: list[str] = []

    def wait_for_room() -> None:
        try:
            rig.put(1)
        except Unavailable:
            outcome.append("let go")

    stream = threading.Thread(target=wait_for_room)
    stream.start()
    rig.writer.end(0.01)
    stream.join(WAIT)
    assert outcome == ["let go"]


def test_a_stream_whose_sensor_keeps_its_samples_waits_and_loses_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 2)
    rig.disk.error = sqlite3.OperationalError("database or disk is full")
    rig.put(0, 1)
    assert rig.refused.acquire(timeout=WAIT)
    begun = threading.Event()

    def more() -> None:
        begun.set()
        rig.put(2, 3)

    stream = threading.Thread(target=more)
    stream.start()
    assert begun.wait(WAIT)
    assert all(rig.refused.acquire(timeout=WAIT) for _ in range(3))
    assert rig.writer.waiting == 2 and stream.is_alive()
    rig.disk.error = None
    stream.join(WAIT)
    rig.writer.close()
    rig.writer.end(WAIT)
    assert rig.stored() == 4 and rig.disk.sizes()["result"].lost == 0


def test_a_commit_that_hangs_past_the_end_is_the_last_one(rig: Rig) -> None:
    rig.disk.open.clear()
    rig.put(0)
    assert rig.disk.entered.acquire(timeout=WAIT)
    rig.put(1)
    rig.writer.end(0.01)
    rig.disk.open.set()
    joined(rig)
    assert rig.stored() == 1 and rig.disk.source("t") == ("e", 0)


def test_the_end_waits_for_the_commit_under_way(rig: Rig) -> None:
    """Else a successor would begin at a position that moves under it."""
    rig.disk.open.clear()
    rig.put(0)
    assert rig.disk.entered.acquire(timeout=WAIT)
    join = rig.writer._thread.join
    opened: list[Callable[..., Any]] = []

    def too_long(seconds: float) -> None:
        """As if `seconds` had passed without an end; the disk answers a moment later."""
        opened.append(join)
        threading.Timer(0.05, rig.disk.open.set).start()

    rig.writer._thread.join = too_long  # type: ignore[method-assign]
    rig.writer.end(WAIT)
    rig.writer._thread.join = join  # type: ignore[method-assign]
    assert opened and rig.disk.source("t") == ("e", 0)
