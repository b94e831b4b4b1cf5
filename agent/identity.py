"""The device's identity: enrolment, and renewal without anybody on site."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import msgspec

from edgeward.client import ControllerClient
from edgeward.client.controller import DeviceClient
from edgeward.client.transport import Transport
from edgeward.clock import Clock
from edgeward.errors import Conflict, EdgewardError, NotFound, TrustError, UsageError
from edgeward.identifiers import DeviceName, check_name
from edgeward.storage import write_atomic
from edgeward.trust import tokens
from edgeward.trust.certificates import DeviceIdentity, TrustAnchor, load_certificate_pem, make_csr, to_der
from edgeward.trust.keys import SigningIdentity, load_or_create
from edgeward.wire.enrollment import EnrollRequest, EnrollResponse, RenewRequest

log = logging.getLogger(__name__)

_URL = "controller.url"
_ENROLLMENT = "enrollment.json"


def enroll(folder: Path, url: str, token: str, name: str, labels: dict[str, str]) -> EnrollResponse:
    """Token -> key pair -> request -> certificate. The key never leaves the folder.

    Raises Conflict when the folder is enrolled already, UsageError for a trend store's token.
    """
    check_name(name)
    if (folder / _ENROLLMENT).exists():
        raise Conflict(f"{folder} is enrolled already", hint="choose another --dir")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = load_or_create(folder / "identity.key")
    with ControllerClient(url) as client:
        answer = client.enroll(EnrollRequest(token, name, make_csr(key, name), labels))
    if answer.role != "device":
        raise UsageError("this token is for a trend store", hint="edgeward token create --site SITE")
    write_atomic(folder / _URL, url.encode())
    _keep(folder, answer)
    return answer


def _keep(folder: Path, answer: EnrollResponse) -> None:
    write_atomic(folder / _ENROLLMENT, msgspec.json.encode(answer))


class Identity:
    """What `enroll` has made, kept fresh. Raises NotFound when there is nothing, TrustError when it is unsound."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        path = folder / _ENROLLMENT
        if not path.exists():
            raise NotFound(f"{folder} is not enrolled", hint="run `edgeward agent enroll` first")
        self._folder = folder
        self._clock = clock
        self._key = load_or_create(folder / "identity.key")
        self.enrollment = msgspec.json.decode(path.read_bytes(), type=EnrollResponse)
        self.url = (folder / _URL).read_text()
        self.anchor = TrustAnchor(self.enrollment.trust.ca)
        certificate = load_certificate_pem(self.enrollment.certificate)
        self._signer = SigningIdentity(self._key, to_der(certificate))
        uri_name = self.enrollment.name
        self.name = DeviceName(self.enrollment.sites[0], uri_name)
        self.transport = Transport(self.url, credential=lambda: tokens.mint(self._signer, clock.now()))
        self.client = DeviceClient(self.transport)

    def signer(self) -> SigningIdentity:
        return self._signer

    def renew_if_due(self) -> bool:
        """Ask for a new certificate after two thirds of the old one's life; True when there is one."""
        if self._clock.now() < self.enrollment.renew_after:
            return False
        answer = self.client.renew(RenewRequest(make_csr(self._key, self.name.device)))
        certificate = load_certificate_pem(answer.certificate)
        if self.anchor.verify(certificate, self._clock.now()) != DeviceIdentity(self.name):
            raise TrustError("the renewed certificate is somebody else's")
        _keep(self._folder, answer)
        self.enrollment = answer
        self._signer = SigningIdentity(self._key, to_der(certificate))
        return True

    def keep_fresh(self, stop: threading.Event, renewed: threading.Event) -> None:
        """Renew in the background until `stop`."""
        while not stop.wait(60.0):
            try:
                if self.renew_if_due():
                    log.info("certificate renewed")
                    renewed.set()
            except EdgewardError as error:
                log.warning("certificate not renewed yet: %s", error)
