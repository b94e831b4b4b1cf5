"""A disk without room: streams go on, what is lost is counted, and it recovers by itself."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import msgspec
import pytest

from agent.outbox.outbox import Outbox
from agent.streams import writer as module
from agent.streams.decode.sequence import Position
from agent.streams.writer import Writer
from edgeward.wire.rows import AlarmRow, ResultRow
from tests.agent.outboxes import contents, open_outbox, row

WAIT = 60.0


class Rig:
    """A stream's writer on a real disk; `refused` counts what the disk refused."""

    def __init__(self, folder: Path, *, holds: bool) -> None:
        self.folder = folder
        self.outbox: Outbox = open_outbox(folder)
        self.refused = threading.Semaphore(0)
        self.stored = threading.Semaphore(0)
        self.errors: list[Exception] = []
        self.writer = Writer(
            self.outbox, "t", threading.Event(), holds=holds, stored=self._stored,
            refused=lambda error: self.refused.release(), failed=self.errors.append,
        )  # fmt: skip
        self.writer.start()
        self.next = 0

    def _stored(self, position: Position | None) -> None:
        self.stored.release()

    def put(self, rows: int, alarms: int = 0) -> None:
        made = [row(self.next + index) for index in range(rows)]
        made += [row(self.next + index, "alarm") for index in range(alarms)]
        self.next += rows
        self.writer.put(made, None, None)

    def fill(self) -> None:
        """Until nothing more fits."""
        with (self.folder / "filler").open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1 << 9, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def empty(self) -> None:
        (self.folder / "filler").unlink()

    def end(self) -> None:
        self.writer.close()
        self.writer._thread.join(WAIT)
        assert not self.writer._thread.is_alive() and not self.errors


def test_a_stream_whose_sensor_keeps_nothing_goes_on_and_the_gap_is_exact(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    monkeypatch.setattr(module, "MAX_ROWS", 500)
    rig = Rig(small_disk, holds=False)
    rig.put(100)
    assert rig.stored.acquire(timeout=WAIT)
    rig.fill()
    while not rig.refused.acquire(blocking=False):
        rig.put(100)
    for _ in range(100):  # never waits, whatever the disk does
        rig.put(100, alarms=1)
    assert rig.writer.waiting <= 2 * 500 + 100 and rig.writer.take_missed()
    rig.empty()
    rig.end()
    rows, lost = contents(rig.outbox, "result")
    gone = sum(last - first + 1 for first, last, _ in lost)
    assert len(rows) + gone == rig.next == rig.outbox.lane("result").next_seq
    assert all(reasons == {"disk-full": last - first + 1} for first, last, reasons in lost) and gone > 5000
    stored = [msgspec.msgpack.decode(data, type=ResultRow).source_seq for _, data in rows]
    assert stored == sorted(set(stored))
    alarms = [msgspec.msgpack.decode(data, type=AlarmRow) for _, data in contents(rig.outbox, "alarm")[0]]
    assert len(alarms) == 100, "alarms are the last to go"
    rig.outbox.close()


def test_alarms_have_a_bound_too(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    monkeypatch.setattr(module, "MAX_ROWS", 100)
    rig = Rig(small_disk, holds=False)
    rig.fill()
    while not rig.refused.acquire(blocking=False):
        rig.put(50)
    for _ in range(50):
        rig.put(10, alarms=10)
    assert rig.writer.waiting <= 2 * 100 + 50
    rig.empty()
    rig.end()
    rows, lost = contents(rig.outbox, "alarm")
    assert len(rows) + sum(last - first + 1 for first, last, _ in lost) == 500 and len(rows) >= 90
    rig.outbox.close()


def test_no_call_of_a_full_disk_spoils_the_outbox(small_disk: Path) -> None:
    rig = Rig(small_disk, holds=True)
    rig.end()
    outbox = rig.outbox
    outbox.commit_rows([row(seq) for seq in range(100)])
    rig.fill()
    committed = 100
    with pytest.raises(sqlite3.OperationalError, match="full"):
        for _ in range(1000):
            outbox.commit_rows([row(committed + index) for index in range(100)])
            committed += 100
    for attempt in (outbox.tend, lambda: outbox.acknowledge(outbox.epoch, "result", 9)):
        try:
            attempt()
        except sqlite3.OperationalError as error:
            assert "full" in str(error)
    rig.empty()
    outbox.commit_rows([row(committed)])
    outbox.close()
    outbox = open_outbox(small_disk)
    numbers = [seq for seq, _ in contents(outbox, "result")[0]]
    assert numbers[-1] == committed and numbers in (
        list(range(committed + 1)),
        list(range(10, committed + 1)),
    )
    outbox.close()
