"""P-256 key pairs and where they rest on disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edgeward.errors import TrustError
from edgeward.storage import sha256_hex, write_atomic

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


def generate_key() -> PrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def public_pem(key: PublicKey) -> str:
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()


def load_private(data: bytes, source: str = "key") -> PrivateKey:
    """Raises TrustError when `data` is not an unencrypted P-256 private key in PEM."""
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        raise TrustError(f"{source}: not an unencrypted private key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError(f"{source}: expected a P-256 key")
    return key


def load_public(pem: str, source: str = "key") -> PublicKey:
    """Raises TrustError when `pem` is not a P-256 public key in PEM."""
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except ValueError:
        raise TrustError(f"{source}: not a public key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError(f"{source}: expected a P-256 key")
    return key


def load_or_create(path: Path) -> PrivateKey:
    """The key in `path` (mode 0600); made and written durably when the file does not exist."""
    if path.exists():
        if path.stat().st_mode & 0o077:
            raise TrustError(f"{path}: others may read this private key", hint=f"chmod 600 {path}")
        return load_private(path.read_bytes(), str(path))
    key = generate_key()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, private_pem(key), mode=0o600)
    return key


@dataclass(frozen=True)
class SigningIdentity:
    """A private key and the certificate (DER) that says whose it is."""

    key: PrivateKey
    certificate_der: bytes

    @cached_property
    def keyid(self) -> str:
        return sha256_hex(self.certificate_der)
