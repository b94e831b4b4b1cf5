"""What an outbox holds, for people: read beside the agent that writes it."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from agent.outbox.tables import OutboxTables


def status(path: Path) -> dict[str, Any]:
    """The epoch, lanes and source positions of an outbox that its agent may be writing to; empty without one."""
    facts: dict[str, Any] = {"epoch": "", "outbox": {}, "sources": {}}
    if not path.exists():
        return facts
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None, timeout=30)
    try:
        tables = OutboxTables(db)
        (facts["epoch"],) = db.execute("SELECT value FROM meta WHERE key='epoch'").fetchone()
        for lane in tables.lanes():
            if lane.epoch == facts["epoch"]:
                acked = tables.floor(lane) - 1
                facts["outbox"][lane.name] = {
                    "next_seq": lane.next_seq, "acked": acked, "rows": lane.rows, "bytes": lane.bytes, "lost": lane.lost,
                }  # fmt: skip
        for topic, epoch, seq in db.execute("SELECT topic, epoch, seq FROM source"):
            facts["sources"][topic] = {"epoch": epoch, "seq": seq}
    finally:
        db.close()
    return facts
