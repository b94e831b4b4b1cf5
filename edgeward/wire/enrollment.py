"""How a new device or trend store gets its identity: token -> key pair -> CSR -> certificate."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Role = Literal["device", "store"]


class EnrollRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """`csr` is PEM (PKCS#10). The token decides site(s) and role; `name` is only a wish for a device."""

    token: str
    name: str
    csr: str
    labels: dict[str, str] = {}


class TrustBundle(Struct, frozen=True):
    """What a newcomer must trust from now on.

    `ca` is the edge certificate authority (PEM); `desired_keys` the public keys (PEM) that may sign
    desired state; `tuf_root` the trusted TUF root metadata (JSON text), empty before the first release.
    """

    ca: str
    desired_keys: list[str]
    tuf_root: str = ""


class EnrollPending(Struct, frozen=True, rename="camel"):
    """202: a person must approve first. Ask again with the same token, name and key.

    `fingerprint` is the SHA-256 of the device's public key (DER), for comparing with what the person sees.
    """

    name: str
    site: str
    fingerprint: str
    retry_after: float


class EnrollResponse(Struct, frozen=True):
    name: str
    role: Role
    sites: list[str]
    certificate: str
    trust: TrustBundle
    broker: str
    renew_after: float


class RenewRequest(Struct, frozen=True, forbid_unknown_fields=True):
    csr: str
