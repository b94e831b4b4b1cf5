"""A bridge that kills itself at its n-th step.

python -m tests.trends.bridges.bridge_child FOLDER KIND ADDRESS N

A step is a moment between two durable ones. Ends by itself when N is beyond the last.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from edgeward.clock import SystemClock
from trends.bridges.bridge import KEYS, Bridge, Target
from trends.bridges.cursor import Cursor
from trends.bridges.feed import Feed
from trends.journal import Journal
from trends.tables import Tables


class Steps:
    def __init__(self, last: int) -> None:
        self.left = last

    def __call__(self, step: str) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def target(kind: str, address: str, steps: Steps) -> Target:
    if kind == "postgres":
        from trends.bridges.postgres import PostgresTarget

        return PostgresTarget(address, kind, between=steps)
    from trends.bridges.kafka import KafkaTarget

    return KafkaTarget({"bootstrap.servers": address}, threading.Event())


def main(folder: Path, kind: str, address: str, last: int) -> None:
    journal = Journal(folder / "journal.db")
    tables = Tables(folder / "tables", journal)
    steps = Steps(last)
    cursor = Cursor(folder, kind)
    with cursor.alone():
        feeds = [Feed(tables, journal, table) for table in KEYS]
        made = target(kind, address, steps)
        Bridge(feeds, made, cursor, SystemClock(), threading.Event(), rows=20, between=steps).run(once=True)
        made.close()
    journal.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
