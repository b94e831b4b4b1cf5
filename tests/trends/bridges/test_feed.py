"""Rows behind a position: all, in commit order, through compaction, retention, clean-up and power cuts."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeward.errors import Conflict, InvalidDocument
from tests.trends.bridges.filled import Filled, read, seqs
from trends.bridges.feed import Position, Skipped
from trends.bridges.history import DataFile, Moves, parse_commit
from trends.schemas import SCHEMAS


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Filled]:
    made = Filled(tmp_path)
    yield made
    made.close()


def test_rows_come_in_the_order_of_commits_and_once(filled: Filled) -> None:
    feed = filled.feed()
    assert list(feed.batches(Position(), 10)) == []
    for number in (3, 10, 1):
        filled.commit(number)
    first, after = read(feed)
    assert first == list(range(14))
    assert read(feed, after) == ([], after)
    filled.commit(2)
    assert read(feed, after)[0] == [14, 15]


@pytest.mark.parametrize("limit", [1, 3, 7, 1000])
def test_a_batch_is_bounded_and_each_position_is_a_place_to_go_on_from(filled: Filled, limit: int) -> None:
    filled.append(20, day=0)
    filled.append(11, day=1)
    filled.tables.flush()
    filled.commit(5)
    whole, _ = read(filled.feed(), limit=limit)
    assert sorted(whole) == list(range(36))
    positions = [Position()]
    handed: list[int] = []
    for batch in filled.feed().batches(Position(), limit):
        assert batch.rows.num_rows <= limit
        handed += seqs(batch)
        kept = msgspec.json.decode(msgspec.json.encode(batch.after), type=Position)
        assert read(filled.feed(), kept, limit)[0] == whole[len(handed) :]
        positions.append(kept)
    assert handed == whole and len(set(map(str, positions))) == len(positions)


def test_rows_have_every_column_of_the_schema(filled: Filled) -> None:
    filled.commit(2, lane="trend")
    filled.commit(2, lane="sample")
    filled.lose(5, 9)
    for table in ("trends", "samples", "gaps"):
        (batch,) = filled.feed(table).batches(Position(), 10)
        assert batch.rows.schema.equals(SCHEMAS[table])
        opened, _ = filled.tables.snapshot(table)
        assert opened is not None
        stored = opened.to_pyarrow_table().select(SCHEMAS[table].names).to_pylist()
        assert batch.rows.to_pylist() == stored


def test_compaction_brings_nothing_again(filled: Filled) -> None:
    for _ in range(4):
        filled.commit(3)
    _, after = read(filled.feed())
    filled.upkeep(files=2)
    filled.commit(2)
    assert read(filled.feed(), after)[0] == [12, 13]
    assert read(filled.feed())[0] == list(range(14)), "and nothing twice from the beginning"


@pytest.mark.parametrize("away", [False, True])
def test_a_day_that_was_sorted_brings_nothing_again(filled: Filled, away: bool) -> None:
    """An overwrite of rows that were there, as Delta's log has it; the files before go a day later."""
    for _ in range(3):
        filled.commit(3, day=1, lane="trend")
    entries = len(list((filled.root("trends") / "_delta_log").glob("*.json")))
    read_before = Position() if away else read(filled.feed("trends"))[1]
    filled.upkeep(files=100)
    assert len(list((filled.root("trends") / "_delta_log").glob("*.json"))) == entries + 1, "it was sorted"
    filled.vacuum()
    filled.commit(1, lane="trend")
    handed, _ = read(filled.feed("trends"), read_before)
    assert sorted(handed) == (list(range(10)) if away else [9])


def test_a_bridge_that_was_away_finds_rows_where_compaction_has_put_them(filled: Filled) -> None:
    filled.commit(3)
    _, after = read(filled.feed())
    for _ in range(3):
        filled.commit(3)
    filled.upkeep(files=2)
    for _ in range(3):
        filled.commit(3)
    filled.upkeep(files=2)
    filled.vacuum()
    filled.commit(1)
    handed, end = read(filled.feed(), after, limit=4)
    assert set(handed) >= set(range(3, 22)), "nothing is lost"
    assert len(handed) <= 22, "each compacted file comes once"
    assert handed[-1] == 21 and end.again == {}
    assert read(filled.feed(), end)[0] == []


def test_an_interrupted_stand_in_loses_nothing(filled: Filled) -> None:
    for _ in range(4):
        filled.commit(10)
    filled.upkeep(files=2)
    filled.vacuum()
    dice = random.Random(5)
    position, handed = Position(), []
    while True:
        batches = filled.feed().batches(position, 7)
        for batch in batches:
            handed += seqs(batch)
            if dice.random() < 0.3:
                break  # killed before the cursor moved
            position = batch.after
        else:
            break
    assert set(handed) == set(range(40))


def test_what_retention_removed_is_said_exactly(filled: Filled) -> None:
    filled.commit(2)
    _, after = read(filled.feed())
    filled.commit(7, day=40)
    filled.commit(4)
    filled.keep_days(30)
    filled.vacuum()
    batches = list(filled.feed().batches(after, 100))
    assert [seq for batch in batches for seq in seqs(batch)] == [9, 10, 11, 12]
    (skipped,) = [skipped for batch in batches for skipped in batch.skipped]
    assert (skipped.first_version, skipped.last_version, skipped.rows) == (2, 2, 7)
    assert "retention" in skipped.reason


def test_what_was_compacted_and_then_expired_is_said(filled: Filled) -> None:
    for _ in range(3):
        filled.commit(5, day=40)
    filled.upkeep(files=2)
    filled.keep_days(30)
    filled.vacuum()
    filled.commit(1)
    batches = list(filled.feed().batches(Position(), 100))
    assert [seq for batch in batches for seq in seqs(batch)] == [15]
    assert sum(skipped.rows for batch in batches for skipped in batch.skipped) == 15


def test_a_log_that_was_cleaned_up_means_the_whole_table(filled: Filled) -> None:
    for _ in range(4):
        filled.commit(5)
    _, after = read(filled.feed(), limit=5)
    for _ in range(2):
        filled.commit(5, day=1)
    opened, _ = filled.tables.snapshot("results")
    assert opened is not None
    opened.create_checkpoint()
    for entry in (filled.root() / "_delta_log").glob("*.json"):
        if int(entry.stem) < 6:
            entry.unlink()
    # A new bridge, killed after every batch, gets all without a complaint.
    position, handed = Position(), []
    while batch := next(filled.feed().batches(position, 4), None):
        handed += seqs(batch)
        position = batch.after
        assert batch.skipped == ()
    assert sorted(handed) == list(range(30)) and position.version == 6
    # One that was further says of which versions it does not know what they removed.
    batches = list(filled.feed().batches(after, 100))
    assert sorted(seq for batch in batches for seq in seqs(batch)) == list(range(30))
    assert [(s.first_version, s.last_version, s.rows) for batch in batches for s in batch.skipped] == [
        (5, 6, -1)
    ]
    filled.commit(2)
    assert read(filled.feed(), position)[0] == [30, 31]


def test_a_snapshot_whose_files_went_away_is_begun_anew(filled: Filled) -> None:
    for _ in range(3):
        filled.commit(5)
    opened, _ = filled.tables.snapshot("results")
    assert opened is not None
    opened.create_checkpoint()
    (filled.root() / "_delta_log" / f"{0:020d}.json").unlink()
    first = next(filled.feed().batches(Position(), 5))
    assert first.after.snapshot == 3
    filled.upkeep(files=2)
    filled.vacuum()
    rest, after = read(filled.feed(), first.after)
    assert sorted(rest) == list(range(15)) and after.version == filled.feed().newest()


def test_only_what_outlasts_a_power_cut_is_handed_on(filled: Filled) -> None:
    filled.commit(3)
    rows = filled.feed().batches(Position(), 10).__next__().rows
    write_deltalake(
        filled.tables.uri("results"), rows, mode="append"
    )  # committed, not yet flushed to the disk
    assert read(filled.feed())[0] == [0, 1, 2]
    filled.tables.settle("results")
    assert len(read(filled.feed())[0]) == 6


def test_new_columns_come_along(filled: Filled) -> None:
    filled.commit(1)
    (batch,) = filled.feed().batches(Position(), 10)
    wider = batch.rows.append_column("lot", pa.array(["A7"]))
    write_deltalake(filled.tables.uri("results"), wider, mode="append", schema_mode="merge")
    filled.tables.settle("results")
    (both,) = filled.feed().batches(Position(), 10)
    assert both.rows.column("lot").to_pylist() == [None, "A7"]


def test_another_table_or_an_older_state_is_not_taken_for_this_one(filled: Filled, tmp_path: Path) -> None:
    filled.commit(1)
    filled.commit(1)
    _, after = read(filled.feed())
    (tmp_path / "other").mkdir()
    other = Filled(tmp_path / "other")
    other.commit(1)
    with pytest.raises(Conflict, match="made anew"):
        read(other.feed(), after)
    other.close()
    for entry in (filled.root() / "_delta_log").glob("*[1-9].json"):
        entry.unlink()
    filled.journal.set_flushed("results", 0)
    with pytest.raises(Conflict, match="backup"):
        read(filled.feed(), after)
    shutil.rmtree(filled.root())
    with pytest.raises(Conflict, match="gone"):
        read(filled.feed(), after)


def test_a_damaged_log_is_refused_by_its_version(filled: Filled) -> None:
    filled.commit(1)
    filled.commit(1)
    entry = filled.root() / "_delta_log" / f"{1:020d}.json"
    good = entry.read_bytes()
    for damage in (good[:-20], b"[]\n", b'{"add":{"path":1}}', b"\xff\xfe"):
        entry.write_bytes(damage)
        with pytest.raises(InvalidDocument, match="version 1"):
            parse_commit(1, damage.decode(errors="replace"))


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[set[int]], list[tuple[list[int], int]]]:
    """Appends of one file each, then rewrites of several files into one."""
    files = draw(st.integers(1, 8))
    return [{number} for number in range(files)], draw(
        st.lists(st.tuples(st.lists(st.integers(0, 15), min_size=1, max_size=4), st.just(0)), max_size=6)
    )


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(histories())
def test_every_row_is_found_through_any_chain_of_rewrites(
    history: tuple[list[set[int]], list[tuple[list[int], int]]],
) -> None:
    appended, rewrites = history
    contents = {f"f{number}": rows for number, rows in enumerate(appended)}
    live, moves = list(contents), Moves()
    for version, (picks, _) in enumerate(rewrites, 100):
        chosen = sorted({live[pick % len(live)] for pick in picks})
        made = f"c{version}"
        contents[made] = set().union(*(contents[path] for path in chosen))
        live = [path for path in live if path not in chosen] + [made]
        lines = [f'{{"remove":{{"path":"{path}","dataChange":false}}}}' for path in chosen]
        lines.append(f'{{"add":{{"path":"{made}","partitionValues":{{}},"dataChange":false}}}}')
        moves.add(parse_commit(version, "\n".join(lines)))
    for number, rows in enumerate(appended):
        path = f"f{number}"
        if path not in live:
            found = moves.of(DataFile(path, {}, 1), lambda path: path in live)
            assert found.complete
            assert rows <= set().union(*(contents[file.path] for file, _ in found.files))


def test_a_rewrite_of_several_days_is_followed_day_by_day() -> None:
    lines = [f'{{"remove":{{"path":"{day}-{n}","dataChange":false}}}}' for day in "abc" for n in "12"]
    lines += [
        f'{{"add":{{"path":"{day}-new","partitionValues":{{"date":"{day}"}},"dataChange":false}}}}'
        for day in "ab"
    ]
    moves = Moves()
    moves.add(parse_commit(3, "\n".join(lines)))
    found = moves.of(DataFile("b-1", {"date": "b"}, 5), lambda path: True)
    assert [file.path for file, _ in found.files] == ["b-new"] and found.complete
    # One whose day got no file in exchange is gone, and not silently.
    assert not moves.of(DataFile("c-1", {"date": "c"}, 5), lambda path: True).complete


def test_a_skip_survives_being_kept() -> None:
    skipped = Skipped(1, 2, -1, "x")
    assert msgspec.json.decode(msgspec.json.encode(skipped), type=Skipped) == skipped
