"""Device tokens: a short-lived JWT (RFC 7519, ES256) signed with the device's own key.

It passes through an ingress that ends TLS, where a client certificate would not.
"""

from __future__ import annotations

import jwt
from cryptography import x509

from edgeward.errors import TrustError
from edgeward.trust.keys import SigningIdentity

AUDIENCE = "edgeward-controller"
LIFETIME = 300.0


def mint(identity: SigningIdentity, now: float) -> str:
    claims = {"aud": AUDIENCE, "iat": int(now), "exp": int(now + LIFETIME)}
    return jwt.encode(claims, identity.key, algorithm="ES256", headers={"kid": identity.keyid})


def keyid_of(token: str) -> str:
    """The unverified key id, to look the certificate up by. Raises TrustError."""
    try:
        keyid = jwt.get_unverified_header(token).get("kid")
    except jwt.InvalidTokenError:
        raise TrustError("not a device token") from None
    if not isinstance(keyid, str):
        raise TrustError("the device token names no key")
    return keyid


def verify(token: str, certificate: x509.Certificate, now: float) -> None:
    """Raises TrustError unless the certificate's key signed `token` and it is valid at `now`."""
    try:
        claims = jwt.decode(
            token,
            certificate.public_key(),  # type: ignore[arg-type]  # CAs here issue P-256 certificates only
            algorithms=["ES256"],
            audience=AUDIENCE,
            options={"require": ["exp", "iat"], "verify_exp": False, "verify_iat": False},
        )
    except (jwt.InvalidTokenError, TypeError, ValueError):
        raise TrustError("the device token's signature does not hold") from None
    if not claims["iat"] - LIFETIME <= now <= min(claims["exp"], claims["iat"] + LIFETIME) + LIFETIME:
        raise TrustError("the device token is expired or its clock is off by more than 5 minutes")
