"""No room at the journal, or where the tables lie: nothing is lost, and it goes on by itself.

The agent's own full disk is tests/faults/test_outbox_full_disk.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contracts.test_brokers import Mosquitto, needs_mosquitto
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


@pytest.mark.usefixtures("quick_links")
def test_a_full_journal_acknowledges_nothing_and_goes_on_when_there_is_room(
    small_disk: Path, mosquitto: Mosquitto, tmp_path: Path, ring: Keyring, closing: Closing
) -> None:
    store = Store(small_disk / "store", ring, mosquitto.url, tables=tmp_path / "tables")
    agent = Agent(tmp_path / "agent", ring, mosquitto.url)
    closing(store, agent)
    store.start()
    with Load(agent) as load:
        wait_for(lambda: agent.acknowledged > 1000, agent.outbox.sequences)
        fill(small_disk)
        wait_for(lambda: store.ingester.failure is not None, agent.outbox.sequences)
        told = agent.acknowledged
        wait_for(lambda: load.produced > told + 2000, agent.outbox.sequences)
        (small_disk / "filler").unlink()
        wait_for(lambda: agent.acknowledged > told + 1000, agent.outbox.sequences)
    wait_for(agent.drained, agent.outbox.sequences)
    found = compare(store.journal, store.tables, load.produced)
    assert found.exactly_once and not found.in_gaps, found
    assert store.ingester.failure is None


@pytest.mark.usefixtures("quick_links")
@pytest.mark.xfail(strict=False, reason="a table was once not written again in time; not understood")
def test_rows_wait_in_the_journal_while_there_is_no_room_for_the_tables(
    small_disk: Path, mosquitto: Mosquitto, tmp_path: Path, ring: Keyring, closing: Closing
) -> None:
    store = Store(tmp_path / "store", ring, mosquitto.url, tables=small_disk / "tables")
    agent = Agent(tmp_path / "agent", ring, mosquitto.url)
    closing(store, agent)
    fill(small_disk)
    store.start()
    with Load(agent) as load:
        wait_for(lambda: len(store.refused) >= 3, agent.outbox.sequences)
        told = agent.acknowledged
        wait_for(lambda: agent.acknowledged > told + 1000, agent.outbox.sequences)
        (small_disk / "filler").unlink()
        wait_for(lambda: store.tables.snapshot("results")[0] is not None, lambda: store.refused[-1])
    wait_for(agent.drained, agent.outbox.sequences)
    wait_for(lambda: store.journal.count() == 0, lambda: store.refused[-1])
    found = compare(store.journal, store.tables, load.produced)
    assert found.exactly_once and not found.in_gaps, found
