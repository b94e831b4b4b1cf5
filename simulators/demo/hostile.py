"""A client that the broker lets do anything: it forges, replays and moves what the fleet's parts send.

It knows the wire format, reads everything on the broker, and has a certificate authority of its own
that names the right devices. It has no key of the fleet. Nothing it sends may have an effect.
"""

from __future__ import annotations

import collections
import threading
from collections import Counter

import msgspec

from edgeward.clock import Clock, SystemClock
from edgeward.errors import EdgewardError
from edgeward.identifiers import DeviceName
from edgeward.mqtt import Broker, Link, Message
from edgeward.trust import dsse
from edgeward.trust.certificates import DeviceIdentity, Identity, StoreIdentity, issue, make_ca, to_der
from edgeward.trust.keys import SigningIdentity, generate_key
from edgeward.wire import topics
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState, ModelRef, SlotTarget, encode
from edgeward.wire.envelope import Envelope, seal
from edgeward.wire.reports import Phase, Reported, SlotReport, Status
from edgeward.wire.rows import Ack, Batch, ResultRow, encode_rows

#: What a forged row or a forged wish names; it must be found nowhere.
MARK = "forged"
FORGED_DIGEST = "f" * 64
_FORGED_MODEL = ModelRef("shuttle-anomaly", 99, FORGED_DIGEST)
_PAUSE = 0.5
_REMEMBERED = 40


class HostileClient:
    """Attacks in a thread of its own between `start` and `stop`; `sent` counts messages by kind."""

    def __init__(self, broker: str, devices: list[DeviceName], clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._devices = devices
        self.sent: Counter[str] = Counter()
        self._heard: collections.deque[Message] = collections.deque(maxlen=_REMEMBERED)
        self._certificates: dict[str, Envelope] = {}
        self._epochs: dict[str, Batch] = {}
        self._ca_key = generate_key()
        self._ca = make_ca(self._ca_key, self._clock.now())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._attack_until_stopped, daemon=True)
        self._link = Link(
            Broker(broker),
            "innocent-looking-client",
            subscriptions=(f"{topics.PREFIX}/#",),
            on_message=self._hear,
            max_reconnect_delay=1.0,
        )

    def start(self) -> None:
        self._link.start()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5)
        self._link.stop()

    def _hear(self, message: Message) -> None:
        self._heard.append(message)
        try:
            envelope = msgspec.msgpack.decode(message.payload, type=Envelope)
            if envelope.certificate and message.topic.endswith("/status"):
                self._certificates[message.topic.removesuffix("/status")] = envelope
            if "/up/" in message.topic:
                batch = msgspec.msgpack.decode(envelope.body, type=Batch)
                self._epochs[message.topic] = batch
        except (msgspec.DecodeError, UnicodeDecodeError):
            pass

    def _attack_until_stopped(self) -> None:
        while not self._stop.wait(_PAUSE):
            if not self._link.connected:
                continue
            for name in self._devices:
                self._forge(name)
            self._replay()

    def _send(self, kind: str, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if self._link.publish(topic, payload, retain=retain):
            self.sent[kind] += 1

    def _signer(self, identity: Identity) -> SigningIdentity:
        key = generate_key()
        now = self._clock.now()
        certificate = issue(self._ca, self._ca_key, key.public_key(), identity, now, lifetime=3600)
        return SigningIdentity(key, to_der(certificate))

    def _forge(self, name: DeviceName) -> None:
        now = self._clock.now()
        device = self._signer(DeviceIdentity(name))
        store = self._signer(StoreIdentity("plant-store", frozenset({name.site})))
        up = topics.up(name, "result")
        known = self._epochs.get(up)
        batch = Batch(
            epoch=known.epoch if known else MARK,
            first_seq=known.first_seq + known.count if known else 0,
            count=1,
            floor=0,
            rows=encode_rows([self._row(now)]),
        )
        self._send("forged rows", up, seal(batch, up, device, with_certificate=True))
        birth = self._certificates.get(topics.root(name))
        if birth is not None:
            # The genuine certificate, which anyone may read, without the key that belongs to it.
            stolen = SigningIdentity(device.key, birth.certificate)
            self._send("rows under a stolen certificate", up, seal(batch, up, stolen, with_certificate=True))
        for lane in topics.LANES:
            seen = self._epochs.get(topics.up(name, lane))
            if seen is not None:
                topic = topics.ack(name, lane)
                ack = Ack(seen.epoch, seen.first_seq + seen.count + 100_000)
                self._send("forged acks", topic, seal(ack, topic, store, with_certificate=True))
        self._forge_state(name, device, now)

    def _forge_state(self, name: DeviceName, device: SigningIdentity, now: float) -> None:
        wish = DesiredState(
            name.site, name.device, 1 << 40, now, now + 3600, {"default": SlotTarget(_FORGED_MODEL)}, []
        )
        topic = topics.desired(name)
        self._send(
            "forged desired state", topic, dsse.sign(encode(wish), PAYLOAD_TYPE, generate_key()), retain=True
        )
        slot = SlotReport(Phase.ACTIVE, target=_FORGED_MODEL, running=_FORGED_MODEL)
        topic = topics.reported(name)
        lie = Reported(boot=1 << 40, n=1, at=now, observed_generation=1 << 40, slots={"default": slot})
        self._send("forged reports", topic, seal(lie, topic, device, with_certificate=True))
        topic = topics.status(name)
        gone = Status(boot=1 << 40, n=1, at=now, state="offline")
        self._send("forged wills", topic, seal(gone, topic, device, with_certificate=True))

    def _replay(self) -> None:
        """What was heard, again: where it was heard, at another device, and in another lane."""
        for message in list(self._heard)[-4:]:
            try:
                parsed = topics.parse(message.topic)
            except EdgewardError:
                continue
            self._send("replayed messages", message.topic, message.payload)
            other = next(name for name in self._devices if name != parsed.name)
            moved = message.topic.replace(topics.root(parsed.name), topics.root(other), 1)
            self._send("messages moved to another device", moved, message.payload)
            if parsed.lane == "result":
                turned = topics.up(parsed.name, "alarm")
                self._send("messages moved to another lane", turned, message.payload)

    @staticmethod
    def _row(now: float) -> ResultRow:
        return ResultRow(int(now * 1e6), MARK, 1, "", MARK, 0, FORGED_DIGEST, MARK, MARK, {MARK: 1.0}, True)
