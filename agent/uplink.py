"""From the outbox to the trend store: batches in order, a bounded number in flight, until acknowledged."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from agent.state import State
from edgeward.clock import Clock
from edgeward.errors import InvalidDocument, TrustError
from edgeward.identifiers import DeviceName
from edgeward.trust.certificates import StoreIdentity, TrustAnchor
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import topics
from edgeward.wire.envelope import open_envelope, seal
from edgeward.wire.rows import Ack, Batch, join_rows
from edgeward.wire.topics import LANES, Lane

log = logging.getLogger(__name__)

BATCH_ROWS = 500
WINDOW_ROWS = 4 * BATCH_ROWS
RESEND_AFTER = 2.0
MAX_RESEND_AFTER = 30.0


@dataclass(frozen=True)
class Sending:
    """How far one lane has been sent. `since` is when it last made progress, monotonic seconds."""

    sent: int = -1
    since: float = 0.0
    patience: float = RESEND_AFTER


def plan(state: Sending, next_seq: int, acked: int, now: float) -> tuple[Sending, tuple[int, int] | None]:
    """What to send next: `(first, count)` or None, and the state afterwards. Pure.

    At most WINDOW_ROWS are unacknowledged; without progress for `patience` seconds everything from the
    lowest unacknowledged row goes again, and patience doubles.
    """
    sent = max(state.sent, acked)
    if sent > acked and now - state.since >= state.patience:
        state = Sending(acked, now, min(state.patience * 2, MAX_RESEND_AFTER))
        sent = acked
    first = sent + 1
    count = min(BATCH_ROWS, next_seq - first, acked + 1 + WINDOW_ROWS - first)
    if count <= 0:
        return replace(state, sent=sent), None
    since = now if sent == acked else state.since
    return Sending(first + count - 1, since, state.patience), (first, count)


class Uplink:
    """`publish` hands bytes to the MQTT link and says whether it took them; `connected` asks it."""

    def __init__(
        self,
        state: State,
        name: DeviceName,
        anchor: TrustAnchor,
        signer: Callable[[], SigningIdentity],
        clock: Clock,
        publish: Callable[[str, bytes], bool],
        connected: Callable[[], bool],
    ) -> None:
        self._state = state
        self._name = name
        self._anchor = anchor
        self._signer = signer
        self._clock = clock
        self._publish = publish
        self._connected = connected
        self._sending: dict[Lane, Sending] = {lane: Sending() for lane in LANES}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = False
        self._thread = threading.Thread(target=self._work, name="uplink", daemon=True)
        self.counts: Counter[str] = Counter()

    def topics(self) -> tuple[str, ...]:
        """The ack topics to subscribe to."""
        return tuple(topics.ack(self._name, lane) for lane in LANES)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop = True
        self._wake.set()
        self._thread.join(10)

    def wake(self) -> None:
        """There are new rows."""
        self._wake.set()

    def reconnected(self) -> None:
        """What was in flight is gone: begin again at the lowest unacknowledged row, at once."""
        with self._lock:
            self._sending = {lane: Sending() for lane in LANES}
        self._wake.set()

    def on_ack(self, topic: str, payload: bytes) -> None:
        """Rows die only by an ack that a trend store of this site signed for this lane and epoch."""
        try:
            parsed = topics.parse(topic)
            opened = open_envelope(payload, topic, self._anchor, self._clock.now())
            if parsed.channel != "ack" or parsed.lane is None or parsed.name != self._name:
                raise TrustError("not an ack for this device")
            if not isinstance(opened.identity, StoreIdentity) or self._name.site not in opened.identity.sites:
                raise TrustError(f"{opened.identity} may not acknowledge for site {self._name.site}")
            ack = opened.decode(Ack)
            lane = self._state.lane(parsed.lane)
            if ack.epoch != self._state.epoch or ack.seq >= lane.next_seq:
                raise TrustError(f"ack of epoch {ack.epoch[:32]} up to {ack.seq} fits no row of this outbox")
        except (TrustError, InvalidDocument) as error:
            self.counts["refused acks"] += 1
            log.warning("ignored an ack on %s: %s", topic[:200], error)
            return
        if ack.seq > lane.acked:
            self._state.acknowledge(parsed.lane, ack.seq)
            with self._lock:
                sending = self._sending[parsed.lane]
                self._sending[parsed.lane] = Sending(sending.sent, self._clock.monotonic())
            self._wake.set()

    def _work(self) -> None:
        while not self._stop:
            busy = False
            if self._connected():
                for lane in LANES:
                    busy |= self._send(lane)
            if not busy:
                self._wake.wait(0.25)
                self._wake.clear()

    def _send(self, lane: Lane) -> bool:
        with self._lock:
            numbers = self._state.lane(lane)
            before = self._sending[lane]
            after, span = plan(before, numbers.next_seq, numbers.acked, self._clock.monotonic())
            self._sending[lane] = after
        if span is None:
            return False
        first, count = span
        rows = self._state.read_rows(lane, first, first + count - 1)
        if len(rows) < count:
            return False
        topic = topics.up(self._name, lane)
        batch = Batch(self._state.epoch, first, count, numbers.floor, join_rows(rows))
        if not self._publish(topic, seal(batch, topic, self._signer())):
            with self._lock:
                self._sending[lane] = before
            return False
        self.counts["batches"] += 1
        return True
