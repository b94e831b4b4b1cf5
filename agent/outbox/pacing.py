"""How large batches are, how many are under way and how hard they are compressed: what the link can take. Pure.

Additive increase, multiplicative decrease (Chiu, Jain 1989) on batches that are acknowledged and batches that
time out; round trips smoothed as TCP does (RFC 6298), never from a batch that was sent twice (Karn).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

#: Bytes of rows in a batch, before compression.
MIN_SIZE, FIRST_SIZE, MAX_SIZE = 8 << 10, 64 << 10, 1 << 20
GROWTH = 32 << 10
#: Batches without an ack. Brokers drop acknowledged messages beyond some hundreds, so there are never many.
FIRST_WINDOW, MAX_WINDOW = 4.0, 16.0
#: A round trip in seconds beyond which larger batches only make fresh rows wait.
TARGET_S = 2.0
MIN_TIMEOUT, FIRST_TIMEOUT, MAX_TIMEOUT = 1.0, 2.0, 60.0
#: zstd levels, and bytes per second below which one is worth its processor time.
LEVELS = ((1, float("inf")), (3, 4e6), (9, 256e3), (15, 32e3))


@dataclass(frozen=True)
class Pace:
    """`size` bytes of rows per batch, `window` batches in flight; `rate` is compressed bytes per second, 0: unknown."""

    size: int = FIRST_SIZE
    window: float = FIRST_WINDOW
    rtt: float = 0.0
    deviation: float = 0.0
    rate: float = 0.0
    level: int = 3

    @property
    def timeout(self) -> float:
        """Seconds after which a batch without an ack is sent again."""
        if not self.rtt:
            return FIRST_TIMEOUT
        return min(max(self.rtt + 4 * self.deviation, MIN_TIMEOUT), MAX_TIMEOUT)


def acknowledged(pace: Pace, seconds: float | None, sent: int, in_flight: int) -> Pace:
    """A batch arrived `seconds` after it was sent (None: it was sent more than once).

    `sent` is its size on the wire, `in_flight` how many bytes were under way when it went, itself included:
    so many crossed the link in that time.
    """
    if seconds is None:
        return pace
    if pace.rtt:
        deviation = 0.75 * pace.deviation + 0.25 * abs(pace.rtt - seconds)
        rtt = 0.875 * pace.rtt + 0.125 * seconds
    else:
        rtt, deviation = seconds, seconds / 2
    measured = max(sent, in_flight) / max(seconds, 1e-3)
    rate = 0.875 * pace.rate + 0.125 * measured if pace.rate else measured
    if seconds > TARGET_S:
        size, window = max(MIN_SIZE, pace.size * 3 // 4), max(1.0, pace.window * 0.75)
    else:
        size, window = min(MAX_SIZE, pace.size + GROWTH), min(MAX_WINDOW, pace.window + 1 / pace.window)
    return Pace(size, window, rtt, deviation, rate, _level(pace.level, rate))


def timed_out(pace: Pace) -> Pace:
    """A batch had no ack in time."""
    return replace(pace, size=max(MIN_SIZE, pace.size // 2), window=max(1.0, pace.window / 2))


def _level(now: int, rate: float) -> int:
    """The level for a rate; a harder one only when the rate is clearly below its limit, so that it stays put."""
    chosen = LEVELS[0][0]
    for level, limit in LEVELS:
        if rate < (limit if level <= now else limit / 2):
            chosen = level
    return chosen


def backoff(base: float, tries: int, limit: float, chance: float) -> float:
    """Seconds to wait after `tries` in vain: anything up to `base * 2^tries` ("full jitter", Brooker 2015).

    `chance` is uniform in 0 .. 1. Devices that failed together must not come again together.
    """
    return float(min(limit, base * 2 ** min(tries, 32)) * chance)
