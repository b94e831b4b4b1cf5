"""One contract for both databases; PostgreSQL is real and runs for these tests only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import pytest
import sqlalchemy
from sqlmodel import SQLModel

from controller.store import records, resources
from controller.store.database import _MIGRATIONS, Store
from controller.store.tables import ApiTokenRow, EnrollmentTokenRow
from edgeward.broker import free_port
from edgeward.errors import Conflict, NotFound, Unavailable, UsageError
from edgeward.wire.reports import OutboxReport, Report, Status


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    found: str = request.getfixturevalue("postgres_url")
    return found


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    made = Store(url)
    yield made
    made.close()


def insert(store: Store, name: str = "a", **labels: str) -> None:
    with store.writing() as session:
        resources.insert(session, "Fleet", name, {"x": 1}, 5.0, labels=labels)


def change(store: Store, spec: dict[str, Any], expected: str = "") -> bool:
    with store.writing() as session:
        row = resources.need(session, "Fleet", "a", lock=True)
        return resources.change(
            session, row, expected_version=expected, spec=spec, labels=row.labels, annotations={}
        )


def read(store: Store, name: str = "a") -> dict[str, Any]:
    with store.reading() as session:
        return resources.document(resources.need(session, "Fleet", name))


def test_the_migrations_make_the_declared_tables_and_run_once(store: Store, url: str) -> None:
    found = sqlalchemy.inspect(store.engine)
    for table in SQLModel.metadata.sorted_tables:
        made = {column["name"]: column["nullable"] for column in found.get_columns(table.name)}
        assert made == {column.name: column.nullable for column in table.columns}, table.name
    insert(store)
    again = Store(url)
    assert read(again)["spec"] == {"x": 1}
    again.close()


def test_a_database_of_the_first_version_is_taken_over(store: Store, url: str) -> None:
    """Back to it, a token made as that version did, and forward again."""
    config = alembic.config.Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    with store.engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.downgrade(config, "0001")
        connection.execute(
            sqlalchemy.text(
                "INSERT INTO enrollment_token (digest, role, sites, labels, created_by, expires_at, used_by)"
                " VALUES ('d', 'device', '[\"north\"]', '{}', 'admin', 9e9, '')"
            )
        )
    again = Store(url)
    with again.reading() as session:
        row = records.enrollment_token(session, "d")
        assert row is not None and row.sites == ["north"] and row.approval is False
    again.close()


def test_generation_counts_specs_and_resource_version_every_change(store: Store) -> None:
    insert(store, site="north")
    assert change(store, {"x": 2}) and not change(store, {"x": 2})
    with store.writing() as session:
        row = resources.need(session, "Fleet", "a")
        assert resources.set_status(session, row, {"ok": True})
    found = read(store)
    assert (found["metadata"]["generation"], found["metadata"]["resourceVersion"]) == (2, "3")
    assert (found["spec"], found["status"]) == ({"x": 2}, {"ok": True})
    with store.reading() as session:
        assert [row.name for row in resources.find(session, "Fleet", {"site": "north"})] == ["a"]
        assert resources.find(session, "Fleet", {"site": "south"}) == []


def test_a_stale_resource_version_conflicts(store: Store) -> None:
    insert(store)
    assert change(store, {"x": 2}, expected="1")
    with pytest.raises(Conflict, match="stale"):
        change(store, {"x": 3}, expected="1")
    assert read(store)["spec"] == {"x": 2}


def test_a_failed_transaction_changes_nothing_and_a_name_is_unique(store: Store) -> None:
    insert(store)
    with pytest.raises(Conflict), store.writing() as session:
        resources.insert(session, "Fleet", "b", {}, 1.0)
        resources.insert(session, "Fleet", "a", {}, 1.0)
    with pytest.raises(NotFound):
        read(store, "b")


def test_of_many_who_take_a_token_at_once_one_gets_it(store: Store) -> None:
    with store.writing() as session:
        session.add(
            EnrollmentTokenRow(
                digest="d", role="device", sites=["s"], labels={}, created_by="x", expires_at=9.0
            )
        )
    won: list[int] = []
    barrier = threading.Barrier(6)

    def take(index: int) -> None:
        barrier.wait()
        with store.writing() as session:
            if records.consume_token(session, "d", f"n{index}", 5.0):
                won.append(index)

    threads = [threading.Thread(target=take, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_counters_of_concurrent_writers_add_up(store: Store) -> None:
    insert(store)

    def add() -> None:
        for _ in range(10):
            with store.writing() as session:
                row = resources.need(session, "Fleet", "a", lock=True)
                resources.set_status(session, row, {"count": row.status.get("count", 0) + 1})

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(store)["status"] == {"count": 40}


def test_positions_only_grow_and_hold_large_numbers(store: Store) -> None:
    def advance(boot: int, n: int, state: Any = "online") -> bool:
        with store.writing() as session:
            return records.advance(session, "d", "status", Status(boot, n, 0.0, state))

    assert advance(1, 5) and not advance(1, 5) and not advance(1, 4) and advance(1, 6)
    assert advance(1, 1, "offline") and not advance(1, 1, "offline")
    assert advance(2, 0) and not advance(1, 2**60)
    assert advance(2**61, 2**61)


def test_reports_are_bounded_per_device(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "REPORTS_KEPT", 3)
    assert Report(1, 1, 0.0, 1.0, [], OutboxReport(0, 0, 0, 0))
    for device in ("a", "b"):
        for n in range(5):
            with store.writing() as session:
                records.add_report(session, device, float(n), {"n": n})
    with store.reading() as session:
        assert [body["n"] for body in records.reports(session, "a", 10)] == [2, 3, 4]
        assert [body["n"] for body in records.reports(session, "b", 2)] == [3, 4]


def test_forgetting_a_device_and_revoking(store: Store) -> None:
    with store.writing() as session:
        records.add_report(session, "a", 1.0, {})
        session.add(ApiTokenRow(digest="d", name="n", role="viewer", created_at=1.0))
    with store.writing() as session:
        records.forget_device(session, "a")
        assert records.drop_api_token(session, "n") and not records.drop_api_token(session, "n")
        assert records.reports(session, "a", 5) == []
        assert records.revoke_certificates(session, "nobody") == 0
        records.audit(session, 1.0, "me", "do", "Thing", "x")
    with store.reading() as session:
        assert records.audit_records(session, 5)[0]["who"] == "me"


def test_one_controller_leads_at_a_time(url: str) -> None:
    first, second = Store(url), Store(url)
    with first.writing() as one:
        assert first.leads(one)
        if url.startswith("postgres"):
            with second.writing() as two:
                assert not second.leads(two)
    with second.writing() as two:
        assert second.leads(two)
    first.close()
    second.close()


@pytest.mark.postgres
def test_the_whole_controller_runs_on_postgresql(
    postgres_url: str, tmp_path: Path, start: Any, until: Any, rollout: Any
) -> None:
    with start(tmp_path, database=postgres_url) as plant:
        plant.begin()
        device, v1 = plant.enroll("d1"), plant.publish(1)
        plant.client.apply([rollout("r1", 1)])
        until(lambda: plant.client.get("Rollout", "r1")["status"]["phase"] == "Progressing")
        device.http.send(*device.runs(v1))
        until(lambda: plant.client.get("Rollout", "r1")["status"]["phase"] == "Complete")
    assert "postgres" in postgres_url


def test_bad_and_dead_addresses_say_so_without_the_password() -> None:
    with pytest.raises(UsageError, match="--database"):
        Store("nonsense")
    with pytest.raises(Unavailable) as error:
        Store(f"postgresql+psycopg://u:geheim@127.0.0.1:{free_port()}/x")
    assert "geheim" not in str(error.value)
