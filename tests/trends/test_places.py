"""The tables in a folder and in a bucket of a real S3 server: one contract for both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError

from edgeward.errors import EdgewardError
from edgeward.identifiers import DeviceName
from edgeward.object_store import settings_from
from edgeward.wire.rows import ResultRow, encode_rows
from edgeward.wire.topics import Lane
from edgeward.wire.trend_query import TrendQuery
from tests.servers.s3 import S3Server
from trends.bucket import Bucket
from trends.completeness import lanes
from trends.journal import Journal, Stored
from trends.local_files import LocalFolder
from trends.queries.engine import Engine
from trends.query import Queries
from trends.schemas import SCHEMAS
from trends.tables import Place, Tables
from trends.upkeep import DAY, DataFile, Limits, Retention, Upkeep, data_files

NOW = 1_790_000_000.0
NAME = DeviceName("north", "a")


class Bench:
    def __init__(self, folder: Path, place: Place, journal: type[Journal] = Journal) -> None:
        self.place = place
        self.journal = journal(folder / "journal.db")
        self.tables = Tables(place, self.journal)
        self.next = 0

    def put(self, number: int = 10, day: float = 0, outputs: dict[str, float] | None = None) -> None:
        """So many rows, `day` days before now, that wait in the journal."""
        at = int((NOW - day * DAY) * 1e6)
        rows = [
            ResultRow(
                at, "s", 1, "k", "se", self.next + index, "d" * 64, "v", "CPU", outputs or {"y": 1.0}, False
            )
            for index in range(number)
        ]
        with self.journal.transaction():
            self.journal.append(NAME, "e", "result", at, self.next, number, encode_rows(list(rows)))
        self.next += number

    def lose(self) -> None:
        """One number, as a gap."""
        with self.journal.transaction():
            self.journal.append_gap(NAME, "e", "result", int(NOW * 1e6), (self.next, self.next), "budget")
        self.next += 1

    def flush(self, number: int = 10, day: float = 0) -> None:
        self.put(number, day)
        self.tables.flush()

    def stored(self) -> list[int]:
        answer = Queries(self.tables, self.journal).sql("select seq from results order by seq")
        return answer.column("seq").to_pylist()

    def opened(self, table: str = "results") -> DeltaTable:
        opened, _ = self.tables.snapshot(table)
        assert opened is not None
        return opened

    def files(self, table: str = "results") -> list[DataFile]:
        return data_files(self.opened(table))

    def close(self) -> None:
        self.journal.close()


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return LocalFolder(tmp_path / "tables")
    server, bucket = request.getfixturevalue("s3_server"), request.getfixturevalue("s3_bucket")
    return in_bucket(server, bucket)


def in_bucket(server: S3Server, bucket: str) -> Bucket:
    return Bucket(settings_from(f"s3://{bucket}/plant/tables", server.environment))


@pytest.fixture
def bench(tmp_path: Path, place: Place) -> Iterator[Bench]:
    made = Bench(tmp_path, place)
    made.tables.check()
    made.tables.repair()
    yield made
    made.close()


class Crash(Exception):
    pass


def crash_at(where: str) -> Callable[[str], None]:
    def crash(step: str) -> None:
        if step == where:
            raise Crash

    return crash


@pytest.mark.parametrize("where", ["committed", "synced", "forgotten"])
@pytest.mark.parametrize("first", [True, False], ids=["first-commit", "later-commit"])
def test_a_crash_between_two_steps_loses_and_doubles_nothing(bench: Bench, where: str, first: bool) -> None:
    if not first:
        bench.flush()
    bench.put()
    with pytest.raises(Crash):
        Tables(bench.place, bench.journal, between=crash_at(where)).flush()
    whole = list(range(bench.next))
    assert bench.stored() == whole, "a query between crash and recovery"
    bench.tables.repair()
    bench.flush()
    assert bench.stored() == list(range(bench.next)) and bench.journal.count() == 0
    bench.tables.flush()
    assert bench.opened().to_pyarrow_table().num_rows == bench.next


def test_several_commits_of_one_flush_follow_one_another(bench: Bench) -> None:
    for _ in range(5):
        bench.put()
    assert bench.tables.flush(limit=20) == 50
    assert bench.stored() == list(range(50)) and bench.journal.count() == 0
    assert len(bench.files()) == 3
    version = bench.opened().version()
    assert bench.journal.flushed("results") == version
    assert bench.tables.flush() == 0 and bench.opened().version() == version, "nothing to do is no commit"


def test_late_rows_land_in_the_day_of_their_event(bench: Bench) -> None:
    bench.flush(day=3)
    bench.flush(day=0)
    assert [file.day for file in sorted(bench.files(), key=lambda file: file.day)] == [
        "2026-09-18",
        "2026-09-21",
    ]


def test_upkeep_makes_few_files_of_many_and_removes_what_is_over(bench: Bench) -> None:
    for number in range(8):
        bench.flush(day=number % 2 * 5)
    bench.lose()
    upkeep = Upkeep(bench.tables, Retention({"results": 2}), Limits(files=2, checkpoint=3, vacuum_hours=0))
    upkeep.run(NOW)
    kept = [seq for seq in range(80) if seq // 10 % 2 == 0]
    assert sorted(bench.opened().to_pyarrow_table().column("seq").to_pylist()) == kept
    assert [file.day for file in bench.files()] == ["2026-09-21"]
    assert objects(bench, "results", ".checkpoint.parquet") == 1
    assert objects(bench, "results", "-c000.") == 1, "what nobody needs is gone"
    bench.flush()
    assert bench.stored() == [*kept, *range(81, 91)]
    version = bench.opened().version()
    upkeep.run(NOW)
    assert bench.opened().version() > version, "two small files are compacted again"


def objects(bench: Bench, table: str, part: str) -> int:
    """How many files there are whose names hold `part`, whatever Delta says of them."""
    if isinstance(bench.place, Bucket):
        listed = bench.place.settings.open().list(table).collect()
        return sum(part in item["path"] for item in listed)
    return sum(part in path.name for path in Path(bench.place.uri(table)).rglob("*"))


def test_gaps_have_no_days_and_are_compacted_as_a_whole(bench: Bench) -> None:
    for _ in range(4):
        bench.put()
        bench.lose()
        bench.tables.flush()
    assert len(bench.files("gaps")) == 4
    Upkeep(bench.tables, Retention(), Limits(files=3)).run(NOW)
    assert len(bench.files("gaps")) == 1
    bench.lose()
    bench.tables.flush()
    (lane,) = lanes(Queries(bench.tables, bench.journal))
    assert (lane.stored, lane.in_gaps, lane.missing, lane.twice) == (40, 5, 0, 0)


def test_questions_see_table_and_journal(bench: Bench) -> None:
    bench.flush()
    bench.put(5)
    (row,) = (
        Engine(bench.tables, bench.journal)
        .ask(TrendQuery(series=["output:y"], source="results", rollup="", quantiles=[]))
        .to_pylist()
    )
    assert row["count"] == 15


# what changes in the course of years


def test_outputs_that_a_new_model_version_adds_are_there_from_its_first_row(bench: Bench) -> None:
    bench.put(1, outputs={"score": 0.25})
    bench.tables.flush()
    bench.put(1, outputs={"score": 0.5, "wear": 7.0})
    bench.tables.flush()
    bench.put(1, outputs={"wear": 8.0, "age": 1.0})  # this one waits
    answer = Queries(bench.tables, bench.journal).sql(
        "select outputs['score'] score, outputs['wear'] wear from results order by seq"
    )
    assert answer.to_pylist() == [
        {"score": 0.25, "wear": None},
        {"score": 0.5, "wear": 7.0},
        {"score": None, "wear": 8.0},
    ]
    Upkeep(bench.tables, Retention(), Limits(files=2)).run(NOW)
    rows = sorted(bench.opened().to_pyarrow_table().to_pylist(), key=lambda row: row["seq"])
    assert [dict(row["outputs"]) for row in rows] == [{"score": 0.25}, {"score": 0.5, "wear": 7.0}]
    assert len(bench.files()) == 1


def test_a_table_of_an_older_store_gets_the_columns_that_came_since(bench: Bench) -> None:
    """Read as it is at first; with the next commit the column is there, and null before."""
    old = ["provider", "alarm"]
    rows = SCHEMAS["results"].empty_table()
    bench.put(10)
    (entry,) = bench.journal.waiting("result", 100)
    older = _results([entry]).drop_columns(old)
    write_deltalake(
        bench.tables.uri("results"), older, partition_by=["date"], storage_options=bench.tables.options
    )
    bench.journal.forget_rows("result", entry.id)
    queries = Queries(bench.tables, bench.journal)
    ask = "select seq, provider from results where seq in (9, 10) order by seq"
    assert queries.sql(ask).to_pylist() == [{"seq": 9, "provider": None}]
    bench.flush()
    assert set(bench.opened().schema().to_arrow().names) == set(rows.schema.names)
    assert queries.sql(ask).to_pylist() == [{"seq": 9, "provider": None}, {"seq": 10, "provider": "CPU"}]
    Upkeep(bench.tables, Retention(), Limits(files=2)).run(NOW)
    assert queries.sql(ask).to_pylist() == [{"seq": 9, "provider": None}, {"seq": 10, "provider": "CPU"}]


def test_a_column_of_a_newer_store_is_left_as_it_is(bench: Bench) -> None:
    """Taken back to an older version, a store writes to the tables of the newer one."""
    bench.flush()
    (entry,) = _one(bench)
    newer = _results([entry]).append_column("shift", pa.array(["night"] * entry.count))
    write_deltalake(
        bench.tables.uri("results"), newer, mode="append", schema_mode="merge", partition_by=["date"],
        storage_options=bench.tables.options,
    )  # fmt: skip
    bench.journal.forget_rows("result", entry.id)
    bench.flush()
    assert bench.stored() == list(range(30))
    shifts = bench.opened().to_pyarrow_table().column("shift").to_pylist()
    assert sorted(shifts, key=str) == [None] * 20 + ["night"] * 10


def _one(bench: Bench) -> list[Stored]:
    bench.put()
    return bench.journal.waiting("result", 100)


def _results(entries: list[Stored]) -> pa.Table:
    from trends.columns import to_arrow

    return to_arrow("result", entries)


# two writers


def test_two_stores_write_one_table_at_once_and_no_commit_is_lost(tmp_path: Path, place: Place) -> None:
    """Both with a journal of their own; the place decides who is first, and the other tries the next number."""
    benches = [Bench(folder(tmp_path, name), place) for name in ("one", "two")]
    failures: list[Exception] = []

    def work(bench: Bench) -> None:
        for _ in range(15):
            bench.put()
            try:
                bench.tables.flush()
            except Exception as error:  # looked at below
                failures.append(error)

    benches[0].flush()  # the table is there
    threads = [threading.Thread(target=work, args=(bench,)) for bench in benches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert benches[0].opened().version() >= 31
    assert sorted(benches[0].opened().to_pyarrow_table().column("seq").to_pylist()) == sorted(
        [*range(160), *range(150)]
    )
    for bench in benches:
        bench.close()


def folder(parent: Path, name: str) -> Path:
    made = parent / name
    made.mkdir()
    return made


class Overtaken(Journal):
    """Just before rows are read to be moved, `by` moves them: another ingester of the same journal has come to lead,
    while this one, cut off for a moment, does not know yet."""

    by: Callable[[], object] | None = None

    def waiting(self, lane: Lane, limit: int, after: int = 0) -> list[Stored]:
        found = super().waiting(lane, limit, after)
        if lane == "result" and self.by is not None and limit > 1 and after == 0:
            by, self.by = self.by, None
            by()
        return found


@pytest.mark.parametrize("first", [True, False], ids=["first-commit", "later-commit"])
@pytest.mark.parametrize("where", ["committed", "never"], ids=["not-forgotten-yet", "forgotten"])
def test_an_ingester_that_was_overtaken_doubles_nothing(
    tmp_path: Path, place: Place, first: bool, where: str
) -> None:
    bench = Bench(tmp_path, place, Overtaken)
    assert isinstance(bench.journal, Overtaken)
    if not first:
        bench.flush()
    bench.put()

    def lead() -> None:
        bench.put(5)
        try:
            Tables(place, bench.journal, between=crash_at(where)).flush()
        except Crash:
            bench.put(5)

    bench.journal.by = lead
    with pytest.raises((DeltaError, EdgewardError)):
        bench.tables.flush()
    bench.flush()
    assert bench.opened().to_pyarrow_table().num_rows == bench.next
    assert bench.stored() == list(range(bench.next)) and bench.journal.count() == 0
    bench.close()
