"""A device whose disk refuses calls while models come and go.

python -m tests.faults.disk.refused FOLDER SIDE WAY ERROR STEP ODD

For n = 1, 1 + STEP, ... the n-th call of a roll-out (or of a guard's roll-back: WAY) fails with ERROR. For odd n (even
n if ODD is 0) it is that call alone, for the others all from there on, until the device has said so; some of those
last for many tries. The same process goes on for all n. Prints a line of JSON for each, and ends when n is
beyond the last call.
"""

from __future__ import annotations

import errno
import json
import sqlite3
import sys
from pathlib import Path

from agent.runtime.engine import Engine
from edgeward.clock import SystemClock
from edgeward.wire.desired import ModelRef
from edgeward.wire.reports import Phase
from tests.agent.conftest import wait_until
from tests.faults.disk.device import Device, Releaser
from tests.faults.disk.harness import Faults


class Skipping(SystemClock):
    """The machine's clock, with waits that can be left out."""

    skipped = 0.0

    def now(self) -> float:
        return super().now() + self.skipped

    def monotonic(self) -> float:
        return super().monotonic() + self.skipped

    def monotonic_ns(self) -> int:
        return super().monotonic_ns() + int(self.skipped * 1e9)


class Trial:
    """One device, and what is asked of its disk."""

    def __init__(self, folder: Path, side: Path, odd: int) -> None:
        self.odd = odd
        self.faults = Faults()
        self.clock = Skipping()
        self.releaser = Releaser(side)
        self.engine = Engine()
        self.engine.start()
        self.device = Device(folder, self.releaser.url, self.releaser.root, self.engine, self.clock)
        self.device.start()
        self.generation = 0
        self.published = 0

    def close(self) -> None:
        self.device.close()
        self.engine.stop()
        self.releaser.close()

    def lasts(self, at: int) -> bool:
        return at % 2 != self.odd

    def publish(self) -> ModelRef:
        self.published += 1
        return self.releaser.publish(self.published)

    def wish(self, ref: ModelRef) -> None:
        """As the daemon: what the disk refuses to keep is offered again."""
        self.generation += 1
        self.device.wish(self.generation, ref)

    def runs(self, version: int) -> bool:
        """Whether that version is through; whatever runs meanwhile must answer rightly."""
        running = self.device.running()
        if running is not None:
            assert self.device.answer() == running
        return running == version and self.device.slots.settled()

    def waits(self) -> bool:
        """Whether the slot says why it does not go on."""
        found = self.device.slots.report()["default"]
        return found.phase is Phase.PENDING and found.deadline is not None

    def recover(self, version: int) -> float:
        """Without a restart; the seconds that the device waits for its next tries."""
        waited = 0.0
        while True:
            wait_until(lambda: self.runs(version) or self.waits())
            if self.runs(version):
                return waited
            waited += self.skip()

    def skip(self) -> float:
        """Let the time pass until the next try, and that come to its end; the seconds."""
        before = self.device.slots.report()["default"]
        if before.deadline is None:
            return 0.0
        seconds = max(0.0, before.deadline - self.clock.now())
        self.clock.skipped += seconds
        wait_until(lambda: self.device.slots.report()["default"].deadline != before.deadline)
        wait_until(lambda: self.waits() or self.device.slots.settled())
        return seconds

    def roll_out(self, at: int, error: int) -> dict[str, object]:
        ref, old = self.publish(), self.device.running()
        self.faults.refuse(at, error, lasting=self.lasts(at))
        kept = True
        try:
            self.wish(ref)
        except (OSError, sqlite3.Error):
            kept = False
        else:
            wait_until(lambda: self.runs(ref.version) or self.waits())
            for _ in range(8 if at % 8 == self.odd + 1 else 0):
                self.skip()
        calls = self.faults.count()
        assert self.device.running() in (old, ref.version)
        reason = self.device.slots.report()["default"].reason
        self.faults.refuse(0, 0, lasting=False)
        if not kept:
            self.wish(ref)
        waited = self.recover(ref.version)
        assert self.device.state.generation() == self.generation
        return {"at": at, "calls": calls, "kept": kept, "reason": reason, "waited": waited}

    def roll_back(self, at: int, error: int) -> dict[str, object]:
        first, second = self.publish(), self.publish()
        for ref in (first, second):
            self.wish(ref)
            wait_until(lambda ref=ref: self.runs(ref.version))
        model = self.device.slots.active("default")
        assert model is not None
        self.faults.refuse(at, error, lasting=self.lasts(at))
        model.health.failed += 50
        again = self.device.slots._care._again_at
        wait_until(lambda: self.device.running() == first.version or again)
        calls = self.faults.count()
        assert self.device.answer() == self.device.running()
        self.faults.refuse(0, 0, lasting=False)
        waited = 0.0
        if self.device.running() != first.version:
            waited = again["default"] - self.clock.monotonic()
            self.clock.skipped += waited
            wait_until(lambda: self.device.running() == first.version)
        assert self.device.answer() == first.version
        assert second.digest in self.device.state.quarantined()
        assert first.digest not in self.device.state.quarantined()
        return {"at": at, "calls": calls, "waited": waited}


def main(folder: Path, side: Path, way: str, error: int, step: int, odd: int) -> None:
    trial = Trial(folder, side, odd)
    for _ in range(2):  # so that there is something to collect each time
        ref = trial.publish()
        trial.wish(ref)
        wait_until(lambda ref=ref: trial.runs(ref.version))
    at = 1
    while True:
        done = (trial.roll_out if way == "rollout" else trial.roll_back)(at, error)
        print(json.dumps(done), flush=True)
        if int(str(done["calls"])) < at:
            break
        at += step
    quarantined = trial.device.state.quarantined()
    assert way != "rollout" or not quarantined, quarantined
    trial.close()


if __name__ == "__main__":
    main(
        Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3],
        getattr(errno, sys.argv[4]), int(sys.argv[5]), int(sys.argv[6]),
    )  # fmt: skip
