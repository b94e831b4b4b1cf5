"""TLS on a machine whose clock may be wrong.

OpenSSL judges certificates by the machine's clock, and Python cannot tell it another time. A board that
boots in 1970 would reach neither controller nor broker, not even to ask for the time.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: X509_V_FLAG_NO_CHECK_TIME (openssl/x509_vfy.h, since 1.1.0); the ssl module has no name for it.
_NO_CHECK_TIME = 0x200000


@dataclass(frozen=True)
class PeerTime:
    """By which time peers' certificates are judged.

    While `wrong()` says that the machine's clock is not to be gone by, OpenSSL checks no dates: then those of
    the peer's own certificate are held against `now()` (seconds since 1970), those of intermediate ones
    against nothing. `now` None leaves dates out always: for questions whose answer is signed.
    """

    now: Callable[[], float] | None
    wrong: Callable[[], bool] = lambda: True


class _Socket(ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        assert isinstance(self.context, _Context)
        self.context.check_dates(self.getpeercert())


class _Context(ssl.SSLContext):
    sslsocket_class = _Socket
    time: PeerTime

    def wrap_socket(self, *args: Any, **more: Any) -> ssl.SSLSocket:
        # Each connection takes over the flags of the moment when it is made.
        flags = int(self.verify_flags) & ~_NO_CHECK_TIME
        self.verify_flags = ssl.VerifyFlags(flags | (_NO_CHECK_TIME if self.time.wrong() else 0))
        return super().wrap_socket(*args, **more)

    def check_dates(self, peer: Any) -> None:
        """Raises SSLCertVerificationError."""
        if self.time.now is None:
            return
        begins, ends = (ssl.cert_time_to_seconds(peer[name]) for name in ("notBefore", "notAfter"))
        if not begins <= self.time.now() <= ends:
            raise ssl.SSLCertVerificationError(
                f"the peer's certificate is for {peer['notBefore']} to {peer['notAfter']}, not for now"
            )


def client_context(
    time: PeerTime, *, ca_file: Path | None = None, roots: list[bytes] | None = None
) -> ssl.SSLContext:
    """For a client that verifies chain and host name as usual, and dates by `time`.

    Trusted are the certificates in `ca_file` or `roots` (DER), by default the system's.
    """
    context = _Context(ssl.PROTOCOL_TLS_CLIENT)
    context.time = time
    if ca_file is not None:
        context.load_verify_locations(cafile=str(ca_file))
    elif roots is not None:
        context.load_verify_locations(cadata=b"".join(roots))
    else:
        context.load_default_certs()
    return context


class _DeviceSocket(ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        assert isinstance(self.context, _DeviceContext)
        self.context.check(self.getpeercert(binary_form=True) or b"")


class _DeviceContext(ssl.SSLContext):
    sslsocket_class = _DeviceSocket
    check: Callable[[bytes], None]


def device_context(
    check: Callable[[bytes], None], ca_pem: str, certificate_file: Path, key_file: Path, *, server: bool
) -> ssl.SSLContext:
    """TLS 1.3 between two devices, each with its client certificate, at either end.

    `check` gets the other's certificate (DER; empty without one) when the handshake has proved that it has the
    key, before any byte goes on, and is all that decides: it raises ssl.SSLCertVerificationError. OpenSSL
    cannot decide: a device's certificate is for clients only and names no host, and dates are not its to judge.
    """
    context = _DeviceContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check = check
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    if server:
        # Without this a client is not asked for its certificate.
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags = ssl.VerifyFlags(int(context.verify_flags) | _NO_CHECK_TIME)
        context.load_verify_locations(cadata=ca_pem)
        context.num_tickets = 0
    else:
        context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(certificate_file, key_file)
    return context
