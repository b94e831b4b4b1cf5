"""A counter that grows with every visible change: wakes the reconcile loop, long polls and event streams."""

from __future__ import annotations

import threading


class Changes:
    def __init__(self, start: int = 0) -> None:
        self._condition = threading.Condition()
        self._revision = start

    @property
    def revision(self) -> int:
        return self._revision

    def bump(self) -> None:
        with self._condition:
            self._revision += 1
            self._condition.notify_all()

    def wait(self, seen: int, timeout: float) -> int:
        """The revision as soon as it is above `seen`, or as it is after `timeout` seconds."""
        with self._condition:
            self._condition.wait_for(lambda: self._revision > seen, timeout)
            return self._revision
