"""The outbox on a real disk: kills, damage, a full disk, budgets, and the file of an older agent."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from agent.outbox import files
from agent.outbox import takeover as takeover_module
from agent.outbox.outbox import Outbox
from agent.outbox.rows import TrendChange
from agent.outbox.salvage_pages import rows_in_page
from agent.outbox.status import status
from agent.state import State
from edgeward.clock import ManualClock
from edgeward.wire.lanes import DEFAULT_POLICIES, LanePolicy
from edgeward.wire.rows import ResultRow, TrendRow
from edgeward.wire.topics import LANES, Lane
from tests.agent.outboxes import contents, open_outbox, row, rows_of

SMALL: dict[Lane, LanePolicy] = {
    "alarm": LanePolicy(bytes=20_000, priority=40),
    "trend": LanePolicy(bytes=20_000, priority=30),
    "sample": LanePolicy(bytes=20_000, priority=20),
    "result": LanePolicy(bytes=60_000, priority=10),
}


def fill(outbox: Outbox, count: int, lane: Lane = "result", first: int = 0) -> None:
    for start in range(first, first + count, 100):
        outbox.commit_rows([row(seq, lane) for seq in range(start, min(start + 100, first + count))])


def lost_of(outbox: Outbox, lane: Lane, epoch: str = "") -> dict[str, int]:
    reasons: dict[str, int] = {}
    for *_, counts in contents(outbox, lane, epoch)[1]:
        for reason, count in counts.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return reasons


# --- kept, numbered, acknowledged -----------------------------------------------------------------


def test_rows_and_positions_survive_and_number_on(tmp_path: Path) -> None:
    first = open_outbox(tmp_path)
    first.commit_rows([row(0), row(1)], {"sensors/a": ("e", 1)})
    epoch = first.epoch
    first.close()
    again = open_outbox(tmp_path)
    assert (again.epoch, again.source("sensors/a")) == (epoch, ("e", 1))
    again.commit_rows([row(2)])
    assert len(rows_of(again, "result")) == 3
    again.acknowledge(epoch, "result", 1)
    assert (again.lane("result").floor, again.lane("result").next_seq) == (2, 3)
    assert len(rows_of(again, "result")) == 1


def test_acks_out_of_order_leave_the_rest(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    fill(outbox, 20)
    outbox.acknowledge(outbox.epoch, "result", 2, [(5, 9), (15, 17)])
    assert [seq for seq, _ in contents(outbox, "result")[0]] == [3, 4, *range(10, 15), 18, 19]
    assert outbox.lane("result").floor == 3
    part = outbox.read(outbox.epoch, "result", 4, rows=100, size=10_000, below=100)
    assert part is not None and (part.first, part.count) == (4, 1), "a batch has no hole"
    outbox.acknowledge("another-epoch", "result", 19)
    assert outbox.sizes()["result"].rows == 9


def test_a_failed_commit_leaves_neither_rows_nor_position(tmp_path: Path) -> None:
    class Unpackable:
        pass

    outbox = open_outbox(tmp_path)
    with pytest.raises(TypeError):
        outbox.commit_rows([row(0), ("result", Unpackable())], {"t": ("e", 0)})  # type: ignore[list-item]
    with pytest.raises(Exception, match=r"bind|support"):
        outbox.commit_rows([row(0)], {"t": (object(), 0)})  # type: ignore[dict-item]
    assert outbox.source("t") is None
    assert outbox.lane("result").next_seq == 0
    assert outbox.sizes()["result"].rows == 0


def test_a_sigkill_between_windows_keeps_rows_and_position_together(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from agent.outbox.outbox import Outbox
        from edgeward.clock import SystemClock
        from edgeward.wire.rows import ResultRow
        outbox = Outbox(Path(sys.argv[1]), SystemClock())
        seq = 0
        while True:
            rows = [("result", ResultRow(s, "s", 1, "", "e", s, "d", "v", "p", {}, False)) for s in range(seq, seq + 7)]
            seq += 7
            outbox.commit_rows(rows, {"t": ("e", seq - 1)})
            print(seq, flush=True)
        """
    )
    for attempt in range(3):
        path = tmp_path / f"outbox-{attempt}.db"
        child = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(5 + attempt * 17):
            last = int(child.stdout.readline())
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        outbox = Outbox(path, ManualClock())
        position = outbox.source("t")
        assert position is not None and position[1] + 1 == outbox.lane("result").next_seq >= last
        decode = msgspec.msgpack.Decoder(ResultRow).decode
        stored = [decode(item).source_seq for item in rows_of(outbox, "result")]
        assert stored == list(range(position[1] + 1))
        assert not files.aside(path), "a kill is no damage"
        outbox.close()


def test_the_status_can_be_read_while_the_agent_writes(tmp_path: Path) -> None:
    assert status(tmp_path / "outbox.db")["outbox"] == {}
    outbox = open_outbox(tmp_path)
    outbox.commit_rows([row(0)], {"t": ("e", 4)})
    facts = status(tmp_path / "outbox.db")
    assert facts["epoch"] == outbox.epoch and facts["sources"] == {"t": {"epoch": "e", "seq": 4}}
    assert facts["outbox"]["result"]["next_seq"] == 1 and facts["outbox"]["result"]["acked"] == -1


def test_rows_that_need_not_wait_for_the_disk_do_before_they_are_sent(tmp_path: Path) -> None:
    policies = {**DEFAULT_POLICIES, "result": LanePolicy(fsync="before-send")}
    outbox = open_outbox(tmp_path, policies=policies)
    said: list[str] = []
    outbox._db.set_trace_callback(said.append)

    def modes(do: Callable[[], object]) -> list[str]:
        said.clear()
        do()
        return [text for text in said if text.startswith(("PRAGMA", "COMMIT"))]

    assert modes(lambda: outbox.commit_rows([row(0)])) == ["PRAGMA synchronous=NORMAL", "COMMIT"]
    assert modes(lambda: outbox.commit_rows([row(1)])) == ["COMMIT"]
    read = lambda: outbox.read(outbox.epoch, "result", 0, rows=9, size=9999, below=99)  # noqa: E731
    assert modes(read) == ["PRAGMA synchronous=FULL", "COMMIT"]
    assert modes(read) == [], "they are durable now"
    assert modes(lambda: outbox.commit_rows([row(2), row(2, "alarm")])) == ["COMMIT"], "an alarm waits"
    outbox.commit_rows([row(3)])
    assert modes(lambda: outbox.commit_rows([row(4)], {"t": ("e", 4)}))[0] == "PRAGMA synchronous=FULL"


# --- budgets and ages -----------------------------------------------------------------------------


def test_results_thin_out_over_all_of_the_past_and_alarms_stay(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path, policies=SMALL)
    for start in range(0, 20_000, 100):
        fill(outbox, 100, first=start)
        if start % 1000 == 0:
            outbox.commit_rows([row(start, "alarm")])
    rows, _ = contents(outbox, "result")
    numbers = [seq for seq, _ in rows]
    assert len(contents(outbox, "alarm")[0]) == 20
    assert len(rows) + sum(lost_of(outbox, "result").values()) == 20_000
    assert set(lost_of(outbox, "result")) == {"thinned"}
    assert numbers[0] == 0 and max(b - a for a, b in pairwise(numbers)) <= 256
    assert sum(size.bytes for size in outbox.sizes().values()) <= 120_000 + 15_000
    assert outbox.sizes()["result"].lost == 20_000 - len(rows)


def test_trends_merge_and_lose_no_value(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path, policies=SMALL)
    fill(outbox, 4000, "trend")
    rows, _ = contents(outbox, "trend")
    trends = [msgspec.msgpack.decode(data, type=TrendRow) for _, data in rows]
    assert set(lost_of(outbox, "trend")) == {"merged"}
    assert sum(item.count for item in trends) == 4000
    assert {item.width for item in trends} <= {60_000_000, 600_000_000, 3_600_000_000}
    assert all(item.bucket % item.width == 0 for item in trends)


def test_trend_rows_that_may_be_at_the_store_are_merged_with_none(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path, policies=SMALL)
    fill(outbox, 100, "trend")
    outbox.read(outbox.epoch, "trend", 0, rows=50, size=1 << 20, below=50)
    outbox.close()
    outbox = open_outbox(tmp_path, policies=SMALL)  # which were sent is known after a kill, too
    fill(outbox, 2000, "trend", first=100)
    sent = [
        msgspec.msgpack.decode(data, type=TrendRow) for seq, data in contents(outbox, "trend")[0] if seq < 50
    ]
    assert len(sent) == 50 and {item.width for item in sent} == {60_000_000}


def test_alarms_go_when_nothing_else_is_left(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path, policies=SMALL)
    for lane in ("result", "trend", "sample"):
        fill(outbox, 100, lane)
    fill(outbox, 3000, "alarm")
    sizes = outbox.sizes()
    assert [sizes[lane].rows for lane in ("result", "trend", "sample")] == [0, 0, 0]
    assert set(lost_of(outbox, "alarm")) == {"budget"}
    assert [seq for seq, _ in contents(outbox, "alarm")[0]][-1] == 2999, "the oldest went"


def test_what_is_older_than_it_is_worth_is_lost_by_name_whatever_the_wall_clock_says(tmp_path: Path) -> None:
    clock = ManualClock()
    policies = {**DEFAULT_POLICIES, "result": LanePolicy(time_to_live=100.0)}
    outbox = open_outbox(tmp_path, clock, policies=policies)
    fill(outbox, 10)
    clock.set_wall(clock.now() + 1e9)
    outbox.tend()
    assert len(rows_of(outbox, "result")) == 10, "a clock that jumps makes no row old"
    clock.advance(70)
    fill(outbox, 5, first=10)
    outbox.tend()
    outbox.close()
    clock.advance(1e6)  # switched off
    outbox = open_outbox(tmp_path, clock, policies=policies)
    outbox.tend()
    assert len(rows_of(outbox, "result")) == 15
    clock.advance(40)
    outbox.tend()
    assert [seq for seq, _ in contents(outbox, "result")[0]] == list(range(10, 15))
    assert lost_of(outbox, "result") == {"time-to-live": 10}
    part = outbox.read(outbox.epoch, "result", 0, rows=99, size=9999, below=99)
    assert part is not None and part.lost[0].first_event_time > 0


def test_many_lost_rows_are_few_records(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path, policies=SMALL)
    fill(outbox, 30_000)
    (gaps,) = outbox._db.execute("SELECT count(*) FROM gap").fetchone()
    assert gaps <= outbox.sizes()["result"].rows + 1


# --- damage ---------------------------------------------------------------------------------------


def zero_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(100))


def random_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(random.Random(1).randbytes(100))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096 + 77)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def remove(path: Path) -> None:
    path.unlink()


def random_pages(path: Path) -> None:
    chance = random.Random(2)
    with path.open("r+b") as file:
        for page in chance.sample(range(1, path.stat().st_size // 4096), 6):
            file.seek(page * 4096)
            file.write(chance.randbytes(4096))


def flipped_bits(path: Path) -> None:
    chance = random.Random(3)
    data = bytearray(path.read_bytes())
    for _ in range(40):
        data[chance.randrange(4096, len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "least"),
    [
        (zero_header, 3000), (random_header, 3000), (truncate, 500), (empty, 0), (remove, 0), (random_pages, 2000),
        (flipped_bits, 1000),
    ],
)  # fmt: skip
def test_damage_is_found_counted_and_survived(
    tmp_path: Path, harm: Callable[[Path], None], least: int
) -> None:
    path = tmp_path / "outbox.db"
    outbox = open_outbox(tmp_path)
    fill(outbox, 3000)
    outbox.acknowledge(outbox.epoch, "result", 9)
    before, contents_before = outbox.epoch, dict(contents(outbox, "result")[0])
    outbox.close()
    harm(path)
    outbox = open_outbox(tmp_path)
    outbox.commit_rows([row(9000)])
    outbox.wait_salvaged()
    rows, _ = contents(outbox, "result", before)
    lost = lost_of(outbox, "result", before)
    assert dict(rows).items() <= contents_before.items(), "what is salvaged is what was written"
    assert len(rows) + sum(lost.values()) == 2990 and set(lost) <= {"corruption"}
    assert len(rows) >= least - 10
    assert len(rows_of(outbox, "result")) == (1 if outbox.epoch != before else len(rows))
    outbox.close()
    assert len(files.aside(path)) == (outbox.epoch != before)


def test_a_log_of_rubbish_is_a_loss_and_no_number_is_given_twice(tmp_path: Path) -> None:
    """SQLite leaves out what does not verify, and opens the file as if it had never been."""
    outbox = open_outbox(tmp_path)
    fill(outbox, 500)
    outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    fill(outbox, 300, first=500)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("outbox.db", "outbox.db-wal", "outbox.mark"):
        (copy / name).write_bytes((tmp_path / name).read_bytes())
    log = copy / "outbox.db-wal"
    data = bytearray(log.read_bytes())
    data[len(data) // 2 :] = random.Random(4).randbytes(len(data) - len(data) // 2)
    log.write_bytes(data)
    before = outbox.epoch
    outbox.close()
    again = open_outbox(copy)
    again.wait_salvaged()
    assert again.epoch != before
    rows, _ = contents(again, "result", before)
    assert 500 <= len(rows) < 800 and lost_of(again, "result", before) == {"corruption": 800 - len(rows)}
    again.close()


def test_damage_while_it_runs_stops_nothing(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    fill(outbox, 2000)
    outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = outbox.epoch
    # Every page but the first becomes noise under the open file, as on a card that dies.
    with (tmp_path / "outbox.db").open("r+b") as file:
        for page in range(1, (tmp_path / "outbox.db").stat().st_size // 4096):
            file.seek(page * 4096)
            file.write(random.Random(page).randbytes(4096))
    outbox._db.execute("PRAGMA shrink_memory")
    fill(outbox, 100, first=2000)
    assert outbox.lane("result").next_seq >= 100
    outbox.acknowledge(before, "result", 5)
    outbox.tend()
    outbox.wait_salvaged()
    assert outbox.epoch != before
    total = {item.epoch for item in outbox.sequences() if item.lane == "result"}
    assert total == {before, outbox.epoch}
    rows, _ = contents(outbox, "result", before)
    assert len(rows) + sum(lost_of(outbox, "result", before).values()) >= 2000 - 6
    outbox.close()


def test_one_flipped_bit_costs_one_row(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    fill(outbox, 50)
    outbox._db.execute("UPDATE row SET data = CAST(x'93' || substr(data, 2) AS BLOB) WHERE seq = 7")
    rows, lost = contents(outbox, "result")
    assert len(rows) == 49 and lost == [(7, 7, {"corruption": 1})]


def test_positions_and_open_trends_outlive_the_damage_of_other_pages(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    outbox.commit_rows(
        [], {"t": ("e", 41)}, [TrendChange("s", b"whole", True), TrendChange("s", b"more", False)]
    )
    outbox.commit_rows([], None, [TrendChange("bad", b"bits", True), TrendChange("bad", b"more", False)])
    outbox._db.execute(
        "UPDATE trend SET change = CAST(change || x'00' AS BLOB) WHERE stream = 'bad' AND n = 0"
    )
    assert outbox.open_trends("bad") == [], "a part is not passed off as the whole"
    outbox.close()
    zero_header(tmp_path / "outbox.db")
    outbox = open_outbox(tmp_path)
    assert outbox.source("t") == ("e", 41) and outbox.open_trends("s") == [b"whole", b"more"]
    assert outbox.open_trends("bad") == []
    outbox.close()


def test_pages_of_rubbish_are_read_without_a_word(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    fill(outbox, 200)
    known = dict(contents(outbox, "result")[0])
    outbox.close()
    raw = (tmp_path / "outbox.db").read_bytes()
    pages = [raw[at : at + 4096] for at in range(0, len(raw), 4096)]
    found = {cell.seq: cell.data for page in pages for cell in rows_in_page(page)}
    assert found == known
    chance = random.Random(5)
    for _ in range(400):
        page = bytearray(chance.choice(pages) if chance.random() < 0.8 else chance.randbytes(4096))
        page[0] = chance.choice((2, 10))
        for _ in range(chance.choice((1, 10, 200))):
            page[chance.randrange(4096)] = chance.randrange(256)
        for cell in rows_in_page(bytes(page)):
            assert known[cell.seq] == cell.data


def test_few_damaged_files_are_kept(tmp_path: Path) -> None:
    for number in range(5):
        outbox = open_outbox(tmp_path)
        fill(outbox, 10, first=number * 10)
        outbox.wait_salvaged()
        outbox.close()
        zero_header(tmp_path / "outbox.db")
    outbox = open_outbox(tmp_path)
    outbox.wait_salvaged()
    assert len(files.aside(tmp_path / "outbox.db")) == files.KEPT
    waiting = [item for item in outbox.sequences() if item.lane == "result" and item.floor < item.next_seq]
    assert len(waiting) == 5, "five epochs, none of them lost"
    outbox.close()


# --- an older agent's rows ------------------------------------------------------------------------

OLD = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE source (topic TEXT PRIMARY KEY, epoch TEXT, seq INTEGER) WITHOUT ROWID;
CREATE TABLE trend (stream TEXT, n INTEGER, change BLOB NOT NULL, PRIMARY KEY (stream, n)) WITHOUT ROWID;
CREATE TABLE lane (name TEXT PRIMARY KEY, next_seq INTEGER, acked INTEGER) WITHOUT ROWID;
CREATE TABLE outbox (lane TEXT, seq INTEGER, row BLOB NOT NULL, PRIMARY KEY (lane, seq)) WITHOUT ROWID;
INSERT INTO meta VALUES ('epoch', 'old-epoch'), ('generation', 7);
INSERT INTO source VALUES ('t', 'e', 41);
INSERT INTO trend VALUES ('s', 0, x'90'), ('s', 1, x'91');
"""


def older_agent(path: Path) -> list[bytes]:
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode=WAL")
    db.executescript(OLD)
    rows = [msgspec.msgpack.encode(row(seq)[1]) for seq in range(12_000)]
    for lane in LANES:
        db.execute(
            "INSERT INTO lane VALUES (?, ?, ?)",
            (lane, 12_000 if lane == "result" else 0, 9 if lane == "result" else -1),
        )
    db.executemany(
        "INSERT INTO outbox VALUES ('result', ?, ?)", [(seq, rows[seq]) for seq in range(10, 12_000)]
    )
    db.commit()
    db.close()
    return rows


def check_taken_over(folder: Path, outbox: Outbox, rows: list[bytes]) -> None:
    assert outbox.epoch == "old-epoch" and outbox.source("t") == ("e", 41)
    assert outbox.open_trends("s") == [b"\x90", b"\x91"]
    assert contents(outbox, "result") == (list(enumerate(rows))[10:], [])
    assert outbox.lane("result").floor == 10
    tables = sqlite3.connect(folder / "state.db").execute("SELECT name FROM sqlite_master").fetchall()
    assert not {"outbox", "lane", "source", "trend"} & {name for (name,) in tables}
    assert State(folder / "state.db").generation() == 7
    assert not files.aside(folder / "outbox.db"), "rows that came twice would look like damage"


def test_an_older_agents_rows_are_taken_over_once(tmp_path: Path) -> None:
    rows = older_agent(tmp_path / "state.db")
    State(tmp_path / "state.db").close()
    outbox = open_outbox(tmp_path, older=tmp_path / "state.db")
    check_taken_over(tmp_path, outbox, rows)
    outbox.acknowledge("old-epoch", "result", 11_999)
    outbox.close()
    outbox = open_outbox(tmp_path, older=tmp_path / "state.db")
    assert rows_of(outbox, "result") == [] and outbox.lane("result").next_seq == 12_000
    outbox.close()


@pytest.mark.parametrize("where", ["take_over", "drop_taken"])
def test_a_kill_during_the_take_over_doubles_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from agent.outbox import outbox as module

    rows = older_agent(tmp_path / "state.db")
    real = getattr(takeover_module, where)

    class Killed(BaseException):
        pass

    def killed(*arguments: object) -> None:
        if where == "take_over":
            real(*arguments)
        raise Killed

    monkeypatch.setattr(module, where, killed)
    with pytest.raises(Killed):
        open_outbox(tmp_path, older=tmp_path / "state.db")
    monkeypatch.undo()
    outbox = open_outbox(tmp_path, older=tmp_path / "state.db")
    check_taken_over(tmp_path, outbox, rows)
    outbox.close()
