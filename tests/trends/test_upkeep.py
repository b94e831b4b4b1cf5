"""Tables that are kept for years: compaction, retention, checkpoints, and what a power cut leaves of them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.errors import EdgewardError, UsageError
from edgeward.identifiers import DeviceName
from edgeward.wire.rows import ResultRow, encode_rows
from tests.trends.conftest import Plant
from trends.journal import Journal
from trends.local_files import ASIDE, repair
from trends.query import Queries
from trends.tables import Tables
from trends.upkeep import (
    DAY,
    DataFile,
    Limits,
    Retention,
    Upkeep,
    data_files,
    parse_retention,
    worth_compacting,
)

NOW = 1_790_000_000.0
NAME = DeviceName("north", "a")


class Bench:
    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder / "journal.db")
        self.tables = Tables(folder / "tables", self.journal)
        self.root = folder / "tables" / "results"
        self.next = 0

    def flush(self, number: int = 10, day: int = 0) -> None:
        """One commit of so many rows, `day` days before now."""
        at = int((NOW - day * DAY) * 1e6)
        row = ResultRow(at, "s", 1, "k", "e", self.next, "d" * 64, "v", "CPU", {"y": 1.0}, False)
        rows = encode_rows([row] * number)
        with self.journal.transaction():
            self.journal.append(NAME, "e", "result", at, self.next, number, rows)
        self.next += number
        self.tables.flush()

    def stored(self) -> list[int]:
        answer = Queries(self.tables, self.journal).sql("select seq from results order by seq")
        return answer.column("seq").to_pylist()

    def files(self) -> list[DataFile]:
        opened, _ = self.tables.snapshot("results")
        assert opened is not None
        return data_files(opened)

    def entries(self) -> list[Path]:
        return sorted((self.root / "_delta_log").glob("*.json"))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.journal.close()


@given(
    st.lists(st.builds(DataFile, st.sampled_from(["2026-01-01", "2026-01-02", ""]), st.integers(0, 100))),
    st.integers(1, 5),
)
def test_partitions_with_many_small_files_are_written_anew(files: list[DataFile], most: int) -> None:
    found = worth_compacting(files, Limits(files=most, target_bytes=100))
    for day in {file.day for file in files}:
        small = [file for file in files if file.day == day and file.size < 50]
        assert (day in found) == (len(small) >= most)
    assert found == sorted(found)


def test_many_small_files_become_one_and_every_row_stays_once(bench: Bench) -> None:
    for number in range(6):
        bench.flush(day=number % 2)
    upkeep = Upkeep(bench.tables, Retention(), Limits(files=3))
    upkeep.run(NOW)
    assert sorted(file.day for file in bench.files()) == sorted({file.day for file in bench.files()})
    assert bench.stored() == list(range(60))
    bench.flush()
    assert bench.stored() == list(range(70)), "the table still knows up to where it has the journal"
    assert bench.journal.count() == 0


def test_days_over_their_retention_are_removed_and_others_are_not(bench: Bench) -> None:
    for day in range(5):
        bench.flush(day=day)
    upkeep = Upkeep(bench.tables, Retention({"results": 2}), Limits(files=100))
    before = len(bench.entries())
    upkeep.run(NOW)
    assert bench.stored() == list(range(30)), "today and the two days before it"
    assert len(bench.entries()) == before + 1
    upkeep.run(NOW)
    assert len(bench.entries()) == before + 1, "nothing to do is no commit"
    upkeep.run(NOW + 30 * DAY)
    assert bench.stored() == []
    bench.flush(day=0)
    assert bench.stored() == list(range(50, 60))


@given(st.integers(0, 4_000_000_000), st.integers(1, 4000))
def test_the_first_day_kept_is_so_many_days_before_today(now: int, days: int) -> None:
    today = datetime.datetime.fromtimestamp(now, datetime.UTC).date()
    first = Retention({"trends": days}).first_day("trends", now)
    assert first == (today - datetime.timedelta(days=days)).isoformat()
    assert Retention({"trends": days}).first_day("results", now) is None


@pytest.mark.parametrize(
    "text", ["results", "results=", "results=-1", "results=0", "nothing=3", "gaps=3", "=3"]
)
def test_a_retention_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_retention([text])


def test_a_retention_is_read(tmp_path: Path) -> None:
    assert parse_retention(["results=90", "samples=14"]) == Retention({"results": 90, "samples": 14})


def test_the_log_is_summed_up_and_files_that_nobody_needs_go(bench: Bench) -> None:
    for _ in range(6):
        bench.flush()
    upkeep = Upkeep(bench.tables, Retention(), Limits(files=2, checkpoint=5, vacuum_hours=0))
    upkeep.run(NOW)
    assert list((bench.root / "_delta_log").glob("*.checkpoint.parquet"))
    assert len(list(bench.root.rglob("part-*.parquet"))) == 1 == len(bench.files())
    assert bench.stored() == list(range(60))


# a power cut


def _unsettled(bench: Bench) -> int:
    """Rows that the journal still has, in a version that was not flushed to the disk; that version."""
    bench.flush()
    done, whole = bench.journal.flushed("results"), bench.tables
    bench.tables = Tables(bench.root.parent, bench.journal, between=_cut)
    with pytest.raises(PowerCut):
        bench.flush()
    bench.tables = whole
    assert bench.journal.count() == 10 and bench.journal.flushed("results") == done
    return done


class PowerCut(Exception):
    pass


def _cut(*_: object) -> None:
    raise PowerCut


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [_empty, _halve, _zero, _page, Path.unlink])
@pytest.mark.parametrize("what", ["entry", "file"])
def test_a_version_that_a_power_cut_has_damaged_is_set_aside_and_written_again(
    bench: Bench, harm: object, what: str
) -> None:
    _unsettled(bench)
    entry = bench.entries()[-1]
    (added,) = [json.loads(line)["add"]["path"] for line in entry.read_text().splitlines() if '"add"' in line]
    if what == "entry" and harm is _page:
        return  # JSON has no pages
    harm(entry if what == "entry" else bench.root / added)  # type: ignore[operator]
    bench.tables.repair()
    bench.tables.flush()
    assert bench.stored() == list(range(20)) and bench.journal.count() == 0
    bench.flush()
    assert bench.stored() == list(range(30))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_power_cut_may_lose_the_name_of_one_version_and_keep_the_other(tmp_path: Path, lost: int) -> None:
    bench = Bench(tmp_path)
    bench.tables = Tables(bench.root.parent, bench.journal, between=_cut)
    with pytest.raises(PowerCut):
        bench.flush()
    bench.tables = Tables(bench.root.parent, bench.journal)
    assert len(bench.entries()) == 2 and bench.journal.flushed("results") == -1
    bench.entries()[lost].unlink()
    bench.tables.repair()
    bench.tables.flush()
    assert bench.stored() == list(range(10)) and bench.journal.count() == 0


def test_what_follows_a_version_that_is_missing_is_set_aside_unless_a_checkpoint_has_it(bench: Bench) -> None:
    for _ in range(4):
        bench.flush()
    opened, _ = bench.tables.snapshot("results")
    assert opened is not None and opened.version() == 4
    bench.entries()[3].unlink()
    assert repair(bench.root, 1) == [4]
    opened, _ = bench.tables.snapshot("results")
    assert opened is not None and opened.version() == 2
    opened.create_checkpoint()
    for entry in bench.entries()[:2]:
        entry.unlink()  # as the clean-up of the log does
    assert repair(bench.root, -1) == [] and bench.stored() == list(range(20))


def test_a_version_that_is_whole_is_kept(bench: Bench) -> None:
    _unsettled(bench)
    before = [entry.name for entry in bench.entries()]
    bench.tables.repair()
    assert [entry.name for entry in bench.entries()] == before
    bench.tables.flush()
    assert bench.stored() == list(range(20)) and bench.journal.count() == 0
    assert not (bench.root / "_delta_log" / ASIDE).exists()


def test_what_another_program_has_written_after_the_damage_is_left_to_a_person(bench: Bench) -> None:
    _unsettled(bench)
    opened, _ = bench.tables.snapshot("results")
    assert opened is not None
    opened.optimize.compact()  # by somebody's own tool
    damaged = bench.entries()[-2]
    _empty(damaged)
    with pytest.raises(EdgewardError, match="another program") as found:
        bench.tables.repair()
    assert found.value.hint and damaged.exists()


@pytest.mark.parametrize("harm", [_empty, _halve, Path.unlink])
@pytest.mark.parametrize("what", ["_last_checkpoint", "*.checkpoint.parquet"])
def test_a_damaged_checkpoint_costs_nothing(bench: Bench, harm: object, what: str) -> None:
    for _ in range(3):
        bench.flush()
    Upkeep(bench.tables, Retention(), Limits(checkpoint=1, files=100)).run(NOW)
    (path,) = (bench.root / "_delta_log").glob(what)
    harm(path)  # type: ignore[operator]
    bench.tables.repair()
    bench.flush()
    assert bench.stored() == list(range(40))


def test_upkeep_that_is_cut_off_at_any_commit_loses_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(4):
        bench.flush()
    with monkeypatch.context() as patch:
        patch.setattr(Tables, "settle", _cut)
        with pytest.raises(PowerCut):
            Upkeep(bench.tables, Retention(), Limits(files=2)).run(NOW)
    _empty(bench.entries()[-1])
    bench.tables.repair()
    assert bench.stored() == list(range(40))
    Upkeep(bench.tables, Retention(), Limits(files=2)).run(NOW)
    assert bench.stored() == list(range(40)) and len(bench.files()) == 1


def test_a_day_that_is_over_is_sorted_as_a_whole_and_today_is_not(plant: Plant) -> None:
    minutes = [5, 1, 3, 0, 4, 2]
    for minute in minutes:
        plant.put(plant.trend(minute, [1.0], digest=plant.new), plant.trend(minute, [2.0], digest=plant.old))
    upkeep = Upkeep(plant.tables, Retention(), Limits(files=100), scratch=plant.folder)
    today = plant.start / 1e6

    def lying() -> list[tuple[str, int]]:
        opened, _ = plant.tables.snapshot("trends")
        assert opened is not None
        rows = opened.to_pyarrow_table().select(["digest", "bucket", "seq", "date", "sketch"]).to_pylist()
        assert {row["date"] for row in rows} == {"2026-03-02"} and all(row["sketch"] for row in rows)
        assert sorted(row["seq"] for row in rows) == list(range(12))
        return [(row["digest"], int(row["bucket"].timestamp())) for row in rows]

    upkeep.run(today)
    assert lying() != sorted(lying()) and len(files_of(plant)) == 6
    upkeep.run(today + DAY)
    assert lying() == sorted(lying()) and len(files_of(plant)) == 1
    plant.put(plant.trend(7, [1.0]))
    plant.put(plant.trend(8, [1.0]))
    upkeep.run(today + DAY + 3600)
    assert len(files_of(plant)) == 3, "late rows do not make it sort again at once"
    upkeep.run(today + 3 * DAY)
    assert len(files_of(plant)) == 1
    plant.tables.repair()
    plant.put(plant.trend(9, [1.0]))
    assert plant.journal.count() == 0
    assert list(plant.folder.glob("edgeward-sort-*")) == []


def files_of(plant: Plant) -> list[DataFile]:
    opened, _ = plant.tables.snapshot("trends")
    assert opened is not None
    return data_files(opened)


@pytest.mark.parametrize("change", ["lacks a column", "has one more", "loses a row"])
def test_a_day_is_not_sorted_at_the_price_of_a_row_or_a_column(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """In this process: what the sort finds there is what matters."""
    from trends import schemas, sorting

    whole = schemas.SCHEMAS["trends"]
    if change == "lacks a column":
        monkeypatch.setitem(schemas.SCHEMAS, "trends", whole.remove(whole.get_field_index("sketch")))
    for minute in (3, 1):
        plant.put(plant.trend(minute, [1.0]))
    monkeypatch.setitem(schemas.SCHEMAS, "trends", whole)
    root, before = plant.tables.uri("trends"), len(files_of(plant))
    if change == "has one more":
        monkeypatch.setitem(schemas.SCHEMAS, "trends", whole.remove(whole.get_field_index("sketch")))
    if change == "loses a row":
        monkeypatch.setattr(sorting, "_write", lambda *_: (1, {}))
    scratch = plant.folder / "scratch"
    scratch.mkdir()
    if change == "lacks a column":
        sorting.sort_day(root, "2026-03-02", str(scratch), {})
        assert len(files_of(plant)) == 1
    else:
        with pytest.raises(EdgewardError, match=r"columns|rows"):
            sorting.sort_day(root, "2026-03-02", str(scratch), {})
        assert len(files_of(plant)) == before
    assert plant.engine is not None and plant.journal.count() == 0
    opened, _ = plant.tables.snapshot("trends")
    assert opened is not None and opened.to_pyarrow_table().num_rows == 2
