"""A trend store in one folder: its journal, its tables, and the serving loop."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from pathlib import Path

from edgeward.clock import Clock
from edgeward.errors import Conflict, Unavailable
from edgeward.mqtt import Broker
from trends.databases import Postgres
from trends.identity import Identity, read_enrollment
from trends.ingest import Ingest, Ingester
from trends.journal import Journal
from trends.ledger import Ledger
from trends.places import place_of, read_remembered
from trends.queries.engine import Engine
from trends.query import Queries
from trends.quota import Quota
from trends.read_back import ReadBack
from trends.sender import Forward, Sender
from trends.tables import Place, Tables
from trends.upkeep import Retention, Upkeep

log = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0
FLUSH_ROWS = 20_000
UPKEEP_SECONDS = 3600.0


class Store:
    """Opens what `enroll` has made. Raises NotFound when there is nothing."""

    def __init__(self, folder: Path, *, journal: str = "", place: Place | None = None) -> None:
        """`journal` is the address of a PostgreSQL database that several ingesters share; empty: a file here.
        `place` is where the tables lie; None: where they have been.

        Raises UsageError, Unavailable, MissingDependency for a journal or a place that cannot be used.
        """
        self.folder = folder
        self.enrollment = read_enrollment(folder)
        self._shared = bool(journal)
        self._journal_url = journal
        self._checked = self._repaired = False
        self._served_from_here = read_remembered(folder) is not None
        place = place or place_of(folder, os.environ)
        self.journal = Journal(Postgres(journal) if journal else folder / "journal.db")
        self.tables = Tables(place, self.journal)
        self.queries = Queries(self.tables, self.journal)
        self.engine = Engine(self.tables, self.journal)

    def close(self) -> None:
        self.journal.close()

    def serve(
        self,
        broker_url: str | None,
        clock: Clock,
        stop: threading.Event,
        ready: threading.Event,
        retention: Retention | None = None,
        quota: Quota | None = None,
        forward: Forward | None = None,
        central: bool = False,
    ) -> None:
        """Ingest until `stop`; rows move to the tables every few seconds and at the end.

        `forward` says where to what the sites' policy allows goes, `central` that other stores may forward to
        this one.

        Raises Conflict when another process serves this folder, EdgewardError for a table that a power cut
        has left as only a person can decide, and for a place that is not fit for tables. One that was and is
        away now is waited for: rows stay in the journal.
        """
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise Conflict(f"another process serves {self.folder}", hint="stop it first") from None
        try:
            try:
                self._prepare()
            except Unavailable as error:
                if not self._served_from_here:
                    raise
                log.error("rows stay in the journal: %s", error)
            identity = Identity(self.folder, clock)
            ingest = Ingest(
                self.journal, identity.anchor, identity.store.sites, clock, quota, central=central
            )
            ingest.denied = identity.denied
            broker = Broker(broker_url or self.enrollment.broker)
            ingester = Ingester(
                ingest,
                self.journal,
                broker,
                identity.signer,
                identity.store.name,
                share=f"edgeward-{self.journal.identity}" if self._shared else "",
                central=central,
            )
            sender = self._sender(forward, identity, clock) if forward is not None else None

            def changed(fresh: Identity) -> None:
                ingester.sign_as(fresh.signer)
                ingest.denied = fresh.denied
                if sender is not None:
                    sender.changed(fresh)

            ingester.start()
            ready.set()
            try:
                if sender is not None:
                    sender.start()
                also = sender.chores(identity) if sender is not None else ()
                threading.Thread(
                    target=identity.keep_fresh, args=(stop, changed, also), name="renewal", daemon=True
                ).start()
                self._flush_until(
                    stop, ingest, Upkeep(self.tables, retention or Retention(), scratch=self.folder), clock
                )
            finally:
                if sender is not None:
                    sender.stop()
                ingester.stop()
                if self.journal.leads():
                    self._flush(ingest)
                log.info("ingested: %s", dict(ingest.counts))
        finally:
            os.close(lock)

    @property
    def forwards(self) -> bool:
        """Whether anything was ever forwarded from here."""
        return self._shared or (self.folder / "forward.db").exists()

    def ledger(self, clock: Clock) -> Ledger:
        """What is known about forwarding, where the journal is."""
        database = Postgres(self._journal_url) if self._shared else self.folder / "forward.db"
        return Ledger(database, clock.now())

    def _sender(self, forward: Forward, identity: Identity, clock: Clock) -> Sender:
        return Sender(
            forward, ReadBack(self.tables, self.journal), self.journal, self.ledger(clock), identity, clock
        )

    def _flush_until(self, stop: threading.Event, ingest: Ingest, upkeep: Upkeep, clock: Clock) -> None:
        waited, kept_up = 0.0, clock.monotonic() - UPKEEP_SECONDS
        while not stop.wait(0.5):
            waited += 0.5
            if not self.journal.leads():
                self._repaired = False
                continue
            if waited >= FLUSH_SECONDS or self.journal.count() >= FLUSH_ROWS:
                waited = 0.0
                self._flush(ingest)
            if clock.monotonic() - kept_up >= UPKEEP_SECONDS:
                kept_up = clock.monotonic()
                try:
                    upkeep.run(clock.now())
                except Exception as error:  # noqa: BLE001  # nor must this: it is tried again within the hour
                    log.error("cannot keep the tables up: %s", error)

    def _prepare(self) -> None:
        """Before the first write, and again when another ingester has led since."""
        if not self._checked:
            self.tables.check()
            self._checked = True
        if not self._repaired and self.journal.leads():
            self.tables.repair()
            self._repaired = True

    def _flush(self, ingest: Ingest) -> None:
        try:
            self._prepare()
            moved = self.tables.flush()
        except Exception as error:  # noqa: BLE001  # a full disk must not end ingest: rows stay in the journal
            log.error("cannot write the tables, rows stay in the journal: %s", error)
        else:
            if moved:
                log.info("moved %d rows to the tables; %s", moved, dict(ingest.counts))
