"""One journal for several ingesters, in a real PostgreSQL; and the same contract on a SQLite file."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgeward.errors import Unavailable, UsageError
from edgeward.identifiers import DeviceName
from edgeward.wire.rows import ResultRow, encode_rows
from trends.completeness import lanes
from trends.databases import Postgres
from trends.journal import MAX_QUARANTINED, Journal
from trends.query import Queries
from trends.sequence import SequenceId, Settled, decide
from trends.tables import Tables

NAME = DeviceName("north", "a")
NOW = 1_790_000_000_000_000


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journal]:
    if request.param == "sqlite":
        made = Journal(tmp_path / "journal.db")
    else:
        made = Journal(Postgres(plain(request.getfixturevalue("postgres_url"))))
    yield made
    made.close()


def plain(url: str) -> str:
    return url.replace("postgresql+psycopg", "postgresql")


def rows(first: int, count: int) -> bytes:
    return encode_rows(
        [
            ResultRow(NOW, "s", 1, "k", "e", seq, "d", "v", "C", {"y": 1.0}, False)
            for seq in range(first, first + count)
        ]
    )


def test_what_a_transaction_wrote_is_there_and_what_it_did_not_end_is_not(journal: Journal) -> None:
    with journal.transaction():
        assert journal.settled(NAME, "e", "result") is None
        journal.settle(NAME, "e", "result", Settled(5, [(7, 8)]))
        journal.append(NAME, "e", "result", NOW, 0, 5, rows(0, 5))
        journal.append_gap(NAME, "e", "result", NOW, (7, 8), "budget\0of a sender")
        journal.quarantine(NOW, "topic\0", None, "reason\0", b"\0raw")
        journal.remember_certificate("key", b"\0der")
        journal.remember_certificate("key", b"another")
    with pytest.raises(RuntimeError), journal.transaction():
        journal.settle(NAME, "e", "result", Settled(99))
        journal.append(NAME, "e", "result", NOW, 5, 1, rows(5, 1))
        raise RuntimeError
    with journal.transaction():
        assert journal.settled(NAME, "e", "result") == Settled(5, [(7, 8)])
    (stored,) = journal.waiting("result", 100)
    assert (stored.first_seq, stored.count, stored.site, stored.rows) == (0, 5, "north", rows(0, 5))
    (gap,) = journal.waiting_gaps(10)
    assert (gap.first_seq, gap.last_seq, gap.count, gap.reason) == (7, 8, 2, "budget\ufffdof a sender")
    sequence = SequenceId(NAME, "e", "result")
    assert journal.positions() == {sequence: Settled(5, [(7, 8)])}
    for span, found in (((4, 9), 1), ((0, 0), 1), ((5, 9), 0)):
        assert len(journal.find(sequence, span)) == found
        assert journal.find(sequence._replace(epoch="f"), span) == []
    for span, found in (((8, 9), 1), ((0, 7), 1), ((9, 9), 0), ((0, 6), 0)):
        assert len(journal.find_gaps(sequence, span)) == found
    assert journal.quarantined() == [("topic\ufffd", None, "reason\ufffd")]
    assert journal.certificate("key") == b"\0der" and journal.certificate("other") is None
    assert journal.count() == 5 and journal.leads()
    journal.forget_rows("result", stored.id)
    journal.forget_gaps(gap.id)
    journal.set_flushed("results", 3)
    journal.set_flushed("results", 4)
    assert (journal.count(), journal.waiting_gaps(10), journal.flushed("results")) == (0, [], 4)
    assert journal.flushed("alarms") == -1


def test_a_flood_of_refused_rows_does_not_fill_the_disk(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_QUARANTINED >= 1000
    monkeypatch.setattr("trends.journal.MAX_QUARANTINED", 10)
    with journal.transaction():
        for number in range(25):
            journal.quarantine(NOW, "t", number, "bad", b"")
    assert [seq for _, seq, _ in journal.quarantined()] == list(range(15, 25))


def test_rows_move_to_the_tables_and_are_counted_once(journal: Journal, tmp_path: Path) -> None:
    tables = Tables(tmp_path / "tables", journal)
    for first in range(0, 40, 10):
        with journal.transaction():
            journal.append(NAME, "e", "result", NOW, first, 10, rows(first, 10))
        if first == 20:
            assert tables.flush() == 30
    (lane,) = lanes(Queries(tables, journal))
    assert (lane.stored, lane.missing, lane.twice) == (40, 0, 0)


def test_everything_is_everything(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trends.journal.MAX_ENTRIES", 4)
    for first in range(10):
        with journal.transaction():
            journal.append(NAME, "e", "result", NOW, first, 1, rows(first, 1))
    assert len(journal.waiting("result", 100)) == 4
    assert [entry.first_seq for entry in journal.everything("result")] == list(range(10))
    assert journal.everything("alarm") == []


@pytest.mark.postgres
def test_ingesters_that_share_a_journal_store_every_number_once(postgres_url: str, tmp_path: Path) -> None:
    """Each batch is offered three times, in an order of its own, to ingesters that run at once."""
    journals = [Journal(Postgres(plain(postgres_url))) for _ in range(3)]
    assert len({journal.identity for journal in journals}) == 1
    batches = [(device, first) for device in ("a", "b") for first in range(0, 300, 10)]
    tables = Tables(tmp_path / "tables", journals[0])
    done = threading.Event()

    def ingest(number: int) -> None:
        journal, mine = journals[number], list(batches)
        random.Random(number).shuffle(mine)
        for device, first in mine:
            name = DeviceName("north", device)
            with journal.transaction():
                decision = decide(journal.settled(name, "e", "result"), first, 10, 0)
                for low, high in decision.take:
                    journal.append(name, "e", "result", NOW, low, high - low + 1, rows(low, high - low + 1))
                journal.settle(name, "e", "result", decision.after)

    def flush() -> None:
        while not done.is_set():
            tables.flush(limit=50)

    with ThreadPoolExecutor(4) as pool:
        flushing = pool.submit(flush)
        for each in [pool.submit(ingest, number) for number in range(3)]:
            each.result()
        done.set()
        flushing.result()
    tables.flush()
    found = lanes(Queries(tables, journals[0]))
    assert [(lane.device, lane.stored, lane.missing, lane.twice) for lane in found] == [
        ("a", 300, 0, 0),
        ("b", 300, 0, 0),
    ]
    assert journals[0].count() == 0
    for journal in journals:
        journal.close()


@pytest.mark.postgres
def test_one_of_them_moves_rows_to_the_tables_and_another_when_it_is_gone(postgres_url: str) -> None:
    first, second = (Journal(Postgres(plain(postgres_url))) for _ in range(2))
    assert first.leads() and not second.leads() and first.leads()
    first.close()
    assert second.leads()
    second.close()


@pytest.mark.postgres
def test_a_journal_goes_on_after_its_server_has_cut_the_connection(postgres_url: str) -> None:
    import psycopg

    database = Postgres(plain(postgres_url))
    journal = Journal(database)
    with psycopg.connect(plain(postgres_url), autocommit=True) as other:
        other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    with pytest.raises(psycopg.OperationalError), journal.transaction():
        journal.append(NAME, "e", "result", NOW, 0, 1, rows(0, 1))
    with journal.transaction():
        journal.append(NAME, "e", "result", NOW, 0, 1, rows(0, 1))
    assert journal.count() == 1
    journal.close()


def test_a_server_that_does_not_answer_is_named_without_the_password() -> None:
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 ") as found:
        Postgres("postgresql://user:secret@127.0.0.1:1/db")
    assert "secret" not in str(found.value) and found.value.hint
    with pytest.raises(UsageError) as wrong:
        Postgres("mysql://user:secret@host/db")
    assert "secret" not in str(wrong.value)
