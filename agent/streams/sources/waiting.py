"""How sources wait: for room in the stream's queue, and longer and longer for a peer that is gone."""

from __future__ import annotations

import random
import threading

from agent.streams.samples import Samples
from agent.streams.sources.port import Sink

_ROOM_S = 0.02


def offer(sink: Sink, samples: Samples, stop: threading.Event) -> bool:
    """Hand `samples` over as soon as there is room. False when `stop` came first: nothing was taken."""
    while not stop.is_set():
        if sink.take(samples):
            return True
        stop.wait(_ROOM_S)
    return False


class Backoff:
    """Seconds to wait before the next attempt: doubled each time up to `most`, spread so that a restarted
    server does not meet all its clients at once."""

    def __init__(self, first: float = 0.25, most: float = 30.0) -> None:
        self._first = first
        self._most = most
        self._next = first

    def reset(self) -> None:
        self._next = self._first

    def delay(self) -> float:
        chosen = self._next
        self._next = min(self._most, self._next * 2)
        return chosen * random.uniform(0.5, 1.0)  # noqa: S311 - a spread, not a secret
