"""The edge certificate authority's certificates: who a device or a trend store is.

X.509 (RFC 5280), P-256. The identity stands in URI subject alternative names:
`edgeward://device/{site}/{device}` for a device, one `edgeward://store/{site}/{name}` per site for a
trend store. The common name is the bare name, which a broker's ACL can use.
"""

from __future__ import annotations

import datetime
import functools
import ipaddress
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgeward.errors import InvalidDocument, TrustError
from edgeward.identifiers import DeviceName, check_name
from edgeward.storage import sha256_hex
from edgeward.trust.keys import PrivateKey, PublicKey

_SKEW = 300.0


@dataclass(frozen=True)
class DeviceIdentity:
    name: DeviceName

    def __str__(self) -> str:
        return f"device {self.name}"

    def uris(self) -> list[str]:
        return [f"edgeward://device/{self.name.site}/{self.name.device}"]

    @property
    def common_name(self) -> str:
        return self.name.device


@dataclass(frozen=True)
class StoreIdentity:
    """A trend store that may acknowledge for its sites."""

    name: str
    sites: frozenset[str]

    def __str__(self) -> str:
        return f"trend store {self.name} ({', '.join(sorted(self.sites))})"

    def uris(self) -> list[str]:
        return [f"edgeward://store/{site}/{self.name}" for site in sorted(self.sites)]

    @property
    def common_name(self) -> str:
        return self.name


Identity = DeviceIdentity | StoreIdentity


def fingerprint(der: bytes) -> str:
    """SHA-256 of a DER certificate, lower-case hex."""
    return sha256_hex(der)


@functools.lru_cache(maxsize=4096)
def load_certificate_der(der: bytes) -> x509.Certificate:
    """Raises TrustError when `der` is no certificate."""
    try:
        return x509.load_der_x509_certificate(der)
    except ValueError:
        raise TrustError("not an X.509 certificate") from None


def load_certificate_pem(pem: str) -> x509.Certificate:
    """Raises TrustError when `pem` is no certificate."""
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError:
        raise TrustError("not an X.509 certificate in PEM") from None


def to_der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def to_pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def identity_of(certificate: x509.Certificate) -> Identity:
    """The identity in the subject alternative names. Raises TrustError when there is none or a mix."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        parts = [uri.removeprefix("edgeward://").split("/") for uri in uris]
        if len(parts) == 1 and len(parts[0]) == 3 and parts[0][0] == "device":
            return DeviceIdentity(DeviceName(check_name(parts[0][1]), check_name(parts[0][2])))
        if parts and all(len(p) == 3 and p[0] == "store" and p[2] == parts[0][2] for p in parts):
            return StoreIdentity(check_name(parts[0][2]), frozenset(check_name(p[1]) for p in parts))
    except (x509.ExtensionNotFound, InvalidDocument, ValueError):
        pass
    raise TrustError("the certificate names neither one device nor one trend store")


class TrustAnchor:
    """The edge CA, as seen by someone who verifies. Chains are one link long."""

    def __init__(self, ca_pem: str) -> None:
        self._ca = load_certificate_pem(ca_pem)
        self._known: dict[bytes, Identity] = {}

    def verify(self, certificate: x509.Certificate, now: float, *, grace: float = 0.0) -> Identity:
        """Whose it is. Raises TrustError unless the CA issued `certificate` and it is valid at `now`.

        `now` is seconds since 1970; `grace` is for how many more seconds one that has ended still counts.
        """
        der = to_der(certificate)
        identity = self._known.get(der)
        if identity is None:
            try:
                certificate.verify_directly_issued_by(self._ca)
            except (InvalidSignature, ValueError, TypeError):
                raise TrustError("the certificate was not issued by this fleet's CA") from None
            identity = identity_of(certificate)
            if len(self._known) > 20_000:
                self._known.clear()
            self._known[der] = identity
        if now > certificate.not_valid_after_utc.timestamp() + _SKEW + grace:
            raise TrustError(
                f"the certificate of {identity} expired at {certificate.not_valid_after_utc:%Y-%m-%dT%H:%MZ}"
            )
        if now < certificate.not_valid_before_utc.timestamp() - _SKEW:
            raise TrustError(f"the certificate of {identity} is not valid yet")
        return identity


def _time(at: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at, datetime.UTC)


def make_ca(
    key: PrivateKey, now: float, *, days: float = 3650, name: str = "edgeward edge CA"
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now - _SKEW))
        .not_valid_after(_time(now + days * 86400))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_key_usage(ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def issue(
    ca: x509.Certificate,
    ca_key: PrivateKey,
    public_key: PublicKey,
    identity: Identity,
    now: float,
    *,
    lifetime: float,
) -> x509.Certificate:
    """A client certificate for `identity`, valid for `lifetime` seconds from `now`."""
    names = [x509.UniformResourceIdentifier(uri) for uri in identity.uris()]
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.common_name)]))
        .issuer_name(ca.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now - _SKEW))
        .not_valid_after(_time(now + lifetime))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def issue_server(
    ca: x509.Certificate,
    ca_key: PrivateKey,
    public_key: PublicKey,
    hosts: list[str],
    now: float,
    *,
    lifetime: float,
) -> x509.Certificate:
    """A TLS server certificate (a broker's) for the given DNS names or IP addresses."""
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])]))
        .issuer_name(ca.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now - _SKEW))
        .not_valid_after(_time(now + lifetime))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def make_csr(key: PrivateKey, common_name: str) -> str:
    """A PKCS#10 request in PEM. Its names are only a wish: the CA decides the identity from the token."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )


def csr_public_key(pem: str) -> PublicKey:
    """The key of a request whose self-signature proves possession. Raises TrustError otherwise."""
    try:
        request = x509.load_pem_x509_csr(pem.encode())
    except ValueError:
        raise TrustError("not a certificate request in PEM (PKCS#10)") from None
    if not request.is_signature_valid:
        raise TrustError("the certificate request's own signature does not hold")
    key = request.public_key()
    if not isinstance(key, PublicKey):
        raise TrustError("expected a P-256 key in the certificate request")
    return key
