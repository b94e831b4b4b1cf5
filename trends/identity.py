"""The trend store's identity: enrolment, and renewal without anybody on site."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edgeward.client import ControllerClient
from edgeward.client.controller import DeviceClient
from edgeward.client.transport import Transport
from edgeward.clock import Clock
from edgeward.errors import Conflict, EdgewardError, NotFound, TrustError, UsageError
from edgeward.identifiers import check_name
from edgeward.storage import write_atomic
from edgeward.trust import dsse, tokens
from edgeward.trust.certificates import (
    StoreIdentity,
    TrustAnchor,
    load_certificate_pem,
    make_csr,
    to_der,
)
from edgeward.trust.keys import SigningIdentity, load_or_create
from edgeward.wire.denied import PAYLOAD_TYPE, Denied
from edgeward.wire.enrollment import EnrollPending, EnrollRequest, EnrollResponse, RenewRequest
from edgeward.wire.residency import MAX_DECISIONS, Decisions, ResidencyPolicy
from edgeward.wire.residency import PAYLOAD_TYPE as RESIDENCY_TYPE
from trends.ledger import Ledger

log = logging.getLogger(__name__)

_ENROLLMENT = "enrollment.json"
_KEY = "identity.key"
_URL = "controller.url"
_DENIED = "denied.json"
_RESIDENCY = "residency.json"
_LOOK_EVERY = 30.0


def enroll(folder: Path, url: str, token: str, name: str) -> EnrollResponse:
    """Get a certificate for a trend store: token -> key pair -> request -> certificate.

    Raises Conflict when the folder is enrolled already, UsageError for a device's token.
    """
    check_name(name)
    if (folder / _ENROLLMENT).exists():
        raise Conflict(f"{folder} is enrolled already", hint="choose another --dir")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = load_or_create(folder / _KEY)
    with ControllerClient(url) as client:
        answer = client.enroll(EnrollRequest(token, name, make_csr(key, name)))
    if isinstance(answer, EnrollPending) or answer.role != "store":
        raise UsageError("this token is for a device", hint="edgeward token create --role store --site SITE")
    write_atomic(folder / _URL, url.encode())
    _keep(folder, answer)
    return answer


def _keep(folder: Path, answer: EnrollResponse) -> None:
    """One file, so that a kill in between cannot leave a certificate beside another's dates."""
    write_atomic(folder / _ENROLLMENT, msgspec.json.encode(answer))


def read_enrollment(folder: Path) -> EnrollResponse:
    """Raises NotFound when there is none."""
    try:
        content = (folder / _ENROLLMENT).read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{folder} is no trend store", hint="run `edgeward trends enroll` first") from None
    return msgspec.json.decode(content, type=EnrollResponse)


class Identity:
    """What `enroll` has made, kept fresh. Raises NotFound without one, TrustError when it is unsound."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock
        self._key = load_or_create(folder / _KEY)
        self.enrollment = read_enrollment(folder)
        self.anchor = TrustAnchor(self.enrollment.trust.ca)
        # One that has ended meanwhile is as good: `keep_fresh` renews it.
        begins = load_certificate_pem(self.enrollment.certificate).not_valid_before_utc.timestamp()
        self.store = self._check(self.enrollment.certificate, begins)
        self.signer = self._signer(self.enrollment.certificate)
        self._denied = self._read_denied()
        self._residency = self._read_residency()

    @property
    def denied(self) -> frozenset[str]:
        """Key ids on the newest deny-list that is known here."""
        return frozenset(self._denied.keyids)

    @property
    def residency(self) -> ResidencyPolicy | None:
        """The newest policy that is known here, expired or not; None when there was never one."""
        return self._residency

    def _read_residency(self) -> ResidencyPolicy | None:
        try:
            return self._verify_residency((self._folder / _RESIDENCY).read_bytes())
        except FileNotFoundError:
            return None

    def _verify_residency(self, signed: bytes) -> ResidencyPolicy:
        keys = self.enrollment.trust.desired_keys
        return dsse.verify(signed, RESIDENCY_TYPE, keys, ResidencyPolicy)

    def learn_residency(self) -> bool:
        """Ask for what may leave the sites; True when that has changed. An older policy than that known is
        refused, and so is one that has expired."""
        with self._client() as client:
            signed = client.residency()
        policy, known = self._verify_residency(signed), self._residency
        if known is not None and policy.issued_at < known.issued_at:
            raise TrustError("the residency policy is older than the one that is known")
        if policy.expires_at <= self._clock.now():
            raise TrustError("the residency policy has expired already")
        # Kept whenever it is newer, since it expires.
        write_atomic(self._folder / _RESIDENCY, signed)
        self._residency = policy
        return known is None or known.sites != policy.sites

    def report_decisions(self, ledger: Ledger) -> bool:
        """Tell the controller what was decided since the last time; whether there was anything."""
        waiting = ledger.decisions(ledger.reported, MAX_DECISIONS)
        if not waiting:
            return False
        with self._client() as client:
            client.report_decisions(Decisions(waiting))
        ledger.set_reported(waiting[-1].number)
        return True

    def _verify_denied(self, signed: bytes) -> Denied:
        return dsse.verify(signed, PAYLOAD_TYPE, self.enrollment.trust.desired_keys, Denied)

    def _read_denied(self) -> Denied:
        try:
            return self._verify_denied((self._folder / _DENIED).read_bytes())
        except FileNotFoundError:
            return Denied(0.0, [])

    def learn_denied(self) -> bool:
        """Ask for the deny-list; True when it has changed. An older one than that known is refused."""
        with self._client() as client:
            signed = client.denied()
        denied = self._verify_denied(signed)
        if denied.issued_at < self._denied.issued_at:
            raise TrustError("the deny-list is older than the one that is known")
        changed = denied.keyids != self._denied.keyids
        self._denied = denied
        if changed or not (self._folder / _DENIED).exists():
            write_atomic(self._folder / _DENIED, signed)
        return changed

    @contextmanager
    def _client(self) -> Iterator[DeviceClient]:
        url = self._folder / _URL
        if not url.exists():
            raise NotFound(f"{url}: the controller's address is not known", hint="write it into that file")
        transport = Transport(
            url.read_text().strip(), credential=lambda: tokens.mint(self.signer, self._clock.now())
        )
        try:
            yield DeviceClient(transport)
        finally:
            transport.close()

    def _check(self, pem: str, now: float) -> StoreIdentity:
        found = self.anchor.verify(load_certificate_pem(pem), now)
        if not isinstance(found, StoreIdentity):
            raise TrustError(f"{self._folder} holds the identity of {found}, not of a trend store")
        return found

    def _signer(self, pem: str) -> SigningIdentity:
        return SigningIdentity(self._key, to_der(load_certificate_pem(pem)))

    def renew_if_due(self) -> bool:
        """Ask for a new certificate after two thirds of the old one's life; True when there is one."""
        if self._clock.now() < self.enrollment.renew_after:
            return False
        with self._client() as client:
            answer = client.renew(RenewRequest(make_csr(self._key, self.store.name)))
        if self._check(answer.certificate, self._clock.now()) != self.store:
            raise TrustError("the renewed certificate is somebody else's")
        _keep(self._folder, answer)
        self.enrollment = answer
        self.signer = self._signer(answer.certificate)
        return True

    def keep_fresh(
        self,
        stop: threading.Event,
        changed: Callable[[Identity], None],
        also: tuple[tuple[str, Callable[[], bool]], ...] = (),
    ) -> None:
        """In the background until `stop`: renew, since agents refuse acks under a certificate that has
        ended, learn the deny-list, and what `also` names. `changed` is called after each.
        """
        while True:
            for what, renew in (
                ("the certificate", self.renew_if_due),
                ("the deny-list", self.learn_denied),
                *also,
            ):
                try:
                    if renew():
                        log.info("%s is new", what)
                        changed(self)
                except EdgewardError as error:
                    log.warning("%s is not renewed yet: %s", what, error)
            if stop.wait(_LOOK_EVERY):
                return
