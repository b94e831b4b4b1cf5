"""Open buckets of event time per series; a bucket closes when values of a later one come in."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from agent.outbox.merging import statistics_of
from agent.outbox.rows import TrendChange
from agent.streams.results import Lineage
from agent.streams.sketches import Statistics
from edgeward.wire.desired import StreamTarget
from edgeward.wire.rows import Row, TrendRow

Floats = npt.NDArray[np.float64]

_encode = msgspec.msgpack.Encoder().encode


#: Additions after which the whole state is written again.
_SNAPSHOT_AFTER = 200


class _Added(msgspec.Struct, array_like=True):
    """One call of `add`, as it came."""

    event_time: bytes
    digest: str
    variant: str
    provider: str
    series: dict[str, bytes]
    edges: dict[str, list[float]]


class Trends:
    """`width_us` is a bucket's length in microseconds of event time.

    A bucket also closes when nothing has come for `idle` seconds: a sensor that stopped must not keep its
    last minute back.
    """

    def __init__(self, width_us: int, idle: float) -> None:
        self._width = width_us
        self._idle = idle
        self._open: dict[tuple[str, int, Lineage], Statistics] = {}
        self._newest = 0
        self._touched: float | None = None
        self._added: list[_Added] = []
        self._since = _SNAPSHOT_AFTER  # the first change is whole

    def add(
        self,
        event_time: npt.NDArray[np.int64],
        lineage: Lineage,
        series: dict[str, Floats],
        edges: dict[str, list[float]],
        now: float,
    ) -> None:
        """Values `[n]` by series, with the event time of each; `edges` are histogram edges by series.

        `now` is monotonic seconds.
        """
        buckets = event_time // self._width * self._width
        if not len(buckets):
            return
        self._touched = now
        self._added.append(
            _Added(
                event_time.tobytes(), lineage.digest, lineage.variant, lineage.provider,
                {name: values.astype(np.float64).tobytes() for name, values in series.items()}, edges,
            )
        )  # fmt: skip
        first, last = int(buckets.min()), int(buckets.max())
        # Not the newest of all: one time that lies ahead would close every later message's bucket at once.
        self._newest = last
        for bucket in [first] if first == last else np.unique(buckets).tolist():
            mask = None if first == last else buckets == bucket
            for name, values in series.items():
                key = (name, bucket, lineage)
                statistics = self._open.get(key)
                if statistics is None:
                    statistics = self._open[key] = Statistics(edges.get(name, []))
                statistics.add(values if mask is None else values[mask])

    def take(self, target: StreamTarget, now: float, *, everything: bool = False) -> list[Row]:
        """The rows of all closed buckets (or of all), which are forgotten here."""
        if self._touched is not None and now - self._touched >= self._idle:
            everything = True
        keys = [key for key in self._open if everything or key[1] < self._newest]
        if not self._open or len(keys) == len(self._open):
            self._touched = None
        return [self._row(target, key, self._open.pop(key)) for key in keys]

    @property
    def due(self) -> float | None:
        """When the open buckets close for want of samples."""
        return None if self._touched is None else self._touched + self._idle

    def change(self, target: StreamTarget, *, closed: bool) -> TrendChange | None:
        """What a restart needs to know since the last change; to be committed with the rows it belongs to.

        `closed` when `take` gave rows: they must not be counted again.
        """
        added, self._added = self._added, []
        self._since += len(added)
        if closed or self._since >= _SNAPSHOT_AFTER:
            self._since = 0
            rows = [self._row(target, key, item) for key, item in self._open.items()]
            return TrendChange(target.name, _encode(rows), whole=True)
        return TrendChange(target.name, _encode(added), whole=False) if added else None

    def restore(self, changes: list[bytes], now: float) -> None:
        """Go on from what was committed: the whole state first, then what was added to it."""
        if not changes:
            return
        for row in msgspec.msgpack.decode(changes[0], type=list[TrendRow]):
            lineage = Lineage(row.digest, row.variant, row.provider)
            self._open[(row.series, row.bucket, lineage)] = statistics_of(row)
            self._newest = max(self._newest, row.bucket)
            self._touched = now
        for added in changes[1:]:
            for item in msgspec.msgpack.decode(added, type=list[_Added]):
                series = {name: np.frombuffer(data) for name, data in item.series.items()}
                lineage = Lineage(item.digest, item.variant, item.provider)
                self.add(np.frombuffer(item.event_time, np.int64), lineage, series, item.edges, now)
        self._added = []

    def _row(self, target: StreamTarget, key: tuple[str, int, Lineage], item: Statistics) -> TrendRow:
        series, bucket, lineage = key
        empty = item.count == 0
        return TrendRow(
            bucket, self._width, target.name, target.revision, lineage.digest, lineage.variant,
            lineage.provider, series, item.count, item.missing, item.mean, item.m2,
            0.0 if empty else item.minimum, 0.0 if empty else item.maximum, item.edges, item.histogram,
            item.sketch.encoded(),
        )  # fmt: skip
