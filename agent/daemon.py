"""The daemon: wires identity, slots, streams, outbox, uplink and reports together."""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import sqlite3
import threading
from pathlib import Path

import msgspec
import psutil

import edgeward
from agent import inventory
from agent.applying import Applying
from agent.attempts import Attempts
from agent.desired import outbox_policies
from agent.fetch import BlobStore
from agent.holds import Holds
from agent.identity import Identity, require_enrolled
from agent.imports import Imports
from agent.outbox.outbox import Outbox
from agent.pace import Pace
from agent.peers.settings import Settings as PeerSettings
from agent.peers.site import Site
from agent.runtime.engine import Engine
from agent.runtime.installed import installed
from agent.runtime.memory import give_back_memory
from agent.serving.server import Server
from agent.serving.settings import Settings
from agent.slots.catalog import SlotCatalog
from agent.slots.gate import Gate
from agent.slots.measure import machine_key
from agent.slots.opened import Setup
from agent.slots.slots import Slots
from agent.state import State
from agent.streams.local_link import LocalLink
from agent.streams.running import PREFIX, Streams
from agent.trusted_clock import TrustedClock
from agent.uplink import Uplink
from agent.verify import Verifier
from edgeward.clock import Clock
from edgeward.errors import Conflict, EdgewardError
from edgeward.mqtt import Broker, Link, Message, Will
from edgeward.wire import topics
from edgeward.wire.desired import DesiredState
from edgeward.wire.envelope import seal
from edgeward.wire.reports import LaneReport, OutboxReport, Report, Reported, Status
from edgeward.wire.topics import LANES

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0
IMPORT_SECONDS = 1.0


class Daemon:
    """One device. `run` returns when `stop` is set; what it had begun is durable at any instant."""

    def __init__(
        self,
        folder: Path,
        machine_clock: Clock,
        *,
        broker: str | None = None,
        report_interval: float = 10.0,
        serving: Settings | None = None,
        peers: PeerSettings | None = None,
    ) -> None:
        """`serving` says where local applications find the models, `peers` where agents of this site find one
        another; None: nowhere.

        Raises Conflict when another agent uses `folder`, NotFound when it is not enrolled.
        """
        self._lock_file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock_file)
            raise Conflict(f"another agent runs in {folder}", hint="stop it first") from None
        self._interval = report_interval
        require_enrolled(folder)
        self.state = State(folder / "state.db")
        self._clock = clock = TrustedClock(machine_clock, self.state)
        self.outbox = Outbox(folder / "outbox.db", clock, older=folder / "state.db")
        self.identity = Identity(folder, clock)
        self.name = self.identity.name
        self._boot = self.state.next_boot()
        attempts = Attempts(self.state)
        self._n = 0
        self._number = threading.Lock()
        self._noted = self.state.slot_reports()
        self._inventory = inventory.find(folder)
        self._wake = threading.Event()
        self._offers: queue.Queue[bytes] = queue.Queue()
        self._reported_due = threading.Event()
        self._noted_due = threading.Event()
        trust = self.identity.enrollment.trust
        pace = Pace(clock)
        blobs = BlobStore(folder / "blobs", pace=pace)
        self._imports = Imports(folder)
        self._imports.sweep()
        self._imported = 0
        self._site = (
            None
            if peers is None
            else Site(
                folder,
                peers,
                self.identity,
                blobs,
                clock,
                lambda digest: digest not in self.state.quarantined(),
            )
        )
        verifier = Verifier(
            folder / "tuf",
            trust.tuf_root.encode(),
            blobs,
            self.identity.transport,
            clock,
            self._imports,
            None if self._site is None else self._site.peers,
        )
        self.engine = Engine(
            on_crash_loop=lambda name, losses, seconds: self.slots.crash_looped(name, losses, seconds),
            on_recovered=lambda name: self.slots.recovered(name),
        )
        setup = Setup(
            machine=machine_key(self._inventory),
            available=(*self._inventory.providers, *self._inventory.delegates),
            compiled=folder / "compiled",
        )
        self.slots = Slots(
            self.state,
            verifier,
            self.engine,
            installed(),
            clock,
            self._changed,
            setup,
            lambda slot, opened: self.streams.problem(slot, opened),
            attempts,
            Gate(clock.moment, Holds(folder), pace),
        )
        self._applying = Applying(
            self.state,
            attempts,
            self.name,
            lambda: self.identity.enrollment.trust.desired_keys,
            self._apply,
            clock,
        )
        self._catalog = SlotCatalog(self.slots)
        self._status_topic = topics.status(self.name)
        self._desired_topic = topics.desired(self.name)
        self._ack_topics = tuple(topics.ack(self.name, lane) for lane in LANES)
        self.link = Link(
            Broker(broker or self.identity.enrollment.broker, peer_time=self.identity.peer_time),
            f"edgeward-agent-{self.name.device}",
            subscriptions=(self._desired_topic, *self._ack_topics),
            on_message=self._on_message,
            on_connect=self._on_connect,
            will=Will(self._status_topic, self._status("offline")),
            max_reconnect_delay=10.0,
        )
        self.uplink = Uplink(
            self.outbox,
            self.name,
            self.identity.anchor,
            self.identity.signer,
            clock,
            self.link.publish,
            lambda: self.link.connected,
            renew=self.link.renew,
        )
        self._local = LocalLink(self.link.subscribe, self.link.unsubscribe, self.link.publish)
        self.streams = Streams(
            self.name,
            self.outbox,
            clock,
            self.slots.active,
            self._local,
            self.uplink.wake,
            folder / "actions",
        )
        self._server = (
            None if serving is None else Server(self._catalog, serving, clock, {PREFIX: self.streams.handle})
        )

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop`."""
        renewed = threading.Event()
        self.engine.start()
        try:
            if self._server is not None:
                self.engine.call(self._server.start())
            self.slots.start()
            if self._site is not None:
                self._site.start()
        except BaseException:
            self.engine.stop()
            raise
        self._catalog.refresh()
        self._applying.restore()
        self._take_import()
        self._catalog.settle()
        self.uplink.start()
        self.link.start()
        threading.Thread(target=self.identity.keep_fresh, args=(stop, renewed), daemon=True).start()
        give_back_memory()
        last_report = last_poll = last_import = self._clock.monotonic()
        try:
            while not stop.is_set():
                self._wake.wait(0.25)
                self._wake.clear()
                now = self._clock.monotonic()
                try:
                    if renewed.is_set():
                        renewed.clear()
                        self._on_connect()
                    self._take_offers()
                    if self._noted_due.is_set():
                        self._noted_due.clear()
                        self._note_slots()
                    if self._reported_due.is_set() and self.link.connected:
                        self._reported_due.clear()
                        self._send_reported()
                    if now - last_report >= self._interval and self.link.connected:
                        since, last_report = now - last_report, now
                        self._send_report(since)
                    if not self.link.connected and now - last_poll >= POLL_SECONDS:
                        last_poll = now
                        self._poll_desired()
                    if now - last_import >= IMPORT_SECONDS:
                        last_import = now
                        self._take_import()
                except Exception:
                    # A full disk, or a bug over one of these: the others, and what runs, must go on.
                    log.exception("the daemon's turn failed")
        finally:
            self._applying.stop()
            self.streams.stop()
            self.link.publish(self._status_topic, self._status("offline"), retain=True)
            if self._server is not None:
                self.engine.call(self._server.stop())
            self.uplink.stop()
            self.link.stop()
            if self._site is not None:
                self._site.stop()
            self.slots.stop()
            self.engine.stop()
            self.outbox.close()
            self.state.close()
            os.close(self._lock_file)

    # desired state

    def _take_offers(self) -> None:
        while not self._offers.empty():
            self._offer(self._offers.get())
        before = self._applying.conditions()
        self._applying.look()
        if self._applying.conditions() != before:
            self._changed()

    def _offer(self, raw: bytes) -> None:
        self._applying.offer(raw)
        self._changed()

    def _apply(self, desired: DesiredState) -> None:
        self.outbox.keep(outbox_policies(desired))
        # The streams first: a new model is held against those that it will get.
        self.streams.apply(desired.streams)
        self.slots.wish(desired.slots, desired.delivery)

    def _poll_desired(self) -> None:
        """While MQTT is away, HTTPS may still be there."""
        try:
            raw = self.identity.client.desired(newer_than=self._applying.held, wait=0.0)
        except EdgewardError as error:
            log.debug("no desired state over HTTP: %s", error)
            return
        if raw is not None:
            self._offer(raw)

    def _take_import(self) -> None:
        """What `edgeward bundle import` has left here; it goes once no slot can need it any more."""
        try:
            found = self._imports.newest()
            if found is None:
                return
            if found.number > self._imported:
                self._imported = found.number
                log.info("taking import %d", found.number)
                self._offer(found.desired())
                # The same generation may have come by MQTT before, without a way to its models.
                self.slots.retry()
                self._imports.drop(found.number - 1)
            elif not self._applying.unkept and self.slots.settled():
                self._imports.drop(found.number)
                self._imported = 0  # the next one's number begins anew
        except OSError as error:
            log.warning("import: %s", error)

    # MQTT

    def _on_message(self, message: Message) -> None:
        if message.topic == self._desired_topic:
            # Applying it may wait for a stream to end, which must not hold up acks.
            self._offers.put(message.payload)
            self._wake.set()
        elif message.topic in self._ack_topics:
            self.uplink.on_ack(message.topic, message.payload)
        else:
            self._local.dispatch(message)

    def _on_connect(self) -> None:
        """A broker that was killed has forgotten everything: say it all again."""
        self.link.publish(self._status_topic, self._status("online"), retain=True)
        self.uplink.reconnected()
        self._changed()

    # reports

    def _changed(self) -> None:
        self._catalog.refresh()
        self._noted_due.set()
        self._reported_due.set()
        self._wake.set()

    def _next(self) -> tuple[int, int, float]:
        with self._number:
            self._n += 1
            return self._boot, self._n, self._clock.now()

    def _seal(self, message: msgspec.Struct, topic: str) -> bytes:
        return seal(message, topic, self.identity.signer(), with_certificate=True)

    def _status(self, state: str) -> bytes:
        boot, n, at = self._next()
        status = Status(
            boot, n, at, "online" if state == "online" else "offline", edgeward.__version__, self.outbox.epoch,
            self._inventory,
        )  # fmt: skip
        return self._seal(status, self._status_topic)

    def _note_slots(self) -> None:
        """For `edgeward agent status`: who stands at a device without a network asks there why it waits."""
        slots = self.slots.report()
        if slots == self._noted:
            return
        self._noted = slots
        try:
            self.state.set_slot_reports(slots)
        except (OSError, sqlite3.Error) as error:
            log.warning("how far the slots are is not written down: %s", error)

    def _send_reported(self) -> None:
        reported = Reported(
            *self._next(),
            self.state.generation(),
            self.slots.report(),
            conditions=[*self._applying.conditions(), *self.slots.conditions()],
            quarantined=list(self.state.quarantined()),
            holds=self.slots.holds(),
        )
        topic = topics.reported(self.name)
        self.link.publish(topic, self._seal(reported, topic), retain=True)

    def _send_report(self, seconds: float) -> None:
        sizes = self.outbox.sizes()
        acked = sum(self.outbox.lane(lane).floor for lane in LANES)
        boot, n, now = self._next()
        streams = self.streams.report()
        try:
            self.state.set_stream_reports(now, streams)
        except sqlite3.Error as error:  # `edgeward agent status` shows an older one
            log.warning("the streams' report cannot be written down: %s", error)
        report = Report(
            boot,
            n,
            now,
            seconds,
            streams,
            OutboxReport(
                sum(size.rows for size in sizes.values()),
                sum(size.bytes for size in sizes.values()),
                acked,
                sum(size.lost for size in sizes.values()),
                {lane: LaneReport(size.rows, size.bytes, size.lost) for lane, size in sizes.items()},
            ),
            psutil.Process().memory_info().rss,
        )
        topic = topics.report(self.name)
        self.link.publish(topic, self._seal(report, topic))
