"""From a site's trend store to a central one: what its residency policy allows, exactly once.

Nothing waits in a queue of its own: what the central store lacks is read back from the journal and the
tables, however long it was away. Each decision is counted durably before the message that it is about.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from edgeward.clock import Clock
from edgeward.errors import InvalidDocument, TrustError
from edgeward.mqtt import Broker, Link, Message
from edgeward.trust.certificates import StoreIdentity, TrustAnchor
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import topics
from edgeward.wire.envelope import open_envelope, seal
from edgeward.wire.residency import ResidencyPolicy
from edgeward.wire.rows import Ack, Batch
from trends.forwarding import DOUBT, PATIENCE, Flight, after_ack, choose, cut, pending
from trends.journal import Journal
from trends.ledger import Ledger
from trends.outgoing import MAX_ROWS, Gap, Holding, batches
from trends.read_back import Lot, ReadBack
from trends.residency import Terms, terms_for
from trends.sequence import SequenceId, Settled

log = logging.getLogger(__name__)

_TICK = 0.5


@dataclass(frozen=True)
class Pace:
    """Batches in flight at most; seconds between two batches of a sequence unless many rows wait, and of one
    that stays here; seconds that a record of decisions covers; seconds without an ack until a batch goes again, at first."""

    window: int = 8
    rows_every: float = 2.0
    withheld_every: float = 60.0
    record_every: float = 3600.0
    patience: float = PATIENCE


class Forwarder:
    """One thread that sends and takes acks. `policy` and `denied` may be exchanged while it runs."""

    def __init__(
        self,
        journal: Journal,
        read_back: ReadBack,
        ledger: Ledger,
        broker: Broker,
        anchor: TrustAnchor,
        store: StoreIdentity,
        signer: SigningIdentity,
        clock: Clock,
        pace: Pace | None = None,
        *,
        between: Callable[[str], None] = lambda step: None,
    ) -> None:
        """`between` is called between two durable steps (fault tests)."""
        self.policy: ResidencyPolicy | None = None
        self.denied: Collection[str] = frozenset()
        self.counts: Counter[str] = Counter()
        self._journal = journal
        self._read_back = read_back
        self._ledger = ledger
        self._anchor = anchor
        self._store = store
        self._signer = signer
        self._clock = clock
        self._pace = pace or Pace()
        self._between = between
        self._there: dict[SequenceId, Settled] | None = None
        self._flights: defaultdict[SequenceId, Flight] = defaultdict(
            lambda: Flight(first=self._pace.patience)
        )
        self._offered: dict[SequenceId, float] = {}
        self._confirmed: dict[SequenceId, float] = {}
        self._rest_until = 0.0
        self._turn = 0
        self._said: set[str] = set()
        self._messages: queue.Queue[Message | None] = queue.Queue(maxsize=1000)
        self._connected_again = threading.Event()
        self._thread = threading.Thread(target=self._work, name="forward", daemon=True)
        self._link = Link(
            broker,
            f"edgeward-forward-{store.name}",
            subscriptions=tuple(topics.all_forwarded(site) for site in sorted(store.sites)),
            on_message=self._messages.put,
            on_connect=self._connected_again.set,
            max_reconnect_delay=30.0,
        )

    @property
    def connected(self) -> bool:
        return self._link.connected

    def sign_as(self, signer: SigningIdentity) -> None:
        """Batches from now on are signed by this one: the certificate was renewed."""
        self._signer = signer

    def start(self) -> None:
        self._thread.start()
        self._link.start()

    def stop(self) -> None:
        self._link.stop()
        self._messages.put(None)
        self._thread.join(30)

    def _work(self) -> None:
        while True:
            arrived: list[Message | None] = []
            with contextlib.suppress(queue.Empty):
                arrived.append(self._messages.get(timeout=_TICK))
                while True:
                    arrived.append(self._messages.get_nowait())
            try:
                if not self._journal.leads():
                    # Another ingester of the same journal forwards; what it is told is in the ledger.
                    self._there = None
                else:
                    self._take([message for message in arrived if message is not None])
                    if self._connected_again.is_set():
                        self._connected_again.clear()
                        self._land()
                    if arrived or self._clock.monotonic() >= self._rest_until:
                        self._offer_all()
                    self._record()
            except Exception as error:  # noqa: BLE001  # a full disk must not end the thread: all is offered again
                self._there = None
                log.error("cannot forward, it is tried again: %s", error)
            if None in arrived:
                return

    # acks

    def _take(self, messages: list[Message]) -> None:
        there = self._known()
        said: dict[SequenceId, Settled] = {}
        for message in messages:
            try:
                sequence, ack = self._open(message)
            except (TrustError, InvalidDocument) as error:
                self.counts["refused acks"] += 1
                log.warning("refused an ack on %s: %s", message.topic[:200], error)
                continue
            before = said.get(sequence, there.get(sequence))
            said[sequence] = after_ack(before, ack)
            if before is not None and said[sequence].expected < before.expected:
                self.counts["went back"] += 1
                log.warning("the central store lacks rows of %s that it had: they go again", sequence.name)
        if not said:
            return
        self._ledger.acknowledged(said)
        self._between("acknowledged")
        now = self._clock.monotonic()
        for sequence, settled in said.items():
            there[sequence] = settled
            self._flights[sequence] = self._flights[sequence].acknowledged(settled)
            self._confirmed[sequence] = now
        self.counts["acks"] += len(said)

    def _open(self, message: Message) -> tuple[SequenceId, Ack]:
        """Raises TrustError, InvalidDocument."""
        parsed = topics.parse(message.topic)
        if parsed.channel != "forwarded" or parsed.lane is None:
            raise InvalidDocument("not an ack of a central store", source=message.topic[:200])
        opened = open_envelope(message.payload, message.topic, self._anchor, self._clock.now())
        identity = opened.identity
        if not isinstance(identity, StoreIdentity) or parsed.name.site not in identity.sites:
            raise TrustError(f"signed by {identity}, which is no trend store of site {parsed.name.site}")
        if identity.name == self._store.name:
            raise TrustError("this store acknowledged its own batch: --forward-to leads back here")
        if opened.keyid in self.denied:
            raise TrustError(f"{identity} is revoked")
        ack = opened.decode(Ack)
        if any(not 0 <= first <= last for first, last in ack.ranges):
            raise InvalidDocument("impossible ranges", field="ranges")
        sequence = SequenceId(parsed.name, ack.epoch, parsed.lane)
        if sequence not in self._flights:
            raise InvalidDocument("an ack for what was not sent", source=message.topic[:200])
        return sequence, ack

    def _known(self) -> dict[SequenceId, Settled]:
        if self._there is None:
            self._there = self._ledger.cursors()
            self._flights.clear()
        return self._there

    # batches

    def _land(self) -> None:
        """What was on its way when the connection broke goes again now."""
        for sequence, flight in self._flights.items():
            self._flights[sequence] = replace(flight, spans=())

    def _offer_all(self) -> None:
        while self._link.connected:
            began = self._clock.monotonic()
            if not self._offer():
                # To look through many sequences for nothing shall take a tenth of the time at most.
                ended = self._clock.monotonic()
                self._rest_until = ended + 9 * (ended - began)
                return

    def _offer(self) -> bool:
        """Send what there is room for; whether anything was sent."""
        there, now = self._known(), self._clock.monotonic()
        for sequence in self._flights:
            self._flights[sequence] = self._flights[sequence].at(now)
        room = self._pace.window - sum(len(flight.spans) for flight in self._flights.values())
        if room <= 0:
            return False
        terms = self._terms()
        here = {each: known for each, known in self._journal.positions().items() if each.name.site in terms}
        lots = self._choose(here, there, terms, room, now, doubted=False)
        lots = lots or self._choose(here, there, terms, room, now, doubted=True)
        made = self._make(lots, terms, max(1, room // max(1, len(lots))))
        if not made:
            return False
        self._ledger.decide(made, self._clock.now())
        self._between("decided")
        for sequence, _, batch in made:
            topic = topics.forward(sequence.name, sequence.lane)
            # QoS 0: our own acks make up for what is lost, and no copy that a later policy forbids waits in
            # the MQTT client for the next connection.
            self._link.publish(topic, seal(batch, topic, self._signer, with_certificate=True), qos=0)
            span = (batch.first_seq, batch.first_seq + batch.count - 1)
            self._flights[sequence] = self._flights[sequence].sent(span, now)
            self._offered[sequence] = now
            self.counts["batches"] += 1
            self._between("sent")
        return True

    def _terms(self) -> dict[str, Terms]:
        """What holds for each site where anything may be decided now."""
        terms = {site: terms_for(site, self.policy, self._clock.now()) for site in self._store.sites}
        held = {each.held for each in terms.values() if each.residency is None}
        self.counts["held"] += bool(held)
        for why in held - self._said:
            log.warning("nothing is forwarded: %s", why)
        self._said = held
        return {site: each for site, each in terms.items() if each.residency is not None}

    def _choose(
        self,
        here: dict[SequenceId, Settled],
        there: dict[SequenceId, Settled],
        terms: dict[str, Terms],
        room: int,
        now: float,
        *,
        doubted: bool,
    ) -> list[Lot]:
        open_ = {}
        for sequence, settled in here.items():
            if doubted and now - self._confirmed.get(sequence, -DOUBT) < DOUBT:
                continue
            if not doubted and there.get(sequence) == settled:
                continue
            flying = self._flights[sequence].numbers() if sequence in self._flights else []
            found = pending(settled, there.get(sequence), flying, doubted=doubted)
            if found and (doubted or self._due(sequence, found[0], terms, now)):
                open_[sequence] = found
        self._turn += 1
        return choose(open_, room, self._turn)

    def _due(self, sequence: SequenceId, span: tuple[int, int], terms: dict[str, Terms], now: float) -> bool:
        """Whether it is not too soon after the last batch: many small ones cost more than few large ones."""
        since = now - self._offered.get(sequence, -self._pace.withheld_every)
        if not _may_leave(sequence, terms):
            return since >= self._pace.withheld_every
        many = span[1] - span[0] + 1 >= MAX_ROWS
        return many or sequence.lane == "alarm" or since >= self._pace.rows_every

    def _make(
        self, lots: list[Lot], terms: dict[str, Terms], each: int
    ) -> list[tuple[SequenceId, str, Batch]]:
        """The batches of the lots, about `each` of one."""
        gaps = dict(zip(lots, self._read_back.gaps(lots), strict=True))
        holdings = [
            Holding(lot.first, lot.last, {}, gaps[lot]) if not _may_leave(lot.sequence, terms) else None
            for lot in lots
        ]
        by_lane: defaultdict[str, list[int]] = defaultdict(list)
        for index, holding in enumerate(holdings):
            if holding is None:
                by_lane[lots[index].sequence.lane].append(index)
        for indices in by_lane.values():
            parts = [self._cut(lots[index], gaps[lots[index]], each * MAX_ROWS) for index in indices]
            for index, part, rows in zip(indices, parts, self._read_back.rows(parts), strict=True):
                if not rows:
                    part = self._skip(lots[index], part, gaps[lots[index]])
                holdings[index] = Holding(part.first, part.last, rows, gaps[lots[index]])
        made = []
        for lot, holding in zip(lots, holdings, strict=True):
            term = terms[lot.sequence.name.site]
            assert holding is not None and term.residency is not None
            for batch in batches(lot.sequence.epoch, lot.sequence.lane, holding, term.residency):
                made.append((lot.sequence, term.policy, batch))
        return made

    def _cut(self, lot: Lot, gaps: list[Gap], limit: int) -> Lot:
        return cut(lot, [(gap.first, gap.last) for gap in gaps], limit)

    def _skip(self, lot: Lot, part: Lot, gaps: list[Gap]) -> Lot:
        """A part without rows reaches to the next one, so that a long loss is one range."""
        if part.last == lot.last:
            return part
        following = self._read_back.first_row(lot)
        return part._replace(last=lot.last if following is None else max(part.last, following - 1))

    # decisions

    def _record(self) -> None:
        terms = self._terms()
        going_on = {(site, each.policy) for site, each in terms.items()}
        now = self._clock.now()
        if self._ledger.record(now, older_than=self._pace.record_every, going_on=going_on):
            self._between("recorded")


def _may_leave(sequence: SequenceId, terms: dict[str, Terms]) -> bool:
    residency = terms[sequence.name.site].residency
    return residency is not None and sequence.lane in residency.forward
