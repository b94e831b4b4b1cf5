"""Who a peer is: its device certificate, and nothing that it says."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from pathlib import Path

from edgeward.errors import TrustError
from edgeward.identifiers import DeviceName
from edgeward.storage import write_atomic
from edgeward.trust.certificates import DeviceIdentity, TrustAnchor, load_certificate_der, to_pem
from edgeward.trust.keys import SigningIdentity
from edgeward.trust.tls import device_context


class Credentials:
    """This device's side of TLS with its peers; follows renewals of the certificate."""

    def __init__(
        self,
        folder: Path,
        name: DeviceName,
        ca_pem: str,
        signer: Callable[[], SigningIdentity],
        now: Callable[[], float],
    ) -> None:
        """`folder` holds `identity.key` and gets `peer.crt`; `now` in seconds since 1970."""
        self.name = name
        self._ca = ca_pem
        self._anchor = TrustAnchor(ca_pem)
        self._signer = signer
        self._now = now
        self._key = folder / "identity.key"
        self._certificate = folder / "peer.crt"
        self._written = b""
        self._lock = threading.Lock()

    def whose(self, der: bytes) -> str:
        """The device's name. Raises TrustError unless it is a device of this site, by a certificate of today."""
        if not der:
            raise TrustError("the peer has shown no certificate")
        identity = self._anchor.verify(load_certificate_der(der), self._now())
        if not isinstance(identity, DeviceIdentity):
            raise TrustError(f"{identity} is no device")
        if identity.name.site != self.name.site:
            raise TrustError(f"{identity} is of another site than {self.name.site}")
        return identity.name.device

    def context(self, *, server: bool, expected: str = "") -> ssl.SSLContext:
        """For one connection; to `expected` only, if given."""

        def check(der: bytes) -> None:
            try:
                name = self.whose(der)
                if expected and name != expected:
                    raise TrustError(f"{name} is where {expected} was")
            except TrustError as error:
                raise ssl.SSLCertVerificationError(error.message) from None

        with self._lock:
            own = self._signer().certificate_der
            if own != self._written:
                write_atomic(self._certificate, to_pem(load_certificate_der(own)).encode())
                self._written = own
        return device_context(check, self._ca, self._certificate, self._key, server=server)
