"""Files: every row once, in order, whatever happens in between."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from agent.streams.samples import Samples
from agent.streams.sources.files import FilesSampleSource, Replay
from agent.streams.sources.folder import Found, Remaining, remaining
from agent.streams.sources.images import read_image
from edgeward.clock import ManualClock
from edgeward.errors import InvalidDocument, MissingDependency
from edgeward.wire.streams import FilesSource

Until = Callable[..., None]
Start = Callable[..., None]


def source(
    path: Path,
    features: list[str],
    position: tuple[str, int] | None = None,
    now: ManualClock | None = None,
    **spec: Any,
) -> FilesSampleSource:
    return FilesSampleSource(FilesSource(path=str(path), **spec), features, now or ManualClock(), position)


def read_all(reading: FilesSampleSource, sink: Any) -> None:
    reading.start(sink)
    assert reading.finished.wait(20)
    reading.stop()


def test_tables_are_read_in_the_order_of_their_names(tmp_path: Path, sink: Any) -> None:
    (tmp_path / "b.csv").write_text("a,t\n3,30\n")
    (tmp_path / "a.csv").write_text("t,a\n10,1\n20,\n")
    for ignored in (".hidden.csv", "c.txt"):
        (tmp_path / ignored).write_text("a\n9\n")
    (tmp_path / "d.csv").mkdir()
    read_all(source(tmp_path, ["a"], pattern="*.csv", time="t"), sink)
    assert [part.values[:, 0].tolist() for part in sink.parts] == [
        [1, pytest.approx(math.nan, nan_ok=True)],
        [3],
    ]
    assert [part.event_time.tolist() for part in sink.parts] == [[10_000_000, 20_000_000], [30_000_000]]
    assert sink.seqs == [0, 1, 0] and len({part.epoch for part in sink.parts}) == 2
    assert sink.problems == ["a: missing or not a finite number"]
    assert all(1 <= len(part.epoch) <= 64 for part in sink.parts)


def test_one_file_can_be_named(tmp_path: Path, sink: Any) -> None:
    (tmp_path / "one.csv").write_text("a\n1\n")
    read_all(source(tmp_path / "one.csv", ["a"]), sink)
    assert sink.values == [[1]]


def test_bad_files_are_counted_and_never_end_the_source(tmp_path: Path, sink: Any) -> None:
    (tmp_path / "1.csv").write_bytes(b"a\n1\n\xff\n")
    (tmp_path / "2.csv").write_text("other\n1\n")
    (tmp_path / "3.csv").write_text("")
    (tmp_path / "4.csv").write_text("a\n" + "5\n" * 1000 + '"' + "x" * 200_000)
    (tmp_path / "5.csv").symlink_to(tmp_path / "gone")
    (tmp_path / "6.csv").write_text("a\n6\n")
    read_all(source(tmp_path, ["a"]), sink)
    assert sink.counts["bad_files"] == 3
    assert sink.values == [[5]] * 1000 + [[6]], "what came before the break was taken"


def test_it_goes_on_after_any_position(tmp_path: Path, sink: Any, new_sink: Any) -> None:
    for name, first in (("a.csv", 0), ("b.csv", 1500), ("c.csv", 3000)):
        (tmp_path / name).write_text("a\n" + "".join(f"{first + row}\n" for row in range(1500)))
    read_all(source(tmp_path, ["a"]), sink)
    everything = [
        (part.epoch, int(seq), value)
        for part in sink.parts
        for seq, value in zip(part.seq, part.values[:, 0].tolist(), strict=True)
    ]
    assert [value for _, _, value in everything] == list(range(4500))
    for at in (0, 999, 1000, 1499, 1500, 2999, 4498, 4499):
        rest = new_sink()
        reading = source(tmp_path, ["a"], everything[at][:2])
        read_all(reading, rest)
        assert [row[0] for row in rest.values] == list(range(at + 1, 4500))


def test_a_file_that_is_gone_or_changed_is_done(tmp_path: Path, sink: Any, new_sink: Any) -> None:
    for name in ("a.csv", "b.csv", "c.csv"):
        (tmp_path / name).write_text(f"n,a\n{name},1\n{name},2\n")
    read_all(source(tmp_path, ["a"], key="n"), sink)
    position = (sink.parts[1].epoch, 0)
    (tmp_path / "b.csv").write_text("n,a\nchanged,3\n")
    changed = new_sink()
    read_all(source(tmp_path, ["a"], position, key="n"), changed)
    assert [part.keys[0] for part in changed.parts] == ["c.csv"]
    assert changed.counts == {"late_files": 1}, "altered after it was read: said, not guessed at"
    (tmp_path / "b.csv").unlink()
    gone = new_sink()
    read_all(source(tmp_path, ["a"], position, key="n"), gone)
    assert [part.keys[0] for part in gone.parts] == ["c.csv"]


def test_names_that_are_no_text_and_files_that_vanish(
    tmp_path: Path, sink: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.csv")).write_text("a\n1\n")
    (tmp_path / "0.csv").symlink_to(tmp_path / "gone")
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    read_all(source(tmp_path, ["a"]), sink)
    assert sink.values == [[1]]
    sink.parts[0].epoch.encode()


def found(name: str, size: int = 1) -> Found:
    return Found(name, Path("/folder") / name, size, 7)


@given(
    st.lists(st.text("ab#", min_size=1, max_size=50), unique=True, min_size=1, max_size=8).map(sorted),
    st.data(),
)
def test_what_remains_is_what_was_not_read(names: list[str], data: st.DataObject) -> None:
    files = [found(name) for name in names]
    at = data.draw(st.integers(0, len(files) - 1))
    seq = data.draw(st.integers(0, 9))
    position = (files[at].epoch, seq)
    assert remaining(files, position) == Remaining(tuple(files[at:]), seq + 1)
    without = remaining([file for file in files if file is not files[at]], position)
    if len(names[at]) < 40:
        assert list(without.files) == files[at + 1 :] and without.skip == 0
    else:
        assert set(files[at + 1 :]) <= set(without.files), "cut names: better twice than never"
    assert remaining(files, ("another source's epoch", 3)).files == tuple(files)


def test_new_files_are_followed_and_late_ones_said(
    tmp_path: Path, sink: Any, until: Until, start: Start
) -> None:
    folder = tmp_path / "later"
    reading = source(folder, ["a"], follow=True)
    start(reading, sink)
    until(lambda: sink.counts["errors"], "a folder that is not there yet is tried again")
    folder.mkdir()
    (folder / "b.csv").write_text("a\n1\n")
    until(lambda: sink.values == [[1]])

    def move_in(name: str, text: str) -> None:
        (tmp_path / name).write_text(text)
        (tmp_path / name).rename(folder / name)

    move_in("c.csv", "a\n2\n")
    until(lambda: sink.values == [[1], [2]])
    move_in("a.csv", "a\n3\n")
    until(lambda: sink.counts["late_files"] == 1)
    move_in("c.csv", "a\n4\n5\n")
    until(lambda: sink.counts["late_files"] == 2)
    move_in("d.csv", "a\n6\n")
    until(lambda: sink.values == [[1], [2], [6]])
    reading.stop()
    assert not any(thread.name.startswith("files") for thread in threading.enumerate())


def test_it_waits_while_the_stream_is_full(tmp_path: Path, new_sink: Any, until: Until, start: Start) -> None:
    (tmp_path / "a.csv").write_text("a\n" + "".join(f"{row}\n" for row in range(5000)))
    sink = new_sink(room=2)
    reading = source(tmp_path, ["a"])
    start(reading, sink)
    until(lambda: sink.refused > 2)
    assert len(sink.parts) == 2
    sink.room = None
    assert reading.finished.wait(20)
    assert [row[0] for row in sink.values] == list(range(5000))


# --- a killed process -------------------------------------------------------------------------------

READER = textwrap.dedent(
    """
    import sqlite3, sys, threading
    from agent.streams.sources.files import FilesSampleSource
    from edgeward.clock import SystemClock
    from edgeward.wire.streams import FilesSource

    database = sqlite3.connect(sys.argv[2], check_same_thread=False, isolation_level=None)
    database.execute("CREATE TABLE IF NOT EXISTS rows (value)")
    database.execute("CREATE TABLE IF NOT EXISTS position (epoch, seq)")
    position = database.execute("SELECT epoch, seq FROM position").fetchone()
    reading = FilesSampleSource(FilesSource(path=sys.argv[1]), ["a"], SystemClock(), position)

    class Sink:
        def take(self, samples):
            print("taking", flush=True)
            database.execute("BEGIN")
            for value in samples.values[:, 0].tolist():
                database.execute("INSERT INTO rows VALUES (?)", (value,))
            database.execute("DELETE FROM position")
            database.execute("INSERT INTO position VALUES (?, ?)", (samples.epoch, int(samples.seq[-1])))
            database.execute("COMMIT")
            reading.committed(samples.epoch, int(samples.seq[-1]))
            return True

        def count(self, what, number=1):
            raise AssertionError(what)

    reading.start(Sink())
    reading.finished.wait()
    reading.stop()
    """
)


def test_a_kill_loses_and_doubles_nothing(tmp_path: Path) -> None:
    folder, database = tmp_path / "folder", tmp_path / "rows.db"
    folder.mkdir()
    for index in range(4):
        rows = "".join(f"{index * 2500 + row}\n" for row in range(2500))
        (folder / f"{index}.csv").write_text(f"a\n{rows}")
    command = [sys.executable, "-c", READER, str(folder), str(database)]
    for after in (1, 2, 4):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(after):
            assert child.stdout.readline()
        child.kill()
        child.wait()
        child.stdout.close()
    assert len(sqlite3.connect(database).execute("SELECT * FROM rows").fetchall()) < 10_000, (
        "killed on the way"
    )
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
    values = [
        value for (value,) in sqlite3.connect(database).execute("SELECT value FROM rows ORDER BY rowid")
    ]
    assert values == list(range(10_000))


# --- replay -----------------------------------------------------------------------------------------


def test_rows_become_due_at_the_distances_of_their_times() -> None:
    clock = ManualClock()
    replay = Replay(clock, speed=2.0)
    at = np.array([100, 104, 102, 999, 106, 110], dtype=np.int64) * 1_000_000
    samples = Samples(at, np.zeros((6, 1)), problems={3: "t: not a time"})
    assert replay.due(samples, 0) == 1
    clock.advance(1.9)
    assert replay.due(samples, 1) == 1
    clock.advance(0.1)
    assert replay.due(samples, 1) == 4, "what is out of order or without a time is due with the rest"
    clock.advance(1.0)
    assert replay.due(samples, 4) == 5
    assert 0 < replay.wait(samples, 5) <= 0.05
    clock.advance(2.0)
    assert replay.due(samples, 5) == 6


def test_a_replay_follows_the_clock(tmp_path: Path, sink: Any, until: Until, start: Start) -> None:
    (tmp_path / "a.csv").write_text("t,a\n100,0\n110,1\n120,2\n")
    (tmp_path / "b.csv").write_text("t,a\n130,3\n")
    clock = ManualClock()
    reading = source(tmp_path, ["a"], now=clock, time="t", clock="event", speed=10.0)
    start(reading, sink)
    for count in range(1, 5):
        until(lambda count=count: len(sink.values) >= count)
        assert len(sink.values) == count, "the next one is not due while the clock stands"
        clock.advance(1.0)
    assert reading.finished.wait(20)
    assert [row[0] for row in sink.values] == [0, 1, 2, 3] and sink.seqs == [0, 1, 2, 0]


# --- Parquet, images --------------------------------------------------------------------------------


def test_parquet_columns_become_features(tmp_path: Path, sink: Any, new_sink: Any) -> None:
    table = pa.table(
        {
            "at": pa.array([1_700_000_000_123_456_789, None, 3], pa.timestamp("ns", "Europe/Berlin")),
            "n": pa.array([1, None, 3], pa.int32()),
            "f": pa.array([0.5, math.inf, 2.5], pa.float32()),
            "on": pa.array([True, False, True]),
            "text": pa.array(["1", "2", "3"]),
            "who": pa.array(["x", None, "y"]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    features = ["on", "f", "n"]
    read_all(source(tmp_path, features, format="parquet", time="at", key="who"), sink)
    (part,) = sink.parts
    assert part.values[[0, 2]].tolist() == [[1, 0.5, 1], [1, 2.5, 3]] and part.keys == ("x", "", "y")
    assert part.event_time[[0, 2]].tolist() == [1_700_000_000_123_456, 0]
    assert part.problems == {1: "at: not a time in seconds since 1970"}
    assert np.isnan(part.values[1]).tolist() == [False, True, True]
    text = new_sink()
    read_all(source(tmp_path, ["text", "n"], format="parquet"), text)
    assert set(text.parts[0].problems.values()) == {"text: missing or not a finite number"}


def test_parquet_goes_on_after_a_position_and_over_bad_files(
    tmp_path: Path, sink: Any, new_sink: Any
) -> None:
    pq.write_table(pa.table({"a": list(range(3500))}), tmp_path / "a.parquet", row_group_size=700)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nonsense PAR1")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"a": [3500]}), tmp_path / "d.parquet")
    read_all(source(tmp_path, ["a"], format="parquet"), sink)
    assert [row[0] for row in sink.values] == list(range(3501)) and sink.counts == {"bad_files": 2}
    for row in (0, 699, 700, 2222, 3499):
        rest = new_sink()
        read_all(source(tmp_path, ["a"], (sink.parts[0].epoch, row), format="parquet"), rest)
        assert [value[0] for value in rest.values] == list(range(row + 1, 3501))


def test_images_become_tensors(tmp_path: Path, sink: Any, new_sink: Any) -> None:
    Image.new("RGB", (6, 4), (250, 10, 20)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG nonsense")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "c.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (3, 5), 7).save(tmp_path / "d.png")
    os.utime(tmp_path / "d.png", ns=(0, 1_700_000_000_000_000_000))
    read_all(source(tmp_path, [], format="image"), sink)
    assert [(part.values.shape, str(part.values.dtype)) for part in sink.parts] == [
        ((1, 4, 6, 3), "uint8"),
        ((1, 5, 3, 3), "uint8"),
    ]
    assert sink.parts[0].values[0, 0, 0].tolist() == [250, 10, 20], "red first"
    assert sink.parts[1].event_time.tolist() == [1_700_000_000_000_000]
    assert sink.counts == {"bad_files": 2}
    rest = new_sink()
    read_all(source(tmp_path, [], (sink.parts[0].epoch, 0), format="image", width=8, height=2), rest)
    assert [part.values.shape for part in rest.parts] == [(1, 2, 8, 3)]


def test_an_absurdly_large_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(InvalidDocument, match="not an image"):
        read_image(tmp_path / "a.png", 0, 0)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module, format, extra in (("pyarrow", "parquet", "agent-parquet"), ("PIL", "image", "agent-images")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            patch.delitem(sys.modules, "agent.streams.sources.images", raising=False)
            with pytest.raises(MissingDependency, match=extra):
                source(tmp_path, ["a"], format=format)
