"""Time is an input: the rule of docs/architecture.md."""

from __future__ import annotations

import re
from pathlib import Path

#: A worker's process measures how long it may poll the machine itself; no decision hangs on it.
EXEMPT = "agent/runtime/child.py"

ROOT = Path(__file__).parents[2]
READS = re.compile(
    r"\btime\.(?:time|monotonic|perf_counter|process_time)(?:_ns)?\b"
    r"|\bfrom time import (?!sleep\b)|\b(?:datetime|date)\.(?:now|utcnow|today)\("
)


def test_one_module_alone_reads_the_clock() -> None:
    readers = {
        str(file.relative_to(ROOT))
        for package in ("edgeward", "agent", "controller", "models", "simulators", "trends")
        for file in (ROOT / package).rglob("*.py")
        if READS.search(file.read_text())
    }
    assert readers - {EXEMPT} == {"edgeward/clock.py"}
