"""What each model version and the server have done since the start: plain numbers, one thread."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_BYTES = (256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Observations counted by upper bound; the last bucket has none."""

    __slots__ = ("bounds", "buckets", "count", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.count = 0
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.buckets[bisect_left(self.bounds, value)] += 1
        self.count += 1
        self.total += value


class ModelStatistics:
    """Of one model version. Times in seconds, `last` is the monotonic time of the last success.

    `executions` sums each request's share of the batch it ran in, so a batch of four adds one.
    `failures` counts refused and failed requests by HTTP status.
    """

    __slots__ = (
        "batch",
        "body",
        "compute_input",
        "compute_output",
        "executions",
        "failed_seconds",
        "failures",
        "infer",
        "inferences",
        "last",
        "pending",
        "queue",
        "request",
        "succeeded",
    )  # fmt: skip

    def __init__(self) -> None:
        self.request = Histogram(_SECONDS)
        self.queue = Histogram(_SECONDS)
        self.infer = Histogram(_SECONDS)
        self.body = Histogram(_BYTES)
        self.batch = Histogram(_ROWS)
        self.compute_input = 0.0
        self.compute_output = 0.0
        self.failed_seconds = 0.0
        self.succeeded = 0
        self.failures: dict[int, int] = {}
        self.inferences = 0
        self.executions = 0.0
        self.pending = 0
        self.last = 0.0

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    def failure(self, status: int, seconds: float) -> None:
        self.failures[status] = self.failures.get(status, 0) + 1
        self.failed_seconds += seconds


class Statistics:
    """Of the whole server. `answers` by HTTP status; `refused_connections` were over the cap."""

    def __init__(self) -> None:
        self.models: dict[tuple[str, str], ModelStatistics] = {}
        self.answers: dict[int, int] = {}
        self.connections = 0
        self.refused_connections = 0
        self.disconnects = 0
        self.timeouts = 0
        self.held_bytes = 0

    def of(self, name: str, version: str) -> ModelStatistics:
        key = (name, version)
        found = self.models.get(key)
        if found is None:
            found = self.models[key] = ModelStatistics()
        return found
