"""A stream's side for sources to write to, and waiting with a deadline."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from agent.streams.samples import Samples
from agent.streams.sources.port import SampleSource, Sink


class RecordingSink:
    """Takes `room` parts of samples, all when None."""

    def __init__(self, room: int | None = None) -> None:
        self.parts: list[Samples] = []
        self.counts: Counter[str] = Counter()
        self.room = room
        self.blocked = ""
        self.refused = 0
        self._lock = threading.Lock()

    def take(self, samples: Samples) -> bool:
        with self._lock:
            if self.room is not None and len(self.parts) >= self.room:
                self.refused += 1
                return False
            self.parts.append(samples)
            return True

    def count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.counts[what] += number

    @property
    def values(self) -> list[list[float]]:
        return [row for part in list(self.parts) for row in part.values.tolist()]

    @property
    def seqs(self) -> list[int]:
        return [
            int(seq)
            for part in list(self.parts)
            for seq in (part.seq if part.seq is not None else np.array([], dtype=np.int64))
        ]

    @property
    def problems(self) -> list[str]:
        return [text for part in list(self.parts) for text in part.problems.values()]


@pytest.fixture
def sink() -> RecordingSink:
    return RecordingSink()


@pytest.fixture
def new_sink() -> type[RecordingSink]:
    return RecordingSink


@pytest.fixture
def until() -> Callable[..., None]:
    def wait(condition: Callable[[], object], what: str = "the condition", seconds: float = 15.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come true"
            time.sleep(0.005)

    return wait


@pytest.fixture
def start() -> Iterator[Callable[[SampleSource, Sink], None]]:
    """Starts sources, and stops them whatever became of the test."""
    started: list[SampleSource] = []

    def begin(source: SampleSource, sink: Sink) -> None:
        started.append(source)
        source.start(sink)

    yield begin
    for source in started:
        source.stop()
