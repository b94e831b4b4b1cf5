"""What does each step from a stream's rows to the trend store's answers cost?

python -m benchmarks.pipeline [--quick] [--json FILE] [--peer-python PYTHON] [--only SET]

Each set of rows is one function in SETS. The limit is what the machine does in the same run without the
product: SQLite alone at synchronous=FULL with the same rows, paho alone through the same Mosquitto, deltalake alone
with ready columns (benchmarks/way.py). The peer of the way to the journal is paho with one INSERT for each row into
SQLite at synchronous=FULL. The peer of the outbox is persist-queue's
SQLite queue, in an environment of its own: `python -m venv peer && peer/bin/pip install persist-queue`, then
`--peer-python peer/bin/python`.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from agent.outbox.outbox import Outbox
from benchmarks import way
from benchmarks.report import Row, arguments, finish, median, spread
from benchmarks.way import BATCH, result_rows
from edgeward.clock import SystemClock

#: Batches that an ack covers: about what is in flight.
ACKED = 5

# Run by the peer's own interpreter: rows per second of `put` in batches, and of `put` and `get`; `task_done` commits.
_PEER = """
import json, sys, tempfile, time
from persistqueue import FIFOSQLiteQueue
rows = [bytes.fromhex(row) for row in json.load(sys.stdin)]
rates = []
for take in (False, True):
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
        queue = FIFOSQLiteQueue(folder, auto_commit=False)
        queue._putter.execute("PRAGMA synchronous=FULL")
        began = time.perf_counter()
        for _ in range(int(sys.argv[2])):
            for row in rows:
                queue.put(row)
            queue.task_done()
            if take:
                for _ in rows:
                    queue.get(block=False)
                queue.task_done()
        rates.append(int(sys.argv[2]) * len(rows) / (time.perf_counter() - began))
        queue.close()
print(json.dumps(rates))
"""


class Options(argparse.Namespace):
    quick: bool
    json: Path | None
    peer_python: Path | None
    only: str | None


def _outbox(folder: Path, batches: int, *, acked: bool) -> float:
    """Rows per second from what a stream makes to what is durable (and, with `acked`, is gone again)."""
    outbox = Outbox(folder / "outbox.db", SystemClock())
    made = [result_rows(number * BATCH) for number in range(batches)]
    began = time.perf_counter()
    for number, rows in enumerate(made):
        outbox.commit_rows(rows)
        if acked and number % ACKED == ACKED - 1:
            outbox.acknowledge(outbox.epoch, "result", (number + 1) * BATCH - 1)
    seconds = time.perf_counter() - began
    outbox.close()
    return batches * BATCH / seconds


def _sqlite(folder: Path, batches: int, *, acked: bool) -> float:
    """The same bytes by SQLite alone: one table, one statement a batch, no bookkeeping."""
    db = sqlite3.connect(folder / "bare.db", isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE row (seq INTEGER PRIMARY KEY, data BLOB)")
    encode = msgspec.msgpack.Encoder().encode
    made = [[encode(row) for _, row in result_rows(number * BATCH)] for number in range(batches)]
    statement = f"INSERT INTO row (data) VALUES {','.join(['(?)'] * BATCH)}"
    began = time.perf_counter()
    for number, rows in enumerate(made):
        db.execute("BEGIN IMMEDIATE")
        db.execute(statement, rows)
        db.execute("COMMIT")
        if acked and number % ACKED == ACKED - 1:
            db.execute("DELETE FROM row WHERE seq <= ?", ((number + 1) * BATCH,))
    seconds = time.perf_counter() - began
    db.close()
    return batches * BATCH / seconds


def _repeat(times: int, measure: Callable[[Path], float]) -> list[float]:
    rates = []
    for _ in range(times):
        with tempfile.TemporaryDirectory(prefix="edgeward-bench-", dir=Path.cwd()) as folder:
            rates.append(measure(Path(folder)))
    return rates


def _peer(python: Path, batches: int) -> list[float]:
    rows = [msgspec.msgpack.encode(row).hex() for _, row in result_rows(0)]
    done = subprocess.run(
        [python, "-c", _PEER, Path.cwd(), str(batches)],
        input=json.dumps(rows), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [float(rate) for rate in json.loads(done.stdout)]


def outbox(options: Options) -> tuple[list[Row], list[str]]:
    """Durable appends in batches of 100, and the whole life of a row."""
    batches, times = (200, 3) if options.quick else (500, 5)
    notes: list[str] = []
    peers: list[float | None] = [None, None]
    if options.peer_python is None:
        notes.append("persist-queue: not measured, see --peer-python")
    else:
        try:
            peers = list(_peer(options.peer_python, batches // 10))
        except (OSError, subprocess.CalledProcessError) as error:
            said = str(getattr(error, "stderr", "") or error).strip().splitlines()
            notes.append(f"persist-queue: not measured: {said[-1] if said else error}")
    rows = []
    works = (
        ("outbox append, durable, batches of 100", False, 100_000.0),
        ("append + ack + delete", True, 70_000.0),
    )
    for (work, acked, target), peer in zip(works, peers, strict=True):
        # In turn, so that a machine that slows down slows both.
        pairs = [
            (_repeat(1, partial(_outbox, batches=batches, acked=acked))[0],
             _repeat(1, partial(_sqlite, batches=batches, acked=acked))[0])
            for _ in range(times)
        ]  # fmt: skip
        ours = [pair[0] for pair in pairs]
        rows.append(
            Row(
                work, "rows/s", median(ours), median([pair[1] for pair in pairs]), peer,
                "persist-queue" if peer is not None else "", f">= {target:,.0f}", spread(ours), median(ours) >= target,
            )
        )  # fmt: skip
    return rows, notes


def sending(options: Options) -> tuple[list[Row], list[str]]:
    return way.way(quick=options.quick)


def tables(options: Options) -> tuple[list[Row], list[str]]:
    return way.delta(quick=options.quick)


#: Each measures one step of the way and gives its rows and notes.
SETS: Sequence[Callable[[Options], tuple[list[Row], list[str]]]] = (outbox, sending, tables)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--peer-python", type=Path, help="an interpreter with persist-queue")
    parser.add_argument("--only", choices=[measure.__name__ for measure in SETS], help="one set of rows")
    options = parser.parse_args(namespace=Options())
    rows: list[Row] = []
    notes: list[str] = []
    for measure in SETS:
        if options.only not in (None, measure.__name__):
            continue
        found, said = measure(options)
        rows += found
        notes += said
    finish("From the outbox to the trend store", rows, options.json, notes)


if __name__ == "__main__":
    main()
