"""The loop of every bridge: when the cursor moves, when not, and what is told."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.clock import ManualClock
from edgeward.errors import Conflict, EdgewardError, InvalidDocument, NotFound, Unavailable
from tests.trends.bridges.filled import Filled
from trends.bridges import bridge as loop
from trends.bridges.bridge import LAST_RETRY, Bridge, Stopped, retry_delay
from trends.bridges.cursor import Cursor, cursors
from trends.bridges.feed import Position


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Filled]:
    made = Filled(tmp_path)
    yield made
    made.close()


class Shelf:
    """A target that keeps rows in a list, and does as told."""

    where = "a shelf"

    def __init__(self, *errors: Exception) -> None:
        self.rows: list[int] = []
        self.errors = list(errors)

    def resume(self, table: str, position: Position) -> Position:
        return position

    def deliver(self, table: str, rows: pa.Table, before: Position, after: Position) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.rows += rows.column("seq").to_pylist()

    def close(self) -> None: ...


def made(filled: Filled, shelf: Shelf, stop: threading.Event | None = None, name: str = "shelf") -> Bridge:
    cursor = Cursor(filled.folder, name)
    with cursor.alone():
        pass
    return Bridge([filled.feed()], shelf, cursor, ManualClock(), stop or threading.Event(), rows=4)


def test_what_fails_is_tried_again_and_told(
    filled: Filled, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop, "FIRST_RETRY", 0.01)
    filled.commit(10)
    shelf = Shelf(Unavailable("full"), OSError("disk"), Unavailable("full"))
    with caplog.at_level(logging.INFO):
        assert made(filled, shelf).run(once=True) == 10
    assert shelf.rows == list(range(10))
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR", "ERROR", "INFO"]
    assert Cursor(filled.folder, "shelf").state.problem == ""


def test_what_a_person_must_do_ends_it_with_the_cursor_where_it_was(filled: Filled) -> None:
    filled.commit(10)
    shelf = Shelf()
    bridge = made(filled, shelf)
    bridge.catch_up()
    filled.commit(3)
    shelf.errors = [EdgewardError("refused")]
    with pytest.raises(EdgewardError, match="refused"):
        bridge.run()
    assert made(filled, shelf).run(once=True) == 3 and shelf.rows == list(range(13))


def test_a_stop_during_a_delivery_leaves_the_cursor(filled: Filled) -> None:
    filled.commit(10)
    shelf = Shelf(Stopped())
    assert made(filled, shelf).run() == 0
    assert made(filled, shelf).run(once=True) == 10


def test_a_stop_comes_between_two_batches(filled: Filled) -> None:
    filled.commit(10)
    stop = threading.Event()

    class Last(Shelf):
        def deliver(self, table: str, rows: pa.Table, before: Position, after: Position) -> None:
            super().deliver(table, rows, before, after)
            stop.set()

    shelf = Last()
    assert made(filled, shelf, stop).run() == 4
    assert made(filled, shelf).run(once=True) == 6 and shelf.rows == list(range(10))


def test_one_process_runs_a_bridge(filled: Filled) -> None:
    with Cursor(filled.folder, "x").alone():
        with pytest.raises(Conflict), Cursor(filled.folder, "x").alone():
            pass
        with Cursor(filled.folder, "y").alone():
            pass
    with Cursor(filled.folder, "x").alone():
        pass


def test_what_was_skipped_is_kept_in_bounds(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "MAX_SKIPPED", 3)
    for _ in range(5):
        filled.commit(1, day=40)
    filled.keep_days(30)
    filled.vacuum()
    filled.commit(1)
    shelf = Shelf()
    made(filled, shelf).run(once=True)
    lane = Cursor(filled.folder, "shelf").state.tables["results"]
    assert shelf.rows == [5]
    assert lane.skipped_rows == 5 and [skipped.first_version for skipped in lane.skipped] == [3, 4, 5]


def test_names_of_bridges_cannot_leave_the_folder(filled: Filled) -> None:
    for name in ("../x", "", "a/b"):
        with pytest.raises(InvalidDocument):
            Cursor(filled.folder, name)
    with pytest.raises(NotFound):
        cursors(filled.folder / "nowhere")


def test_births_are_counted_to_255_over_restarts(filled: Filled) -> None:
    cursor = Cursor(filled.folder, "s")
    with cursor.alone():
        assert cursor.next_birth() == 0
        cursor.state.births = 254
        cursor.save()
    assert [Cursor(filled.folder, "s").next_birth() for _ in range(4)] == [254, 255, 0, 1]


@given(st.integers(1, 10_000))
def test_tries_are_spread_and_bounded(failures: int) -> None:
    assert 0 < retry_delay(failures) <= LAST_RETRY
