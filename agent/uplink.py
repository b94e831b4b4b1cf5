"""From the outbox to the trend store: a bounded number of batches in flight, until each is acknowledged."""

from __future__ import annotations

import logging
import random
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from agent.outbox.outbox import Outbox
from agent.outbox.pacing import MAX_TIMEOUT, Pace, acknowledged, backoff, timed_out
from agent.outbox.sending import Key, Schedule
from edgeward.clock import Clock
from edgeward.errors import InvalidDocument, TrustError
from edgeward.identifiers import DeviceName
from edgeward.trust.certificates import StoreIdentity, TrustAnchor
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import topics
from edgeward.wire.envelope import open_envelope, seal
from edgeward.wire.rows import MAX_ACK_RANGES, Ack, Batch, join_rows
from edgeward.wire.topics import LANES, Lane

log = logging.getLogger(__name__)

MAX_ROWS = 2000
#: Seconds between looks at ages and budgets.
TEND_S = 1.0
#: A fleet that lost its broker finds it again at one instant: the first batches are spread over so long, and
#: over longer when the connection does not last until an ack.
SPREAD_S, MAX_SPREAD_S = 0.5, 30.0
_POLL_S = 0.25
#: Seconds without an ack, while batches wait for one, after which the connection may be one that carries none;
#: twice as long after each that brought none, since the store may be away.
SILENCE_S, MAX_SILENCE_S = 60.0, 3600.0


@dataclass(frozen=True)
class _Resume:
    """When to begin after a reconnect, monotonic seconds; `failures` connections before brought no ack."""

    at: float = 0.0
    failures: int = -1


class Uplink:
    """`publish` hands bytes to the MQTT link and says whether it took them; `connected` asks it; `renew` gives
    it a new connection."""

    def __init__(
        self,
        outbox: Outbox,
        name: DeviceName,
        anchor: TrustAnchor,
        signer: Callable[[], SigningIdentity],
        clock: Clock,
        publish: Callable[[str, bytes], bool],
        connected: Callable[[], bool],
        chance: Callable[[], float] = random.random,
        renew: Callable[[], None] = lambda: None,
    ) -> None:
        """`chance` is uniform in 0 .. 1."""
        self._outbox = outbox
        self._name = name
        self._anchor = anchor
        self._signer = signer
        self._clock = clock
        self._publish = publish
        self._connected = connected
        self._chance = chance
        self._renew = renew
        self._heard = clock.monotonic()
        self._lock = threading.Lock()
        self._schedule = Schedule()
        self._resume = _Resume()
        self._tended = clock.monotonic()
        self._slowed = 0.0
        self.pace = Pace()
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
        """What was in flight is gone: begin again, soon, at a moment of this device's own."""
        now = self._clock.monotonic()
        with self._lock:
            failures = self._resume.failures + 1
            self._resume = _Resume(now + backoff(SPREAD_S, failures, MAX_SPREAD_S, self._chance()), failures)
            self._heard = now
            self._schedule = Schedule()
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
            self._check(parsed.lane, ack)
            self._outbox.acknowledge(ack.epoch, parsed.lane, ack.seq, ack.ranges)
        except (TrustError, InvalidDocument) as error:
            self.counts["refused acks"] += 1
            log.warning("ignored an ack on %s: %s", topic[:200], error)
            return
        except (OSError, sqlite3.Error) as error:
            # The rows stay; they are sent again, and acknowledged again.
            log.warning("an ack could not be noted: %s", error)
            return
        self._arrived((ack.epoch, parsed.lane), ack)

    def _check(self, lane: Lane, ack: Ack) -> None:
        """Raises TrustError for numbers that this outbox never gave out."""
        known = [item for item in self._outbox.sequences() if (item.epoch, item.lane) == (ack.epoch, lane)]
        before = ack.seq
        for first, last in ack.ranges[: MAX_ACK_RANGES + 1]:
            if not before < first <= last:
                raise TrustError("ranges that are not ascending")
            before = last
        if not known or before >= known[0].next_seq or len(ack.ranges) > MAX_ACK_RANGES:
            raise TrustError(f"ack of epoch {ack.epoch[:32]} up to {before} fits no row of this outbox")

    def _arrived(self, key: Key, ack: Ack) -> None:
        now = self._clock.monotonic()
        with self._lock:
            self._heard = now
            for flight in self._schedule.acknowledged(key, ack.seq, ack.ranges):
                seconds = now - flight.sent if flight.tries == 0 else None
                self.pace = acknowledged(self.pace, seconds, flight.size, flight.under_way)
                self._resume = _Resume(self._resume.at, -1)
        self._wake.set()

    def _work(self) -> None:
        while not self._stop:
            busy = False
            try:
                self._tend()
                self._listen()
                if self._connected() and self._clock.monotonic() >= self._resume.at:
                    busy = self._send()
            except (OSError, sqlite3.Error) as error:
                log.warning("the outbox cannot be used now: %s", error)
            except Exception:
                # Whatever it is, rows must not wait for ever because of it.
                log.exception("a batch could not be sent")
            if not busy:
                self._wake.wait(_POLL_S)
                self._wake.clear()

    def _tend(self) -> None:
        now = self._clock.monotonic()
        if now - self._tended >= TEND_S:
            self._tended = now
            self._outbox.tend()

    def _listen(self) -> None:
        """A connection that takes batches and brings no ack is replaced."""
        now = self._clock.monotonic()
        with self._lock:
            if not self._schedule.flights or not self._connected():
                self._heard = now
                return
            patience = min(MAX_SILENCE_S, SILENCE_S * 2 ** min(max(self._resume.failures, 0), 8))
            if now - self._heard <= patience + self.pace.timeout:
                return
            self._heard = now
        log.warning("no ack for %.0f s: connecting anew", patience)
        self._renew()

    def _send(self) -> bool:
        """One batch, if one is due; False when there is nothing to do now."""
        sequences = self._outbox.sequences()
        now = self._clock.monotonic()
        with self._lock:
            schedule = self._schedule
            want = schedule.next(sequences, now, int(self.pace.window))
            if want is None:
                return False
            late = want.flight is not None and want.flight.deadline > want.flight.sent
            if late and now - self._slowed >= self.pace.timeout:  # once for all that one silence cost
                self._slowed = now
                self.pace = timed_out(self.pace)
            pace = self.pace
        epoch, lane = want.key
        part = self._outbox.read(epoch, lane, want.first, rows=MAX_ROWS, size=pace.size, below=want.below)
        if part is None:
            with self._lock:
                schedule.nothing(want)
            return True
        topic = topics.up(self._name, lane)
        rows = join_rows(part.rows, level=pace.level) if part.rows else b""
        sealed = seal(
            Batch(epoch, part.first, part.count, part.floor, rows, lost=part.lost), topic, self._signer()
        )
        tries = want.flight.tries + 1 if want.flight else 0
        wait = pace.timeout + backoff(pace.timeout, tries, MAX_TIMEOUT, self._chance())
        with self._lock:  # before it goes: the ack may be quicker than this thread
            flight = schedule.sent(want, (part.first, part.first + part.count - 1), len(sealed), now, wait)
        if not self._publish(topic, sealed):
            with self._lock:
                schedule.refused(flight, now)
            return False
        self.counts["batches"] += 1
        return True
