"""Ends in processes of their own, which are killed: forked from one that has imported everything already.

A fresh interpreter takes a second to import what a store needs; a fork takes milliseconds, so that many kills fit.
The parent process has no threads and touches nothing; each fork opens its own files and connections.

Standard input: one JSON object a line, `{"run": "store" | "agent", "arguments": {...}, "output": FILE}` starts one;
the answer is its process id.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeward.mqtt import Link
from tests.faults.pipeline.ends import Agent, Keyring, Store
from trends.databases import Postgres

ROOT = Path(__file__).parents[3]


class DiesAt:
    """Kills its own process, as a power button does, at a step for the n-th time."""

    def __init__(self, step: str, times: int) -> None:
        self._step = step
        self._times = times
        self._seen: Counter[str] = Counter()

    def __call__(self, step: str) -> None:
        self._seen[step] += 1
        if step == self._step and self._seen[step] >= self._times:
            os.kill(os.getpid(), signal.SIGKILL)


def _store(
    folder: str, ring: str, url: str, name: str, step: str, times: int, journal: str, share: str
) -> None:
    database = Postgres(journal) if journal else None
    store = Store(
        Path(folder), Keyring.read(Path(ring)), url, name=name, journal=database, share=share,
        steps=DiesAt(step, times),
    )  # fmt: skip
    store.start()
    threading.Event().wait()


def _agent(folder: str, ring: str, url: str, total: int) -> None:
    """A sensor that repeats from the last sample that was acknowledged to it; each ack goes to standard output."""
    agent = Agent(Path(folder), Keyring.read(Path(ring)), url)
    source = agent.outbox.source("sensor/a")
    at = source[1] + 1 if source else 0
    while at < total:
        agent.produce(at, 50)
        at += 50
        os.write(1, b"%d\n" % at)
        if at % 500 == 0:
            threading.Event().wait(0.005)
    threading.Event().wait()


_KINDS: dict[str, Callable[..., None]] = {"store": _store, "agent": _agent}


def _serve() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    Link._spread_reconnects = lambda link: link._client.reconnect_delay_set(0.02, 0.1)  # type: ignore[method-assign,arg-type]
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if order["output"]:
                    os.dup2(os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 1)
                _KINDS[order["run"]](**order["arguments"])
                code = 0
            finally:
                os._exit(code)
        print(pid, flush=True)


class Forks:
    """The parent of the ends; `start` returns a process id that only `alive` and `kill` make use of."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.pipeline.forked"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        self._started: set[int] = set()

    def start(self, kind: str, arguments: dict[str, Any], output: Path | None = None) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"run": kind, "arguments": arguments, "output": str(output or "")}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        self._started.add(pid)
        return pid

    def alive(self, pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self, pid: int) -> None:
        if self.alive(pid):
            os.kill(pid, signal.SIGKILL)
        while self.alive(pid):
            threading.Event().wait(0.005)
        self._started.discard(pid)

    def close(self) -> None:
        for pid in list(self._started):
            self.kill(pid)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    _serve()
