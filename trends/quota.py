"""How much each device may store: a token bucket for rows and one for bytes. Pure but for what it remembers.

Token buckets as in RFC 2697's single rate: tokens come at `rate` up to `burst`; a batch takes as many as it
has rows, and is put off while there are not enough. Nothing is lost by that: what is not acknowledged stays
in the device's outbox, whose own budget holds there.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeward.identifiers import DeviceName


@dataclass(frozen=True)
class Quota:
    """Per device and second, on average over `seconds`."""

    rows: float = 100_000.0
    bytes: float = 16 * 1024.0 * 1024.0
    seconds: float = 60.0


@dataclass
class _Bucket:
    rows: float
    bytes: float
    at: float


class Quotas:
    """One ingester's; several that share a journal allow each their own."""

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._buckets: dict[DeviceName, _Bucket] = {}

    def allows(self, name: DeviceName, rows: int, size: int, now: float) -> bool:
        """Whether the device may store so much more now (monotonic seconds); takes it then.

        A batch larger than the whole burst passes when the bucket is full: it must pass some time.
        """
        quota = self._quota
        most_rows, most_bytes = quota.rows * quota.seconds, quota.bytes * quota.seconds
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(most_rows, most_bytes, now)
        spent = max(0.0, now - bucket.at)
        bucket.rows = min(most_rows, bucket.rows + spent * quota.rows)
        bucket.bytes = min(most_bytes, bucket.bytes + spent * quota.bytes)
        bucket.at = now
        if bucket.rows < min(rows, most_rows) or bucket.bytes < min(size, most_bytes):
            return False
        bucket.rows -= rows
        bucket.bytes -= size
        return True
