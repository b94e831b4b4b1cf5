"""How fast and when artifacts may come: one cap and one window for all transfers of the agent together."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from edgeward.clock import Clock
from edgeward.errors import Unavailable
from edgeward.wire.reports import WaitReason
from edgeward.wire.schedule import Delivery

#: How often a transfer that waits looks whether it may go on, and one that runs whether it still may.
LOOK_SECONDS = 0.25
#: So many seconds' worth may come at once after a pause.
BURST_SECONDS = 1.0


class Paused(Unavailable):
    """Transfers are not allowed now; what has arrived is kept. `until` is when they are, if that is known."""

    def __init__(self, reason: WaitReason, message: str, until: float | None) -> None:
        super().__init__(message, hint="what runs goes on; the download does when the window opens")
        self.reason = reason
        self.until = until


class Pace:
    """Thread-safe. Whatever transfers an artifact over the site's link calls `begin` before its first byte and
    `take` with the length of each chunk that has arrived; over the site's own network, `take` not `capped`."""

    def __init__(self, clock: Clock, wait: Callable[[float], None] | None = None) -> None:
        """`wait` passes so many seconds, or fewer; for tests that bring their own time."""
        self._clock = clock
        self._changed = threading.Condition()
        self._wait = wait or self._doze
        self._closed: Callable[[], Paused | None] = lambda: None
        self._rate: int | None = None
        self._left = 0.0
        self._at = clock.monotonic()
        self._looked = -LOOK_SECONDS
        self._stopped = False
        #: What must not wait for a transfer's end, as slow as that may be; called between its chunks, and between
        #: two questions to peers that are waited for. What it raises ends the transfer.
        self.meanwhile: Callable[[], None] = lambda: None

    def allow(self, delivery: Delivery, closed: Callable[[], Paused | None]) -> None:
        """From now on: `delivery.rate`, and nothing while `closed` says why not."""
        with self._changed:
            if delivery.rate != self._rate:
                self._rate = delivery.rate
                self._left = min(self._left, 0.0)
                self._at = self._clock.monotonic()
            self._closed = closed
            self._looked = -LOOK_SECONDS
            self._changed.notify_all()

    def stop(self) -> None:
        """The agent ends: who waits gives up."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def begin(self) -> None:
        """Raises Paused when no transfer may begin now."""
        if (paused := self._closed()) is not None:
            raise paused

    def take(self, count: int, *, capped: bool = True) -> None:
        """Wait until `count` bytes, which have arrived, fit under the cap; not for it unless `capped`.

        Raises Paused when transfers must pause, Unavailable when the agent ends.
        """
        with self._changed:
            self._refill()
            self._left -= count if capped else 0
        while True:
            now = self._clock.monotonic()
            if now - self._looked >= LOOK_SECONDS:
                self._looked = now
                self.meanwhile()
                if capped:
                    self.begin()
            with self._changed:
                if self._stopped:
                    raise Unavailable("the agent ends")
                self._refill()
                rate = self._rate
                if rate is None or self._left >= 0 or not capped:
                    return
                missing = -self._left / rate
            self._wait(min(missing, LOOK_SECONDS))

    def seconds(self, size: int) -> float:
        """How long so many bytes take at the least; 0 without a cap."""
        rate = self._rate
        return 0.0 if rate is None else size / rate

    def narrow(self, connection: socket.socket) -> None:
        """Let the system accept little ahead: what its buffers take has used the link before it is counted."""
        rate = self._rate
        if rate is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, min(max(rate // 2, 4096), 1 << 20))

    def _refill(self) -> None:
        now = self._clock.monotonic()
        if self._rate is None:
            self._left = 0.0
        else:
            self._left = min(self._left + (now - self._at) * self._rate, self._rate * BURST_SECONDS)
        self._at = now

    def _doze(self, seconds: float) -> None:
        with self._changed:
            if not self._stopped:
                self._changed.wait(seconds)
