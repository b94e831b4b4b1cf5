"""Either end is killed at any step: acknowledged rows are there, and none is there twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.contracts.test_brokers import Mosquitto, needs_mosquitto
from tests.faults.pipeline.conftest import Closing
from tests.faults.pipeline.ends import Agent, Keyring, Load, Store, compare, wait_for
from tests.faults.pipeline.forked import Forks
from tests.trends.test_shared_journal import plain
from trends.databases import Postgres
from trends.journal import Journal
from trends.tables import Tables

pytestmark = needs_mosquitto

#: What an ingester goes through, in order: from a message to its rows' files.
STEPS = (
    "received", "decided", "journalled", "acknowledged", "released", "committed", "settled", "synced", "forgotten",
)  # fmt: skip
ROUNDS = 3


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.close()


def arguments(folder: Path, ring: Path, broker: Mosquitto, **more: object) -> dict[str, object]:
    rest = {"name": "plant", "step": "", "times": 0, "journal": "", "share": ""}
    return {"folder": str(folder), "ring": str(ring), "url": broker.url, **rest, **more}


@pytest.mark.usefixtures("quick_links")
def test_an_ingester_that_is_killed_at_any_step(
    forks: Forks, mosquitto: Mosquitto, tmp_path: Path, ring: Keyring, closing: Closing
) -> None:
    ring.write(tmp_path / "ring")
    agent = Agent(tmp_path / "agent", ring, mosquitto.url)
    closing(agent)
    folder = tmp_path / "store"
    with Load(agent, ahead=2000) as load:
        for times in range(1, ROUNDS + 1):
            for step in STEPS:
                more = {"step": step, "times": times}
                pid = forks.start("store", arguments(folder, tmp_path / "ring", mosquitto, **more))
                wait_for(lambda pid=pid: not forks.alive(pid), lambda step=step: f"the end at {step}")
    pid = forks.start("store", arguments(folder, tmp_path / "ring", mosquitto))
    wait_for(agent.drained, agent.outbox.sequences)
    forks.kill(pid)
    journal = Journal(folder / "journal.db")
    tables = Tables(folder / "tables", journal)
    found = compare(journal, tables, load.produced)
    assert found.exactly_once and not found.in_gaps, found
    tables.flush()
    assert compare(journal, tables, load.produced).exactly_once and journal.count() == 0
    journal.close()


@pytest.mark.postgres
@pytest.mark.usefixtures("quick_links")
def test_two_ingesters_share_a_journal_and_one_is_killed(
    forks: Forks, mosquitto: Mosquitto, tmp_path: Path, ring: Keyring, closing: Closing, postgres_url: str
) -> None:
    ring.write(tmp_path / "ring")
    agent = Agent(tmp_path / "agent", ring, mosquitto.url)
    closing(agent)
    shared = {"journal": plain(postgres_url), "share": "edgeward-test"}
    folder = tmp_path / "store"
    with Load(agent, ahead=2000) as load:
        pids = [
            forks.start("store", arguments(folder, tmp_path / "ring", mosquitto, name=name, **shared))
            for name in ("a", "b")
        ]
        for index in (0, 1, 0, 1):
            reached = agent.acknowledged + 2000
            wait_for(lambda reached=reached: agent.acknowledged > reached, agent.outbox.sequences)
            forks.kill(pids[index])
            reached = agent.acknowledged + 2000
            wait_for(lambda reached=reached: agent.acknowledged > reached, agent.outbox.sequences)
            name = "ab"[index]
            pids[index] = forks.start(
                "store", arguments(folder, tmp_path / "ring", mosquitto, name=name, **shared)
            )
    wait_for(agent.drained, agent.outbox.sequences)
    for pid in pids:
        forks.kill(pid)
    journal = Journal(Postgres(plain(postgres_url)))
    tables = Tables(folder / "tables", journal)
    wait_for(journal.leads, lambda: "the lead that a killed ingester had")
    tables.repair()
    tables.flush()
    found = compare(journal, tables, load.produced)
    assert found.exactly_once and not found.in_gaps, found
    journal.close()


@pytest.mark.usefixtures("quick_links")
def test_an_agent_that_is_killed_under_load(
    forks: Forks, mosquitto: Mosquitto, tmp_path: Path, ring: Keyring, closing: Closing
) -> None:
    """Its sensor repeats from the last sample that was acknowledged to it: none is lost, none comes twice."""
    total, kills = 40_000, 20
    ring.write(tmp_path / "ring")
    store = Store(tmp_path / "store", ring, mosquitto.url)
    closing(store)
    store.start()
    told = tmp_path / "told"
    told.touch()
    work = {
        "folder": str(tmp_path / "agent"),
        "ring": str(tmp_path / "ring"),
        "url": mosquitto.url,
        "total": total,
    }

    def reached() -> int:
        lines = told.read_bytes().rpartition(b"\n")[0].rsplit(b"\n", 1)
        return int(lines[-1] or 0)

    for kill in range(1, kills + 1):
        pid = forks.start("agent", work, told)
        # A share of all, and an instant of its own within what the agent does then.
        wait_for(lambda kill=kill: reached() >= kill * total // (kills + 1), reached)
        threading.Event().wait(0.001 * (kill % 7))
        forks.kill(pid)
    pid = forks.start("agent", work, told)
    wait_for(lambda: store.ingest.counts["rows"] >= total + total // 50, lambda: store.ingest.counts)
    numbers = [int(line) for line in told.read_text().split()]
    assert all(later > earlier for earlier, later in pairwise(numbers)), "no sample was repeated"
    forks.kill(pid)
    found = compare(store.journal, store.tables, total)
    assert found.exactly_once and not found.in_gaps, found
