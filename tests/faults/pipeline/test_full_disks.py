"""No room at the journal, or where the tables lie: nothing is lost, and it goes on by itself.

The agent's own full disk is tests/faults/test_outbox_full_disk.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contracts.test_brokers import Mosquitto, needs_mosquitto
from tests.faults.conftest import mounted
from tests.faults.pipeline.conftest import Closing
from tests.faults.pipeline.ends import Agent, Keyring, Load, Store, compare, wait_for

pytestmark = needs_mosquitto


def fill(folder: Path) -> None:
    """Until nothing more fits."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1 << 9, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Room for all that a stream makes while the test waits: 12,500 rows a second, some 20 bytes each."""
    with mounted(tmp_path / "disk", "64m") as folder:
        yield folder


@pytest.mark.usefixtures("quick_links")
def test_a_full_journal_acknowledges_nothing_and_goes_on_when_there_is_room(
    disk: Path, mosquitto: Mosquitto, tmp_path: Path, ring: Keyring, closing: Closing
) -> None:
    store = Store(disk / "store", ring, mosquitto.url, tables=tmp_path / "tables")
    agent = Agent(tmp_path / "agent", ring, mosquitto.url)
    closing(store, agent)
    store.start()
    with Load(agent) as load:
        wait_for(lambda: agent.acknowledged > 1000, agent.outbox.sequences)
        fill(disk)
        wait_for(lambda: store.ingester.failure is not None, agent.outbox.sequences)
        told = agent.acknowledged
        wait_for(lambda: load.produced > told + 2000, agent.outbox.sequences)
        (disk / "filler").unlink()
        wait_for(lambda: agent.acknowledged > told + 1000, agent.outbox.sequences)
    wait_for(agent.drained, agent.outbox.sequences)
    found = compare(store.journal, store.tables, load.produced)
    assert found.exactly_once and not found.in_gaps, found
    assert store.ingester.failure is None


@pytest.mark.usefixtures("quick_links")
def test_rows_wait_in_the_journal_while_there_is_no_room_for_the_tables(
    disk: Path, mosquitto: Mosquitto, tmp_path: Path, ring: Keyring, closing: Closing
) -> None:
    store = Store(tmp_path / "store", ring, mosquitto.url, tables=disk / "tables")
    agent = Agent(tmp_path / "agent", ring, mosquitto.url)
    closing(store, agent)
    fill(disk)
    store.start()
    with Load(agent) as load:
        wait_for(lambda: len(store.refused) >= 3, agent.outbox.sequences)
        told = agent.acknowledged
        wait_for(lambda: agent.acknowledged > told + 1000, agent.outbox.sequences)
        (disk / "filler").unlink()
        wait_for(lambda: store.tables.snapshot("results")[0] is not None, lambda: store.refused[-1])
    wait_for(agent.drained, agent.outbox.sequences)
    wait_for(lambda: store.journal.count() == 0, lambda: store.refused[-1])
    found = compare(store.journal, store.tables, load.produced)
    assert found.exactly_once and not found.in_gaps, found
