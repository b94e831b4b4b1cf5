"""The device's identity: enrolment, and renewal without anybody on site."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
from cryptography import x509

from agent.trusted_clock import TrustedClock
from edgeward.client import ControllerClient
from edgeward.client.controller import DeviceClient
from edgeward.client.transport import Transport
from edgeward.errors import Conflict, EdgewardError, NotFound, TrustError, Unavailable, UsageError
from edgeward.identifiers import DeviceName, check_name
from edgeward.storage import write_atomic
from edgeward.trust import dsse, tokens
from edgeward.trust.certificates import DeviceIdentity, TrustAnchor, load_certificate_pem, make_csr, to_der
from edgeward.trust.keys import SigningIdentity, load_or_create
from edgeward.trust.tls import PeerTime
from edgeward.wire.enrollment import EnrollPending, EnrollRequest, EnrollResponse, RenewRequest
from edgeward.wire.signed_time import PAYLOAD_TYPE, SignedTime

log = logging.getLogger(__name__)

LOOK_EVERY = 60.0

_URL = "controller.url"
_ENROLLMENT = "enrollment.json"


def enroll(
    folder: Path,
    url: str,
    token: str,
    name: str,
    labels: dict[str, str],
    *,
    wait: Callable[[EnrollPending], None] | None = None,
) -> EnrollResponse:
    """Token -> key pair -> request -> certificate. The key never leaves the folder.

    `wait` is called before each further question while a person must approve; when it is ended there, the
    same call goes on later. Raises Conflict when the folder is enrolled already, UsageError for a trend
    store's token, Forbidden when the token does not hold or the request was denied, Unavailable when a
    person must approve and there is no `wait`.
    """
    check_name(name)
    if (folder / _ENROLLMENT).exists():
        raise Conflict(f"{folder} is enrolled already", hint="choose another --dir")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = load_or_create(folder / "identity.key")
    with ControllerClient(url) as client:
        request = EnrollRequest(token, name, make_csr(key, name), labels)
        answer = client.enroll(request)
        while isinstance(answer, EnrollPending):
            if wait is None:
                raise Unavailable(f"{name} waits for approval", hint=f"edgeward device approve {name}")
            wait(answer)
            # A link that breaks meanwhile is no reason to begin anew: the token is spent.
            with contextlib.suppress(Unavailable):
                answer = client.enroll(request)
    if answer.role != "device":
        raise UsageError("this token is for a trend store", hint="edgeward token create --site SITE")
    write_atomic(folder / _URL, url.encode())
    _keep(folder, answer)
    return answer


def _keep(folder: Path, answer: EnrollResponse) -> None:
    write_atomic(folder / _ENROLLMENT, msgspec.json.encode(answer))


def require_enrolled(folder: Path) -> None:
    """Raises NotFound when `enroll` has not been here."""
    if not (folder / _ENROLLMENT).exists():
        raise NotFound(f"{folder} is not enrolled", hint="run `edgeward agent enroll` first")


class Identity:
    """What `enroll` has made, kept fresh. Raises NotFound when there is nothing, TrustError when it is unsound."""

    def __init__(self, folder: Path, clock: TrustedClock) -> None:
        require_enrolled(folder)
        self._folder = folder
        self._clock = clock
        self._key = load_or_create(folder / "identity.key")
        self.enrollment = msgspec.json.decode((folder / _ENROLLMENT).read_bytes(), type=EnrollResponse)
        self.url = (folder / _URL).read_text()
        self.anchor = TrustAnchor(self.enrollment.trust.ca)
        certificate = load_certificate_pem(self.enrollment.certificate)
        self._learn_from(certificate)
        self._signer = SigningIdentity(self._key, to_der(certificate))
        uri_name = self.enrollment.name
        self.name = DeviceName(self.enrollment.sites[0], uri_name)
        self.peer_time = PeerTime(clock.now, clock.wrong)
        self.transport = Transport(
            self.url, credential=lambda: tokens.mint(self._signer, clock.now()), peer_time=self.peer_time
        )
        self.client = DeviceClient(self.transport)
        # Without credential, and without a look at dates: a clock that is wrong and does not know it yet
        # could not ask otherwise. The answer is signed.
        self._time = DeviceClient(Transport(self.url, peer_time=PeerTime(None)))

    def signer(self) -> SigningIdentity:
        return self._signer

    def renew_if_due(self) -> bool:
        """Ask for a new certificate after two thirds of the old one's life; True when there is one."""
        if self._clock.now() < self.enrollment.renew_after:
            return False
        answer = self.client.renew(RenewRequest(make_csr(self._key, self.name.device)))
        certificate = load_certificate_pem(answer.certificate)
        self._learn_from(certificate)
        if self.anchor.verify(certificate, self._clock.now()) != DeviceIdentity(self.name):
            raise TrustError("the renewed certificate is somebody else's")
        _keep(self._folder, answer)
        self.enrollment = answer
        self._signer = SigningIdentity(self._key, to_der(certificate))
        return True

    def _learn_from(self, certificate: x509.Certificate) -> None:
        """The CA issued it: its beginning has passed. Raises TrustError when it did not."""
        begins = certificate.not_valid_before_utc.timestamp()
        self.anchor.verify(certificate, begins)
        self._clock.learn(begins)

    def ask_time(self) -> None:
        """Ask the controller for its signed time.

        Raises Unavailable, NotFound for a controller that has no answer yet, TrustError for a forged or
        recorded one.
        """
        nonce, asked = secrets.token_hex(16), self._clock.monotonic()
        raw = self._time.time(nonce)
        signed = dsse.verify(raw, PAYLOAD_TYPE, self.enrollment.trust.desired_keys, SignedTime)
        if signed.nonce != nonce:
            raise TrustError("the signed time answers another question")
        self._clock.answered(signed.at, asked)

    def keep_fresh(self, stop: threading.Event, renewed: threading.Event) -> None:
        """In the background until `stop`: know the time, which everything else hangs on, and renew."""
        while True:
            try:
                self._clock.keep()
                if self._clock.should_ask():
                    self.ask_time()
            except (Unavailable, NotFound) as error:
                log.debug("the time is not confirmed yet: %s", error)
            except EdgewardError as error:
                log.warning("the time is not confirmed: %s", error)
            try:
                if self.renew_if_due():
                    log.info("certificate renewed")
                    renewed.set()
            except EdgewardError as error:
                log.warning("certificate not renewed yet: %s", error)
            if stop.wait(LOOK_EVERY):
                return
