"""One end of the way from a site to the cloud as a process of its own, which kills itself at a step.

`python -m tests.faults.forward_child site|central FOLDER URL STEP:N`, where FOLDER holds the fleet's CA key.
It dies when it comes to STEP for the N-th time; the site ends by itself when all is acknowledged.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeward.wire.resources import Residency
from tests.trends.forwarding_bench import FAST, Central, Fleet, Site, wait_until
from trends.journal import Journal

#: Results go, trends go in part, samples stay.
RESIDENCY = Residency(forward=["result", "trend"], series=["output:*"])
PACE = replace(FAST, record_every=0.0)


class Steps:
    def __init__(self, deadly: str) -> None:
        self._step, _, number = deadly.partition(":")
        self._left = int(number)
        self._lock = threading.Lock()

    def __call__(self, step: str) -> None:
        with self._lock:
            self._left -= step == self._step
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


class Stepping(Journal):
    """A journal with a step before, in and after each transaction."""

    step: Steps

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self.step("before")
        with super().transaction():
            yield
            self.step("not committed")
        self.step("committed")


def site(folder: Path, url: str, steps: Steps) -> None:
    made = Site(folder / "site", Fleet(folder))
    made.forward(url, RESIDENCY, PACE, between=steps)
    wait_until(lambda: made.behind == 0)
    made.stop()
    made.close()


def central(folder: Path, url: str, steps: Steps) -> None:
    made = Central(folder / "central", Fleet(folder), url)
    Stepping.step = steps
    made.journal.close()
    made.journal = Stepping(folder / "central" / "journal.db")
    made.start()
    assert made.ingester is not None
    publish = made.ingester._link.publish

    def acknowledge(*message: Any, **options: Any) -> bool:
        steps("acknowledging")
        sent = publish(*message, **options)
        steps("acknowledged")
        return sent

    made.ingester._link.publish = acknowledge  # type: ignore[method-assign]
    sys.stdin.read()


if __name__ == "__main__":
    role, where, address, deadly = sys.argv[1:]
    {"site": site, "central": central}[role](Path(where), address, Steps(deadly))
