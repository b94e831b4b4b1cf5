"""A trend store in one folder: its identity, its journal, its tables, and the serving loop."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from pathlib import Path

import msgspec

from edgeward.client import ControllerClient
from edgeward.clock import Clock
from edgeward.errors import Conflict, NotFound, UsageError
from edgeward.identifiers import check_name
from edgeward.mqtt import Broker
from edgeward.storage import write_atomic
from edgeward.trust.certificates import (
    StoreIdentity,
    TrustAnchor,
    load_certificate_pem,
    make_csr,
    to_der,
)
from edgeward.trust.keys import SigningIdentity, load_or_create
from edgeward.wire.enrollment import EnrollRequest, EnrollResponse
from trends.ingest import Ingest, Ingester
from trends.journal import Journal
from trends.query import Queries
from trends.tables import Tables

log = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0
FLUSH_ROWS = 20_000


def enroll(folder: Path, url: str, token: str, name: str) -> EnrollResponse:
    """Get a certificate for a trend store: token -> key pair -> request -> certificate.

    Raises Conflict when the folder is enrolled already, UsageError for a device's token.
    """
    check_name(name)
    if (folder / "enrollment.json").exists():
        raise Conflict(f"{folder} is enrolled already", hint="choose another --dir")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = load_or_create(folder / "identity.key")
    with ControllerClient(url) as client:
        answer = client.enroll(EnrollRequest(token, name, make_csr(key, name)))
    if answer.role != "store":
        raise UsageError("this token is for a device", hint="edgeward token create --role store --site SITE")
    write_atomic(folder / "identity.pem", answer.certificate.encode())
    write_atomic(folder / "enrollment.json", msgspec.json.encode(answer))
    return answer


class Store:
    """Opens what `enroll` has made. Raises NotFound when there is nothing."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "enrollment.json").exists():
            raise NotFound(f"{folder} is no trend store", hint="run `edgeward trends enroll` first")
        self.folder = folder
        self.enrollment = msgspec.json.decode((folder / "enrollment.json").read_bytes(), type=EnrollResponse)
        self.journal = Journal(folder / "journal.db")
        self.tables = Tables(folder / "tables", self.journal)
        self.queries = Queries(self.tables, self.journal)

    def close(self) -> None:
        self.journal.close()

    def serve(
        self, broker_url: str | None, clock: Clock, stop: threading.Event, ready: threading.Event
    ) -> None:
        """Ingest until `stop`; rows move to the tables every few seconds and at the end.

        Raises Conflict when another process serves this folder.
        """
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise Conflict(f"another process serves {self.folder}", hint="stop it first") from None
        try:
            certificate = load_certificate_pem((self.folder / "identity.pem").read_text())
            identity = SigningIdentity(load_or_create(self.folder / "identity.key"), to_der(certificate))
            anchor = TrustAnchor(self.enrollment.trust.ca)
            myself = anchor.verify(certificate, clock.now())
            if not isinstance(myself, StoreIdentity):
                raise UsageError(f"{self.folder} holds the identity of {myself}")
            ingest = Ingest(self.journal, anchor, myself.sites, clock)
            broker = Broker(broker_url or self.enrollment.broker)
            ingester = Ingester(ingest, self.journal, broker, identity, myself.name)
            ingester.start()
            ready.set()
            try:
                self._flush_until(stop, ingest)
            finally:
                ingester.stop()
                self.tables.flush()
                log.info("ingested: %s", dict(ingest.counts))
        finally:
            os.close(lock)

    def _flush_until(self, stop: threading.Event, ingest: Ingest) -> None:
        waited = 0.0
        while not stop.wait(0.5):
            waited += 0.5
            if waited >= FLUSH_SECONDS or self.journal.count() >= FLUSH_ROWS:
                waited = 0.0
                try:
                    moved = self.tables.flush()
                except Exception as error:  # noqa: BLE001  # a full disk must not end ingest: rows stay in the journal
                    log.error("cannot write the tables, rows stay in the journal: %s", error)
                else:
                    if moved:
                        log.info("moved %d rows to the tables; %s", moved, dict(ingest.counts))
