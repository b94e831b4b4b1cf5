"""Into a real PostgreSQL: each row once, whatever is killed and restarted."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from edgeward.clock import ManualClock
from edgeward.errors import Conflict, EdgewardError, Unavailable, UsageError
from tests.servers.postgres import PostgresServer
from tests.trends.bridges.filled import Filled
from trends.bridges.bridge import KEYS, Bridge
from trends.bridges.cursor import Cursor
from trends.bridges.feed import Position
from trends.bridges.postgres import PostgresTarget, column_type, primary_key
from trends.schemas import SCHEMAS

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.postgres


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Filled]:
    made = Filled(tmp_path)
    yield made
    made.close()


@pytest.fixture
def url(postgres_url: str) -> str:
    return postgres_url.replace("postgresql+psycopg", "postgresql")


def everything(filled: Filled) -> None:
    filled.commit(30)
    filled.commit(25, day=1)
    filled.commit(7, lane="alarm")
    filled.commit(5, lane="trend")
    filled.commit(6, lane="sample")
    filled.lose(55, 59)


def bridge(filled: Filled, target: PostgresTarget, name: str = "postgres") -> Bridge:
    cursor = Cursor(filled.folder, name)
    with cursor.alone():
        pass
    feeds = [filled.feed(table) for table in KEYS]
    return Bridge(feeds, target, cursor, ManualClock(), threading.Event(), rows=20)


def ask(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchall()  # type: ignore[arg-type]  # written here


def counts(url: str) -> dict[str, int]:
    return {table: ask(url, f"SELECT count(*) FROM edgeward.{table}")[0][0] for table in KEYS}


def _floats(value: Any) -> Any:
    return {key: float(item) for key, item in value.items()} if isinstance(value, dict) else value


WHOLE = {"results": 55, "alarms": 7, "trends": 5, "samples": 6, "gaps": 1}


def test_every_value_arrives(filled: Filled, url: str) -> None:
    everything(filled)
    with psycopg.connect(url, autocommit=True) as connection:
        name = url.rsplit("/", 1)[1]
        connection.execute(f"ALTER DATABASE {name} SET timezone = 'Asia/Tokyo'")  # type: ignore[arg-type]
    target = PostgresTarget(url, "pg")
    bridge(filled, target).run(once=True)
    assert counts(url) == WHOLE
    for table in KEYS:
        names = SCHEMAS[table].names
        number = names.index("first_seq" if table == "gaps" else "seq")
        quoted = ", ".join(f'"{name}"' for name in names)
        there = [
            tuple(_floats(value) for value in row)
            for row in ask(url, f"SELECT {quoted} FROM edgeward.{table}")
        ]
        stored = [
            tuple(
                {key.replace("\0", "\ufffd"): item for key, item in value}
                if isinstance(value, list) and value and isinstance(value[0], tuple)
                else value
                for value in row.values()
            )
            for batch in filled.feed(table).batches(Position(), 1000)
            for row in batch.rows.to_pylist()
        ]
        assert sorted(there, key=lambda row: row[number]) == sorted(stored, key=lambda row: row[number])
    target.close()


def test_a_bridge_killed_at_any_step_leaves_each_row_once(filled: Filled, url: str) -> None:
    everything(filled)
    deaths = 0
    for step in range(1, 200):
        command = [
            sys.executable,
            "-m",
            "tests.trends.bridges.bridge_child",
            str(filled.folder),
            "postgres",
            url,
        ]
        # Each is killed at its 2nd step: alternately in a transaction and between it and the cursor.
        ended = subprocess.run([*command, str(1 + step % 3)], cwd=ROOT, capture_output=True, text=True)
        if ended.returncode == 0:
            break
        assert ended.returncode == -9, ended.stderr
        deaths += 1
    assert deaths >= 5 and counts(url) == WHOLE


def test_a_batch_and_its_position_are_one(filled: Filled, url: str) -> None:
    """What is rolled back takes the position with it, and the other way round."""
    everything(filled)

    def fail(step: str) -> None:
        raise Unavailable("cut")

    cut = PostgresTarget(url, "pg", between=fail)
    with pytest.raises(Unavailable):
        bridge(filled, cut).catch_up()
    assert ask(url, "SELECT to_regclass('edgeward.results')")[0][0] is None
    assert ask(url, "SELECT count(*) FROM edgeward.bridge_positions")[0][0] == 0
    target = PostgresTarget(url, "pg")
    first = bridge(filled, target)
    first.catch_up()
    # The file of the bridge is lost: the database knows.
    (filled.folder / "bridges" / "postgres.json").unlink(missing_ok=True)
    again = bridge(filled, target)
    again.catch_up()
    assert again._handed_on() == 0
    cut.close()
    target.close()


def test_keys_keep_a_row_from_being_stored_twice(filled: Filled, url: str) -> None:
    """Another bridge, and rows that come again within one batch."""
    everything(filled)
    for name in ("one", "two"):
        target = PostgresTarget(url, name)
        bridge(filled, target, name).run(once=True)
        target.close()
    assert counts(url) == WHOLE
    (batch,) = filled.feed("results").batches(Position(), 1000)
    twice = pa.concat_tables([batch.rows, batch.rows])
    target = PostgresTarget(url, "three")
    target.deliver("results", twice, Position(), batch.after)
    assert counts(url) == WHOLE
    target.close()


def test_two_bridges_of_one_name_do_not_pass_each_other(filled: Filled, url: str) -> None:
    everything(filled)
    one, two = PostgresTarget(url, "pg"), PostgresTarget(url, "pg")
    (batch,) = filled.feed("alarms").batches(Position(), 1000)
    assert two.resume("alarms", Position()) == Position()
    one.deliver("alarms", batch.rows, Position(), batch.after)
    with pytest.raises(Conflict, match="another bridge named pg"):
        two.deliver("alarms", batch.rows, Position(), batch.after)
    one.close()
    two.close()


def test_a_new_column_is_added(filled: Filled, url: str) -> None:
    filled.commit(2)
    target = PostgresTarget(url, "pg")
    running = bridge(filled, target)
    running.catch_up()
    (batch,) = filled.feed().batches(Position(), 10)
    wider = batch.rows.set_column(4, "seq", pa.array([100, 101])).append_column(
        'odd "name', pa.array([1.5, None])
    )
    write_deltalake(filled.tables.uri("results"), wider, mode="append", schema_mode="merge")
    filled.tables.settle("results")
    running.catch_up()
    answer = ask(url, 'SELECT seq, "odd ""name" FROM edgeward.results ORDER BY seq')
    assert answer == [(0, None), (1, None), (100, 1.5), (101, None)]
    target.close()


def test_a_table_of_somebody_else_is_not_written(filled: Filled, url: str) -> None:
    filled.commit(2)
    with psycopg.connect(url) as connection:
        connection.execute("CREATE SCHEMA edgeward")
        connection.execute("CREATE TABLE edgeward.results (seq text, customer int)")
    target = PostgresTarget(url, "pg")
    with pytest.raises(UsageError, match="other types"):
        bridge(filled, target).catch_up()
    assert ask(url, "SELECT count(*) FROM edgeward.results")[0][0] == 0
    target.close()


def test_the_server_crashes_and_comes_back(filled: Filled) -> None:
    server = PostgresServer(fsync=True)
    try:
        url = server.url.replace("postgresql+psycopg", "postgresql")
        everything(filled)
        crashed: list[str] = []

        def crash(step: str) -> None:
            if len(crashed) < 2:
                crashed.append(step)
                server.crash()
                server.start()

        target = PostgresTarget(url, "pg", between=crash)
        running = bridge(filled, target)
        for _ in range(2):
            with pytest.raises(Unavailable, match="127"):
                running.catch_up()
        server.crash()
        with pytest.raises(Unavailable) as failure:
            running.catch_up()
        assert "PGPASSFILE" in failure.value.hint
        server.start()
        running.catch_up()
        assert counts(url) == WHOLE
        server.crash()
        server.start()
        assert counts(url) == WHOLE, "what was said to be there outlasts a crash"
        target.close()
    finally:
        server.remove()


def test_an_address_with_a_password_is_not_shown() -> None:
    target = PostgresTarget("postgresql://me:hush@db.site:5433/plant", "pg")
    assert target.where == "db.site:5433/plant, schema edgeward"
    for url in ("mysql://x/y", "postgresql:///x", "x"):
        with pytest.raises(UsageError):
            PostgresTarget(url, "pg")


def test_a_user_without_rights_is_told_what_lacks(filled: Filled, url: str) -> None:
    filled.commit(1)
    with psycopg.connect(url) as connection:
        connection.execute("DROP ROLE IF EXISTS reader")
        connection.execute("CREATE ROLE reader LOGIN")
    target = PostgresTarget(url.replace("edgeward@", "reader@"), "pg")
    with pytest.raises(EdgewardError, match="permission denied") as failure:
        bridge(filled, target).catch_up()
    assert "CREATE" in failure.value.hint and not isinstance(failure.value, Unavailable)
    target.close()


def test_every_column_has_a_type_and_hypertables_hold_their_time_in_the_key() -> None:
    for table, schema in SCHEMAS.items():
        assert "text" not in {
            column_type(field.type) for field in schema if not pa.types.is_string(field.type)
        }
        for timescale in (False, True):
            assert set(primary_key(table, timescale=timescale)) <= set(schema.names)
    assert primary_key("trends", timescale=True)[-1] == "bucket"
    assert primary_key("gaps", timescale=True) == primary_key("gaps", timescale=False)
