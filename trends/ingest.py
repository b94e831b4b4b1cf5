"""From signed batches on the broker to rows in the journal, and only then the ack.

Nothing a sender puts into a message can end the ingester: each refusal is counted with its reason,
and a row that cannot be stored is quarantined and still acknowledged, so that it does not block its lane.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import msgspec

from edgeward.clock import Clock
from edgeward.errors import InvalidDocument, TrustError
from edgeward.identifiers import DeviceName
from edgeward.intervals import Interval, clip, contains, missing, size
from edgeward.mqtt import Broker, Link, Message
from edgeward.trust.certificates import DeviceIdentity, StoreIdentity, TrustAnchor
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import topics
from edgeward.wire.envelope import Opened, UnknownSigner, open_envelope, seal
from edgeward.wire.rows import (
    MAX_ACK_RANGES,
    ROW_TYPES,
    Ack,
    Batch,
    Lost,
    decode_rows,
    join_rows,
    split_rows,
)
from edgeward.wire.topics import Lane
from trends.checks import MAX_TEXT, check_row, suspicious
from trends.journal import Journal
from trends.losses import losses, share
from trends.quota import Quota, Quotas
from trends.sequence import decide

log = logging.getLogger(__name__)

MAX_SEQUENCE = 1 << 60
_GROUP = 64
#: Seconds without any message after which the connection may be one that carries none: see `Link.renew`.
SILENCE_S = 60.0


@dataclass(frozen=True)
class Reply:
    """An ack to publish after the commit."""

    topic: str
    ack: Ack


class _Sequence(NamedTuple):
    """Whose rows a batch holds, where it came from, and when (microseconds since 1970)."""

    name: DeviceName
    epoch: str
    lane: Lane
    topic: str
    now_us: int


class Ingest:
    """Decides and journals; `handle` takes messages one by one, `Ingester` below feeds it from MQTT."""

    def __init__(
        self,
        journal: Journal,
        anchor: TrustAnchor,
        sites: frozenset[str],
        clock: Clock,
        quota: Quota | None = None,
        *,
        central: bool = False,
    ) -> None:
        """`central`: also take what the sites' own trend stores forward for their devices."""
        self._journal = journal
        self._channels = ("status", "up", "forward") if central else ("status", "up")
        self._anchor = anchor
        self._sites = sites
        self._clock = clock
        self._quotas = Quotas(quota or Quota())
        self._decoders = {lane: msgspec.msgpack.Decoder(kind) for lane, kind in ROW_TYPES.items()}
        self.counts: Counter[str] = Counter()
        self.denied: frozenset[str] = frozenset()
        """Key ids of certificates that are refused although their time has not ended."""

    def handle(self, topic: str, payload: bytes) -> Reply | None:
        """Store what is new in one message; to be called inside `journal.transaction()`.

        Never raises for what a sender did. The reply may be published once the transaction is over.
        """
        now = self._clock.now()
        try:
            parsed = topics.parse(topic)
            if parsed.channel not in self._channels:
                raise InvalidDocument("not a message for a trend store", source=topic[:200])
            opened = open_envelope(
                payload, topic, self._anchor, now, find_certificate=self._journal.certificate
            )
            self._check_sender(opened, parsed.name, parsed.channel)
            if parsed.channel == "status":
                self._journal.remember_certificate(opened.keyid, opened.certificate)
                return None
            assert parsed.lane is not None
            batch = opened.decode(Batch)
            held = batch.count - sum(item.last_seq - item.first_seq + 1 for item in batch.lost)
            held = max(held, 1) if batch.gap is None else 1
            if not self._quotas.allows(parsed.name, held, len(payload), self._clock.monotonic()):
                # Not acknowledged: the device keeps it and sends it again.
                self.counts["over quota"] += 1
                return None
            ack = self._store(parsed.name, parsed.lane, topic, batch, int(now * 1e6))
            answer = topics.ack if parsed.channel == "up" else topics.forwarded
            return Reply(answer(parsed.name, parsed.lane), ack)
        except UnknownSigner:
            # The birth with the certificate may still be on its way; the device sends again.
            self.counts["unknown signer"] += 1
        except (TrustError, InvalidDocument) as error:
            self.counts["refused"] += 1
            self._journal.quarantine(int(now * 1e6), topic, None, str(error), payload)
            log.warning("refused a message on %s: %s", topic[:200], error)
        return None

    def _check_sender(self, opened: Opened, name: DeviceName, channel: str) -> None:
        identity = opened.identity
        if opened.keyid in self.denied:
            raise TrustError(f"{identity} is revoked")
        if channel == "forward":
            if not isinstance(identity, StoreIdentity) or name.site not in identity.sites:
                raise TrustError(f"signed by {identity}, which is no trend store of site {name.site}")
        elif not isinstance(identity, DeviceIdentity) or identity.name != name:
            raise TrustError(f"signed by {identity}, which is not {name}")
        if name.site not in self._sites:
            raise TrustError(
                f"site {name.site} is not one of this store's ({', '.join(sorted(self._sites))})"
            )

    def _store(self, name: DeviceName, lane: Lane, topic: str, batch: Batch, now_us: int) -> Ack:
        if not 1 <= batch.count <= MAX_SEQUENCE:
            raise InvalidDocument(f"a batch of {batch.count} rows", field="count")
        if not (0 <= batch.floor <= batch.first_seq < MAX_SEQUENCE) or not _is_name(batch.epoch):
            raise InvalidDocument("impossible sequence numbers or epoch", field="first_seq")
        lost = losses(batch)
        decision = decide(
            self._journal.settled(name, batch.epoch, lane), batch.first_seq, batch.count, batch.floor
        )
        self.counts[decision.verdict] += 1
        if decision.take:
            sequence = _Sequence(name, batch.epoch, lane, topic, now_us)
            self._lose(sequence, lost, decision.take)
            self._append(sequence, batch, lost, decision.take)
        for span in decision.lost:
            self._journal.append_gap(name, batch.epoch, lane, now_us, span, "store-lost")
        self._journal.settle(name, batch.epoch, lane, decision.after)
        after = decision.after
        # The newest ones: a device goes on from the floor anyway.
        return Ack(batch.epoch, after.expected - 1, after.above[-MAX_ACK_RANGES:])

    def _lose(self, sequence: _Sequence, lost: list[Lost], take: list[Interval]) -> None:
        """Gap records for what is lost of the intervals `take`."""
        for item in lost:
            spans = clip(take, item.first_seq, item.last_seq)
            times = (item.first_event_time, item.last_event_time)
            for span in spans:
                # Which of them were lost for which reason is not told: each reason's record names the span.
                for reason, count in share(item.reasons, size([span])).items():
                    self._gap(sequence, span, reason, times, count)

    def _gap(
        self,
        sequence: _Sequence,
        span: Interval,
        reason: str,
        times: tuple[int, int] = (0, 0),
        count: int | None = None,
    ) -> None:
        name, epoch, lane, _, now_us = sequence
        self._journal.append_gap(name, epoch, lane, now_us, span, reason[:MAX_TEXT], times, count)

    def _append(self, sequence: _Sequence, batch: Batch, lost: list[Lost], take: list[Interval]) -> None:
        """Journal the rows of the batch that are in `take`."""
        name, epoch, lane, topic, now_us = sequence
        end = batch.first_seq + batch.count - 1
        present = missing([(item.first_seq, item.last_seq) for item in lost], batch.first_seq, end)
        if not present:
            return
        if take == present == [(batch.first_seq, end)] and self._all_good(lane, batch, now_us):
            self._journal.append(name, epoch, lane, now_us, batch.first_seq, batch.count, batch.rows)
            self.counts["rows"] += batch.count
            return
        try:
            raw = split_rows(batch.rows)
            if len(raw) != size(present):
                raise InvalidDocument(f"{len(raw)} rows, announced {size(present)}", field="rows")
        except InvalidDocument as error:
            # A genuine device sent it and would send it for ever: it becomes a gap, not a block.
            self._journal.quarantine(now_us, topic, batch.first_seq, str(error), batch.rows)
            for first, last in present:
                for span in clip(take, first, last):
                    self.counts["bad rows"] += span[1] - span[0] + 1
                    self._gap(sequence, span, f"refused: {error}")
            return
        self._append_one_by_one(sequence, present, raw, take)

    def _all_good(self, lane: Lane, batch: Batch, now_us: int) -> bool:
        """Whether nothing in the batch needs a second look: nearly always."""
        try:
            rows = decode_rows(lane, batch.rows)
        except InvalidDocument:
            return False
        return len(rows) == batch.count and not suspicious(lane, rows, now_us)

    def _append_one_by_one(
        self, sequence: _Sequence, present: list[Interval], raw: list[bytes], take: list[Interval]
    ) -> None:
        """Find the rows that cannot be stored, and journal the others that are news."""
        name, epoch, lane, topic, now_us = sequence
        decode = self._decoders[lane].decode
        good: list[tuple[int, bytes]] = []
        numbers = [seq for first, last in present for seq in range(first, last + 1)]
        for seq, row in zip(numbers, raw, strict=True):
            if not contains(take, seq):
                continue
            try:
                problem = check_row(decode(row), now_us)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                problem = str(error)
            if problem:
                self.counts["bad rows"] += 1
                self._journal.quarantine(now_us, topic, seq, problem, row)
                self._gap(sequence, (seq, seq), f"refused: {problem}")
            else:
                good.append((seq, row))
        for _, run in groupby(enumerate(good), lambda item: item[1][0] - item[0]):
            rows = [row for _, row in run]
            packed = join_rows([row for _, row in rows])
            self._journal.append(name, epoch, lane, now_us, rows[0][0], len(rows), packed)
        self.counts["rows"] += len(good)


def _is_name(epoch: str) -> bool:
    return 1 <= len(epoch) <= 64 and epoch.isprintable()


def _topic(message: Message) -> str:
    return message.topic


class Ingester:
    """Receives with manual MQTT acks, commits in groups, acknowledges after the commit."""

    def __init__(
        self,
        ingest: Ingest,
        journal: Journal,
        broker: Broker,
        identity: SigningIdentity,
        name: str,
        *,
        share: str = "",
        central: bool = False,
        between: Callable[[str], None] = lambda step: None,
    ) -> None:
        """Ingesters with one `share` get each batch once between them (MQTT 5.0, 4.8.2); births go to all,
        since retained messages are not sent for shared subscriptions. `central`: see Ingest.

        `between` is called between two steps, with the name of the one before (fault tests).
        """
        self._between = between
        self._ingest = ingest
        self._journal = journal
        self._identity = identity
        self._queue: queue.Queue[Message | None] = queue.Queue(maxsize=1000)
        self._thread = threading.Thread(target=self._work, name="ingest", daemon=True)
        self.failure: Exception | None = None
        self._link = Link(
            broker,
            f"edgeward-store-{name}",
            subscriptions=(
                topics.ALL_STATUS,
                *(
                    f"$share/{share}/{each}" if share else each
                    for each in ((topics.ALL_UP, topics.ALL_FORWARD) if central else (topics.ALL_UP,))
                ),
            ),
            on_message=self._queue.put,
            manual_ack=True,
            receive_maximum=200,
            max_reconnect_delay=5.0,
        )

    @property
    def connected(self) -> bool:
        return self._link.connected

    def sign_as(self, identity: SigningIdentity) -> None:
        """Acks from now on are signed by this one: the certificate was renewed."""
        self._identity = identity

    def start(self) -> None:
        self._thread.start()
        self._link.start()

    def stop(self) -> None:
        self._link.stop()
        self._queue.put(None)
        self._thread.join(30)

    def _work(self) -> None:
        while True:
            try:
                group = [self._queue.get(timeout=SILENCE_S)]
            except queue.Empty:
                if self._link.connected:
                    self._link.renew()
                continue
            with contextlib.suppress(queue.Empty):
                while len(group) < _GROUP:
                    group.append(self._queue.get_nowait())
            # In one order everywhere: ingesters of one journal wait for each other's lanes in turn.
            messages = [message for message in group if message is not None]
            self.failure = self._store(sorted(messages, key=_topic))
            # Also after a failure: the device repeats what has no ack of ours, while messages held
            # back here would use up the broker's receive window. In the order of their coming: the
            # embedded broker ends a connection that acknowledges in another (MQTT 5.0, 4.6).
            for message in messages:
                message.acknowledge()
            self._between("released")
            if len(messages) < len(group):
                return

    def _store(self, messages: list[Message]) -> Exception | None:
        """Commit and acknowledge; what fails is tried message by message, so that one holds up no other."""
        try:
            self._commit(messages)
        except Exception as error:  # noqa: BLE001  # a full disk must not end the thread: unacked batches come again
            if len(messages) > 1:
                failures = [self._store([message]) for message in messages]
                return next((failure for failure in failures if failure is not None), None)
            log.error(
                "could not store a message on %s, it is not acknowledged: %s", _topic(messages[0]), error
            )
            return error
        return None

    def _commit(self, messages: list[Message]) -> None:
        replies: dict[tuple[str, str], Reply] = {}
        self._between("received")
        with self._journal.transaction():
            for message in messages:
                reply = self._ingest.handle(message.topic, message.payload)
                if reply is not None:
                    replies[reply.topic, reply.ack.epoch] = reply
            self._between("decided")
        self._between("journalled")
        for reply in replies.values():
            self._link.publish(
                reply.topic, seal(reply.ack, reply.topic, self._identity, with_certificate=True)
            )
        self._between("acknowledged")
