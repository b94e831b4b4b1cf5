"""Power cuts at every call of an outbox and of a trend store: what somebody was told stays true."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.outbox.outbox import Outbox
from edgeward.clock import ManualClock
from edgeward.wire.rows import ResultRow
from tests.agent.outboxes import row, rows_of
from tests.faults.disk.harness import Check, compiled, cut_everywhere, record
from tests.faults.disk.replay import Record
from tests.faults.pipeline.lives import POLICIES, take
from trends.completeness import lanes
from trends.journal import Journal
from trends.query import Queries
from trends.tables import Tables


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Record]]:
    """What a life asked of the disk; each is recorded once."""
    base = tmp_path_factory.mktemp("lives")
    recorder = compiled(base)

    @cache
    def live(life: str) -> list[Record]:
        folder = base / life
        command = [sys.executable, "-m", "tests.faults.pipeline.lives", life, str(folder)]
        return record(recorder, folder, command, base / f"{life}.log")

    return live


@pytest.fixture
def scratch() -> Iterator[Path]:
    # In memory where there is some: what is opened thousands of times is fsynced as often.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder) / "left"


def facts_of(marks: list[bytes]) -> dict[str, Any]:
    facts: dict[str, Any] = {"sent": {}}
    for text in marks:
        fact = msgspec.json.decode(text)
        facts["sent"] |= fact.pop("sent", {})
        facts |= fact
    return facts


def check_outbox(number: int, marks: list[bytes], folder: Path) -> None:
    """Opens what is left as an agent's start does."""
    facts = facts_of(marks)
    outbox = Outbox(folder / "outbox.db", ManualClock(), policies=POLICIES)
    try:
        outbox.wait_salvaged()
        kept, acknowledged = facts.get("kept", 0), facts.get("acknowledged", -1)
        source = outbox.source("sensor/a")
        reached = source[1] + 1 if source else 0
        assert reached >= kept, f"the sensor was told {kept}, the position is {reached}"
        there = [
            msgspec.msgpack.decode(data, type=ResultRow).source_seq for data in rows_of(outbox, "result")
        ]
        missing = set(range(acknowledged + 1, reached)) - set(there)
        # An ack that was being noted when the power went may have ended its rows: the store has them.
        assert all(seq <= outbox.lane("result").acked for seq in missing), f"lost {missing}"
        assert len(there) == len(set(there)) and all(seq < reached for seq in there)
        for lane, last in facts["sent"].items():
            if outbox.epoch == facts["epoch"]:
                before = outbox.lane(lane).next_seq
                assert before > last, f"number {before} of {lane} was given to another row and sent"
        outbox.commit_rows([row(1000)])
    finally:
        outbox.close()


def check_store(number: int, marks: list[bytes], folder: Path) -> None:
    """Opens what is left as a store's start does; what it was sent last comes again."""
    stored = facts_of(marks).get("stored", 0)
    journal = Journal(folder / "journal.db")
    tables = Tables(folder / "tables", journal)
    try:
        tables.repair()
        tables.flush()
        found = lanes(Queries(tables, journal))
        reached = found[0].last + 1 if found else 0
        assert reached >= stored, f"{stored} rows were acknowledged, {reached} are there"
        take(journal, max(0, reached - 5), 10)
        (lane,) = lanes(Queries(tables, journal))
        assert (lane.first, lane.missing, lane.twice) == (0, 0, 0), lane
    finally:
        journal.close()


@pytest.mark.parametrize(
    ("life", "check", "variants", "states"),
    [
        ("outbox", check_outbox, 3, 300),
        ("store", check_store, 1, 80),
        pytest.param("store", check_store, 8, 400, marks=pytest.mark.long),
    ],
)
def test_a_cut_at_any_call_takes_back_nothing_that_was_told(
    recorded: Callable[[str], list[Record]],
    scratch: Path,
    life: str,
    check: Check,
    variants: int,
    states: int,
) -> None:
    cuts = cut_everywhere(recorded(life), check, scratch, variants)
    assert not cuts.wrong, "\n".join(f"{number}: {what}" for number, what in cuts.wrong)
    assert cuts.states >= states, cuts


#: The fsyncs without which something told would not hold, by life and what they are for.
DEFENCES: dict[str, tuple[str, Check, Callable[[str, bool], bool]]] = {
    "the outbox's log": ("outbox", check_outbox, lambda path, is_folder: path.startswith("outbox.db")),
    "the journal's log": ("store", check_store, lambda path, is_folder: path.startswith("journal.db")),
    "the tables' files": (
        "store",
        check_store,
        lambda path, is_folder: path.startswith("tables") and not is_folder,
    ),
    "the name of the tables' folder": ("store", check_store, lambda path, is_folder: path == "."),
    "the tables' names": (
        "store",
        check_store,
        lambda path, is_folder: path.startswith("tables") and is_folder,
    ),
}


@pytest.mark.parametrize("defence", DEFENCES)
def test_without_its_fsyncs_a_cut_does_harm(
    recorded: Callable[[str], list[Record]], scratch: Path, defence: str
) -> None:
    """The control: the same cuts, with some fsyncs that did nothing."""
    life, check, forgets = DEFENCES[defence]
    cuts = cut_everywhere(recorded(life), check, scratch, 3, forgets=forgets, enough=1)
    assert cuts.wrong, f"nothing needs {defence}"
