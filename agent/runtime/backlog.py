"""Which requests run next, and what becomes of them when their worker is lost. Pure; the worker acts.

Requests run in the order of their arrival. While a worker is busy others wait and are then joined, as
far as their shapes agree, into one batch. After a crash every request that was running is tried once
more, alone, so that the one at fault costs nobody else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from msgspec import Struct

from agent.runtime.port import Done, Tensor
from agent.runtime.tensors import Shapes, batch_key

MAX_ATTEMPTS = 2


class Pending(Struct, eq=False):
    """A request. `rows` is its leading dimension, `arrived` in monotonic nanoseconds."""

    inputs: Sequence[Tensor]
    done: Done
    key: Shapes | None
    rows: int
    arrived: int
    attempts: int = 0


class Batch(Struct, eq=False):
    """Requests that run as one; `started` is when the worker began with it, None while it is only sent."""

    requests: list[Pending]
    sent: int
    started: int | None = None
    rows: int = 0

    def __post_init__(self) -> None:
        self.rows = sum([request.rows for request in self.requests])


class Backlog:
    """The requests of one model that no worker has yet."""

    def __init__(self, limit: int, max_batch: int) -> None:
        self.limit = limit
        self.max_batch = max_batch
        self._waiting: deque[Pending] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        return len(self._waiting) >= self.limit

    @property
    def suspect(self) -> bool:
        """The next request was there when a worker was lost: it must run with no other."""
        return bool(self._waiting) and self._waiting[0].attempts > 0

    @property
    def oldest(self) -> int | None:
        """When the next request arrived."""
        return self._waiting[0].arrived if self._waiting else None

    def add(self, inputs: Sequence[Tensor], done: Done, now: int) -> None:
        key = batch_key(inputs) if self.max_batch > 1 else None
        self._waiting.append(Pending(inputs, done, key, inputs[0].shape[0] if key is not None else 1, now))

    def rows(self) -> int:
        """How many rows could run as one batch now."""
        total = 0
        for request in self._waiting:
            if request.key is None or request.key != self._waiting[0].key:
                break
            total += request.rows
        return total

    def take(self, now: int) -> Batch:
        """The next batch. Must not be empty."""
        first = self._waiting.popleft()
        requests, rows = [first], first.rows
        if first.key is not None and not first.attempts:
            while self._waiting:
                following = self._waiting[0]
                if following.key != first.key or following.attempts or rows + following.rows > self.max_batch:
                    break
                requests.append(self._waiting.popleft())
                rows += following.rows
        return Batch(requests, now)

    def put_back(self, lost: list[Batch]) -> list[Pending]:
        """Return what a lost worker had, in order; those that were tried often enough come back as failed."""
        failed: list[Pending] = []
        again: list[Pending] = []
        for batch in lost:
            for request in batch.requests:
                if batch.started is not None:
                    request.attempts += 1
                (failed if request.attempts >= MAX_ATTEMPTS else again).append(request)
        self._waiting.extendleft(reversed(again))
        return failed

    def split_up(self, batch: Batch) -> None:
        """Its model does not treat rows one by one: run these requests, and all later ones, alone."""
        self.max_batch = 1
        for request in batch.requests:
            request.key = None
        for request in self._waiting:
            request.key = None
        self._waiting.extendleft(reversed(batch.requests))

    def drop(self, gone: Callable[[Pending], bool]) -> list[Pending]:
        """Take out the requests for which `gone` holds."""
        dropped = [request for request in self._waiting if gone(request)]
        if dropped:
            self._waiting = deque(request for request in self._waiting if not gone(request))
        return dropped


class InFlight:
    """The batches that a worker has. Batches run in the order they were sent, `concurrency` at once."""

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._batches: dict[int, Batch] = {}
        self._free: list[int] = []
        self.take_all()

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def suspects(self) -> bool:
        """A request that was there when a worker was lost runs now: nothing else may begin."""
        return any(request.attempts for batch in self._batches.values() for request in batch.requests)

    def send(self, batch: Batch, now: int) -> int:
        """The slot for a batch; one may be sent ahead of those that run."""
        slot = self._free.pop()
        self._batches[slot] = batch
        self._start(now)
        return slot

    def answered(self, slot: int, now: int) -> Batch:
        """The batch of a slot, which is free again. Raises KeyError for a slot that is not in use."""
        batch = self._batches.pop(slot)
        self._free.append(slot)
        self._start(now)
        return batch

    def _start(self, now: int) -> None:
        for place, batch in enumerate(self._batches.values()):
            if batch.started is None and place < self._concurrency:
                batch.started = now

    def oldest_start(self) -> int | None:
        """When the batch that runs longest began; None when none runs."""
        return min(
            (batch.started for batch in self._batches.values() if batch.started is not None), default=None
        )

    def take_all(self) -> list[Batch]:
        """Everything, in the order it was sent; all slots are free then."""
        batches = list(self._batches.values())
        self._batches.clear()
        self._free = list(range(self._concurrency + 1))
        return batches
