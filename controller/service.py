"""The controller, put together from its parts."""

from __future__ import annotations

import fcntl
import logging
import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import msgspec
from sqlmodel import Session

from controller import residency
from controller.artifacts import Artifacts, FolderArtifacts
from controller.changes import Changes
from controller.deltas import Deltas
from controller.downloads import Limits
from controller.identity import RENEWAL_GRACE, Authority
from controller.ingest import Ingest
from controller.reconcile import Reconciler
from controller.releases import Releases
from controller.store import records, resources
from controller.store.database import Store
from controller.store.tables import ApiTokenRow, ReleaseRow
from edgeward.clock import Clock, SystemClock
from edgeward.errors import Conflict, EdgewardError, NotFound, TrustError
from edgeward.identifiers import DeviceName
from edgeward.mqtt import Broker, Link, Message
from edgeward.storage import sha256_hex, write_atomic
from edgeward.trust import dsse
from edgeward.trust.certificates import StoreIdentity
from edgeward.trust.keys import load_or_create, public_pem
from edgeward.wire import topics
from edgeward.wire.denied import PAYLOAD_TYPE, Denied
from edgeward.wire.denied import encode as encode_denied
from edgeward.wire.package import Manifest, decode_manifest
from edgeward.wire.residency import PAYLOAD_TYPE as RESIDENCY_TYPE
from edgeward.wire.residency import encode as encode_residency
from edgeward.wire.resources import model_version_name
from edgeward.wire.signed_time import PAYLOAD_TYPE as TIME_TYPE
from edgeward.wire.signed_time import SignedTime, check_nonce
from edgeward.wire.signed_time import encode as encode_time

if TYPE_CHECKING:
    from edgeward.object_store import S3Settings

log = logging.getLogger(__name__)

API_TOKEN_PREFIX = "edgeward-api-"  # noqa: S105  (a prefix, so that a leaked token can be recognised)


@dataclass(frozen=True)
class Settings:
    """`broker` is where this controller connects; devices are told the same address.

    With `broker_on_this_host` they are told the host name by which they reached the controller.
    `downloads` limits who fetches artifacts.
    `renewal_grace`: see `controller.identity.Authority`, in seconds.
    `s3` is the bucket for artifacts; without one they lie in the data folder.
    """

    data: Path
    broker: str
    database: str = ""
    broker_on_this_host: bool = False
    downloads: Limits = field(default_factory=Limits)
    renewal_grace: float = RENEWAL_GRACE
    s3: S3Settings | None = None


class Controller:
    """Everything that runs, and what the API works on. `start` and `stop` once each."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self.settings = settings
        self.clock: Clock = clock or SystemClock()
        data = settings.data
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _lock(data)
        self.stopping = threading.Event()
        self.changes = Changes(int(self.clock.now() * 1000))
        self.store = Store(settings.database or f"sqlite:///{data / 'controller.db'}")
        self.artifacts = _artifacts(settings, self.clock)
        self.deltas = Deltas(data / "deltas", self.artifacts)
        self.releases = Releases(data / "tuf", data / "keys", self.artifacts, self.clock)
        self._desired_key = load_or_create(data / "keys" / "desired.pem")
        self.desired_keys = [public_pem(self._desired_key.public_key())]
        self.session_secret = _secret(data / "keys" / "session")
        self.authority = Authority(
            data,
            self.store,
            self.clock,
            desired_keys=self.desired_keys,
            tuf_root=self.releases.root_text,
            renewal_grace=settings.renewal_grace,
        )
        self.reconciler = Reconciler(
            self.store, self.releases, self._desired_key, self.clock, self.changes, self._publish_retained
        )
        self.ingest = Ingest(self.store, self.authority, self.clock, self.changes, self.reconciler.republish)
        self.link = Link(
            Broker(settings.broker),
            f"edgeward-controller-{secrets.token_hex(4)}",
            subscriptions=(topics.ALL_STATUS, topics.ALL_REPORTED, topics.ALL_REPORT),
            on_message=self._received,
            on_connect=self.reconciler.republish_all,
            max_reconnect_delay=5.0,
        )
        self._adopt_releases()

    def start(self) -> None:
        self.reconciler.start()
        self.link.start()

    def stop(self) -> None:
        self.stopping.set()
        self.link.stop()
        self.reconciler.stop()
        self.deltas.stop()
        self.store.close()
        self._lock.close()

    # MQTT

    def _received(self, message: Message) -> None:
        try:
            self.ingest.accept(message.topic, message.payload)
        except EdgewardError as error:
            log.warning("refused a message on %s: %s", message.topic[:200], error)

    def _publish_retained(self, topic: str, payload: bytes) -> None:
        self.link.publish(topic, payload, retain=True)

    def forget(self, name: DeviceName) -> None:
        """Take a deleted device's desired state off the broker."""
        self._publish_retained(topics.desired(name), b"")
        self.changes.bump()

    def broker_for(self, host: str) -> str:
        """The broker's address for someone who reached the controller as `host`."""
        url = self.settings.broker
        if not self.settings.broker_on_this_host or not host:
            return url
        _, port, _ = Broker(url).endpoint()
        return f"mqtt://{f'[{host}]' if ':' in host else host}:{port}"

    def signed_denied(self) -> bytes:
        """The deny-list of now, for those who check signatures without asking here each time."""
        denied = Denied(self.clock.now(), self.authority.denied())
        return dsse.sign(encode_denied(denied), PAYLOAD_TYPE, self._desired_key)

    def signed_residency(self, store: StoreIdentity) -> bytes:
        """What may leave the store's sites from now on."""
        with self.store.reading() as session:
            policy = residency.policy_for(session, store, self.clock.now())
        return dsse.sign(encode_residency(policy), RESIDENCY_TYPE, self._desired_key)

    def signed_time(self, nonce: str) -> bytes:
        """What time it is, for whoever asked with `nonce`. Raises InvalidDocument."""
        now = SignedTime(check_nonce(nonce), self.clock.now())
        return dsse.sign(encode_time(now), TIME_TYPE, self._desired_key)

    # tokens

    def ensure_admin_token(self) -> Path:
        """`admin.token` in the data folder, made with the first start; a lost one is made anew."""
        path = self.settings.data / "admin.token"
        if not path.exists():
            write_atomic(path, f"{new_api_token()}\n".encode(), mode=0o600)
        digest = sha256_hex(path.read_text().strip().encode())
        with self.store.writing() as session:
            if records.api_token(session, digest) is None:
                records.drop_api_token(session, "admin")
                session.add(
                    ApiTokenRow(digest=digest, name="admin", role="admin", created_at=self.clock.now())
                )
        return path

    # releases

    def publish_release(self, targets: bytes, manifest: bytes, who: str) -> tuple[Manifest, str]:
        """Accept a release and make its resources. See Releases.publish for what it raises."""
        version, parsed, digest = self.releases.publish(targets, manifest)
        now = self.clock.now()
        with self.store.writing() as session:
            _make_resources(session, parsed, digest, now)
            session.add(
                ReleaseRow(
                    targets_version=version,
                    model=parsed.model,
                    version=parsed.version,
                    digest=digest,
                    published_at=now,
                    published_by=who,
                )
            )
            name = model_version_name(parsed.model, parsed.version)
            records.audit(session, now, who, "publish", "ModelVersion", name, f"digest {digest}")
        self.changes.bump()
        return parsed, digest

    def _adopt_releases(self) -> None:
        """Make resources for signed targets that lack them: a crash came between metadata and database.

        Raises NotFound when their manifests are gone.
        """
        if not self.releases.root_text():
            return
        for path, target in self.releases.targets().targets.items():
            try:
                digest, data = self.releases.manifest(target)
            except NotFound:
                raise NotFound(
                    f"the manifest of {path} is not among the artifacts",
                    hint="copy what the earlier artifact store had to this one: docs/delivery.md, Moving",
                ) from None
            with self.store.writing() as session:
                _make_resources(session, decode_manifest(data, source=path), digest, self.clock.now())


def _artifacts(settings: Settings, clock: Clock) -> Artifacts:
    """Raises Unavailable or EdgewardError when the bucket is not fit for it."""
    if settings.s3 is None:
        return FolderArtifacts(settings.data / "artifacts")
    # obstore is in an extra of its own.
    from controller.artifacts.probe import probe
    from controller.artifacts.s3 import S3Artifacts

    made = S3Artifacts(settings.s3, settings.data / "artifacts-s3", clock)
    probe(made)
    made.remove_left()
    return made


def new_api_token() -> str:
    return API_TOKEN_PREFIX + secrets.token_urlsafe(32)


def _make_resources(session: Session, manifest: Manifest, digest: str, now: float) -> None:
    if resources.get(session, "Model", manifest.model) is None:
        resources.insert(session, "Model", manifest.model, {"description": manifest.description}, now)
    name = model_version_name(manifest.model, manifest.version)
    if resources.get(session, "ModelVersion", name) is None:
        spec = {
            "model": manifest.model,
            "version": manifest.version,
            "digest": digest,
            "manifest": msgspec.to_builtins(manifest),
        }
        resources.insert(session, "ModelVersion", name, spec, now, labels={"model": manifest.model})


def _lock(data: Path) -> TextIO:
    """One controller per data folder. Raises Conflict when another one runs on it."""
    file = (data / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise Conflict(
            f"another controller runs on {data}", hint="stop it, or pass another --data folder"
        ) from None
    return file


def _secret(path: Path) -> bytes:
    """32 random bytes that stay the same over restarts (mode 0600)."""
    if not path.exists():
        write_atomic(path, secrets.token_bytes(32), mode=0o600)
    if path.stat().st_mode & 0o077:
        raise TrustError(f"{path}: others may read this secret", hint=f"chmod 600 {path}")
    return path.read_bytes()
