"""The port that every source implements, and what it may call back."""

from __future__ import annotations

from typing import Protocol

from agent.streams.samples import Samples


class Sink(Protocol):
    """The stream's side; callable from any thread."""

    def take(self, samples: Samples) -> bool:
        """Hand samples over. False when nothing was taken: `blocked` says why, else the queue is full.

        A source that can wait offers them again; one that cannot counts them as dropped.
        """
        ...

    @property
    def blocked(self) -> str:
        """Why the stream takes nothing at all: it has no model, or none that fits. Empty: it runs."""
        ...

    def count(self, what: str, number: int = 1) -> None:
        """Count `rejected`, `dropped`, `reconnects`, ... for the stream's report."""
        ...


class SampleSource(Protocol):
    """Runs in threads of its own between `start` and `stop`."""

    def start(self, sink: Sink) -> None: ...

    def stop(self) -> None:
        """Return when no `take` is under way any more; must not take longer than 5 s."""
        ...

    def committed(self, epoch: str, seq: int) -> None:
        """Everything up to this position is durable: tell the sensor, or remember how far a file is read."""
        ...
