"""Two programs whose disks are recorded: an outbox, and a trend store; see tests/faults/disk/.

python -m tests.faults.pipeline.lives outbox|store FOLDER

Each marks what it has told somebody: a sensor that its samples are kept, a device that its rows are.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from agent.outbox.outbox import Outbox
from edgeward.clock import SystemClock
from edgeward.identifiers import DeviceName
from edgeward.wire.lanes import DEFAULT_POLICIES, LanePolicy
from edgeward.wire.rows import encode_rows
from edgeward.wire.topics import LANES, Lane
from tests.agent.outboxes import row
from tests.faults.disk.device import mark
from trends.journal import Journal
from trends.sequence import decide
from trends.tables import Tables

NAME = DeviceName("north", "turbine-1")
NOW = 1_790_000_000_000_000
#: One lane that waits for the disk, and one whose rows may be lost until they are sent.
POLICIES = {**DEFAULT_POLICIES, "sample": LanePolicy(fsync="before-send")}


def told(**facts: object) -> None:
    mark(msgspec.json.encode(facts))


def outbox_life(folder: Path) -> None:
    outbox = Outbox(folder / "outbox.db", SystemClock(), policies=POLICIES)
    at = 0
    for round_ in range(12):
        rows = [row(seq, lane) for seq in range(at, at + 3) for lane in ("result", "alarm")]
        at += 3
        outbox.commit_rows(rows, {"sensor/a": ("sensor", at - 1)})
        told(kept=at)
        # Of a sensor without numbers, in a lane that does not wait for the disk.
        outbox.commit_rows([row(seq, "sample") for seq in range(round_ * 5, round_ * 5 + 5)])
        if round_ % 3 == 1:
            for lane in LANES:
                part = outbox.read(outbox.epoch, lane, 0, rows=50, size=1 << 20, below=1 << 40)
                if part is not None:
                    last = part.first + part.count - 1
                    told(sent={lane: last}, epoch=outbox.epoch)
        if round_ % 4 == 3:
            outbox.acknowledge(outbox.epoch, "result", at - 6)
            told(acknowledged=at - 6)
    outbox.close()


def take(journal: Journal, first: int, count: int, lane: Lane = "result") -> None:
    """As trends/ingest.py journals a batch."""
    with journal.transaction():
        decision = decide(journal.settled(NAME, "e", lane), first, count, 0)
        for low, high in decision.take:
            packed = encode_rows([row(seq, lane)[1] for seq in range(low, high + 1)])
            journal.append(NAME, "e", lane, NOW, low, high - low + 1, packed)
        journal.settle(NAME, "e", lane, decision.after)


def store_life(folder: Path) -> None:
    journal = Journal(folder / "journal.db")
    tables = Tables(folder / "tables", journal)
    tables.repair()
    for round_ in range(3):
        first = round_ * 10
        take(journal, max(0, first - 3), 13 if first else 10)
        told(stored=first + 10)
        if round_ % 2 == 0:
            tables.flush()
    journal.close()


if __name__ == "__main__":
    {"outbox": outbox_life, "store": store_life}[sys.argv[1]](Path(sys.argv[2]))
