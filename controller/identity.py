"""The edge certificate authority: enrolment, renewal, the deny-list, and who a request comes from."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from sqlmodel import Session

from controller import approval
from controller.store import records, resources
from controller.store.database import Store
from controller.store.tables import CertificateRow, EnrollmentRequestRow, EnrollmentTokenRow
from edgeward.clock import Clock
from edgeward.errors import Conflict, Forbidden, InvalidDocument, TrustError
from edgeward.identifiers import DeviceName, check_name
from edgeward.storage import sha256_hex, write_atomic
from edgeward.trust import certificates, tokens
from edgeward.trust.certificates import DeviceIdentity, Identity, StoreIdentity, TrustAnchor
from edgeward.trust.keys import PublicKey, load_or_create
from edgeward.wire.enrollment import EnrollPending, EnrollRequest, EnrollResponse, Role, TrustBundle

CERTIFICATE_LIFETIME = 30 * 86400.0
RENEW_AT = 2 / 3
RENEWAL_GRACE = 90 * 86400.0
MAX_TOKEN_TTL = 30 * 86400.0
MAX_LABELS = 64

_PROOF = object()


class AuthenticatedDevice:
    """A device or trend store that proved its identity in this very request. Only `Authority` makes one."""

    def __init__(self, identity: Identity, keyid: str, proof: object) -> None:
        if proof is not _PROOF:
            raise TypeError("an AuthenticatedDevice comes from Authority.authenticate only")
        self.identity = identity
        self.keyid = keyid

    @property
    def device(self) -> DeviceName:
        """Raises Forbidden for a trend store."""
        if not isinstance(self.identity, DeviceIdentity):
            raise Forbidden(f"{self.identity} is not a device")
        return self.identity.name


def check_labels(labels: dict[str, str], field: str) -> dict[str, str]:
    """Raises InvalidDocument for too many, too long or empty labels."""
    if len(labels) > MAX_LABELS:
        raise InvalidDocument(f"expected at most {MAX_LABELS} labels", field=field)
    for key, value in labels.items():
        if not 0 < len(key) <= 63 or len(value) > 63 or not (key + value).isprintable():
            raise InvalidDocument(
                "expected keys of 1-63 and values of up to 63 printable characters",
                field=f"{field}.{key[:63]}",
            )
    return labels


class Authority:
    """Issues and checks identities. `tuf_root` answers the current TUF root's text, empty without one.

    Certificates are for `lifetime` seconds; for `renewal_grace` seconds after that they are good for one
    thing still, to be renewed.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        clock: Clock,
        *,
        desired_keys: list[str],
        tuf_root: Callable[[], str],
        lifetime: float = CERTIFICATE_LIFETIME,
        renewal_grace: float = RENEWAL_GRACE,
    ) -> None:
        self._store = store
        self._clock = clock
        self._desired_keys = desired_keys
        self._tuf_root = tuf_root
        self._lifetime = lifetime
        self._grace = renewal_grace
        self._key = load_or_create(folder / "keys" / "ca.pem")
        path = folder / "ca.pem"
        if not path.exists():
            ca = certificates.make_ca(self._key, clock.now())
            write_atomic(path, certificates.to_pem(ca).encode())
        self.ca_pem = path.read_text()
        self._ca = certificates.load_certificate_pem(self.ca_pem)
        self.anchor = TrustAnchor(self.ca_pem)

    # enrolment

    def create_token(
        self,
        session: Session,
        *,
        sites: list[str],
        role: Role,
        labels: dict[str, str],
        ttl: float,
        who: str,
        needs_approval: bool = False,
    ) -> str:
        """A new single-use secret; only its hash is kept. Raises InvalidDocument, NotFound for a site."""
        if not sites or (role == "device" and len(sites) != 1):
            raise InvalidDocument("a device has exactly one site, a trend store at least one", field="sites")
        if needs_approval and role != "device":
            raise InvalidDocument("only devices are approved one by one", field="approval")
        for site in sites:
            resources.need(session, "Site", site)
        if not 0 < ttl <= MAX_TOKEN_TTL:
            raise InvalidDocument(f"expected seconds above 0, up to {MAX_TOKEN_TTL:g}", field="ttl")
        secret = f"edgeward-enroll-{secrets.token_urlsafe(32)}"
        session.add(
            EnrollmentTokenRow(
                digest=sha256_hex(secret.encode()),
                role=role,
                sites=sorted(set(sites)),
                labels=check_labels(labels, "labels"),
                created_by=who,
                expires_at=self._clock.now() + ttl,
                approval=needs_approval,
            )
        )
        return secret

    def enroll(self, request: EnrollRequest, broker: str) -> EnrollResponse | EnrollPending:
        """Token -> certificate, or a request that waits for approval. The token dies only when this succeeds.

        Raises Forbidden for a wrong, used or expired token and a denied request, Conflict when the name is
        taken or no TUF root exists, InvalidDocument or TrustError for a bad name, label or request.
        """
        name = check_name(request.name, "name")
        public = certificates.csr_public_key(request.csr)
        now = self._clock.now()
        digest = sha256_hex(request.token.encode())
        with self._store.writing() as session:
            asked = approval.answered(session, digest, name, _key_digest(public), now)
            if asked is not None and asked.state == approval.PENDING:
                return approval.pending(asked)
            if asked is None:
                token = records.consume_token(session, digest, name, now)
            else:
                token = records.enrollment_token(session, digest)
            if token is None:
                raise Forbidden(
                    "the enrolment token is wrong, used or expired",
                    hint="make a new one: `edgeward token create --site SITE`",
                )
            role: Role = "store" if token.role == "store" else "device"
            if asked is None and approval.required(session, token):
                self._check_name_free(session, name, role, public, now)
                labels = {**check_labels(request.labels, "labels"), **token.labels}
                return approval.pending(approval.ask(session, token, name, _key_digest(public), labels, now))
            identity: Identity
            if role == "device":
                self._admit_device(session, request, token, public, now)
                identity = DeviceIdentity(DeviceName(token.sites[0], name))
            else:
                self._check_name_free(session, name, role, public, now)
                identity = StoreIdentity(name, frozenset(token.sites))
            records.audit(session, now, f"{role} {name}", "enroll", role.capitalize(), name,
                          _by(token, asked))  # fmt: skip
            return self._certify(session, identity, role, public, broker, now)

    def _admit_device(
        self,
        session: Session,
        request: EnrollRequest,
        token: EnrollmentTokenRow,
        public: PublicKey,
        now: float,
    ) -> None:
        if not self._tuf_root():
            raise Conflict(
                "no releases can be trusted yet: this controller has no TUF root",
                hint="edgeward release init",
            )
        site, name = token.sites[0], request.name
        resources.need(session, "Site", site)
        self._check_name_free(session, name, "device", public, now)
        existing = resources.get(session, "Device", name, lock=True)
        if existing is None:
            own = {**check_labels(request.labels, "labels"), **token.labels, "site": site, "device": name}
            status = {"connection": "Unseen", "state": "OutOfDate", "slots": {}}
            resources.insert(
                session, "Device", name, {"site": site, "revoked": False}, now, labels=own, status=status
            )
        elif existing.spec["revoked"] or existing.spec["site"] != site:
            raise Conflict(f"device {name!r} exists at site {existing.spec['site']} or is revoked")

    def _check_name_free(
        self, session: Session, name: str, role: Role, public: PublicKey, now: float
    ) -> None:
        """A name belongs to the key that enrolled it first, until its certificates ended."""
        digest = _key_digest(public)
        valid = [
            row for row in records.certificates_of(session, name) if not row.revoked and row.expires_at > now
        ]
        owned = any(row.key_digest == digest and row.role == role for row in valid)
        known = role == "device" and resources.get(session, "Device", name) is not None
        if (valid or known) and not owned:
            raise Conflict(
                f"the name {name!r} is taken by another key",
                hint=f"choose another name, or delete it first: `edgeward delete device {name}`",
            )

    def _certify(
        self,
        session: Session,
        identity: Identity,
        role: Role,
        public: PublicKey,
        broker: str,
        now: float,
    ) -> EnrollResponse:
        issued = certificates.issue(self._ca, self._key, public, identity, now, lifetime=self._lifetime)
        der = certificates.to_der(issued)
        session.add(
            CertificateRow(
                keyid=certificates.fingerprint(der),
                name=identity.common_name,
                role=role,
                der=der,
                key_digest=_key_digest(public),
                issued_at=now,
                expires_at=now + self._lifetime,
            )
        )
        sites = [identity.name.site] if isinstance(identity, DeviceIdentity) else sorted(identity.sites)
        return EnrollResponse(
            name=identity.common_name,
            role=role,
            sites=sites,
            certificate=certificates.to_pem(issued),
            trust=TrustBundle(self.ca_pem, self._desired_keys, self._tuf_root()),
            broker=broker,
            renew_after=now + RENEW_AT * self._lifetime,
        )

    def renew(self, who: AuthenticatedDevice, csr: str, broker: str) -> EnrollResponse:
        """A new certificate for the same identity, for the same key or a new one.

        Once the old certificate has ended, for the same key only, and only when no other key has come after
        it. Raises TrustError.
        """
        public = certificates.csr_public_key(csr)
        role: Role = "device" if isinstance(who.identity, DeviceIdentity) else "store"
        now = self._clock.now()
        with self._store.writing() as session:
            old = records.certificate(session, who.keyid)
            if old is not None and old.expires_at < now:
                later = [
                    row for row in records.certificates_of(session, old.name) if row.issued_at > old.issued_at
                ]
                if any(
                    key != old.key_digest for key in (_key_digest(public), *(row.key_digest for row in later))
                ):
                    raise TrustError("a certificate that has ended is renewed for its own key only")
                records.audit(session, now, str(who.identity), "renew", role.capitalize(), old.name,
                              f"ended {(now - old.expires_at) / 86400:.1f} days ago")  # fmt: skip
            return self._certify(session, who.identity, role, public, broker, now)

    # who is it?

    def authenticate(self, token: str) -> AuthenticatedDevice:
        """The sender of a device token. Raises TrustError, Forbidden when it is on the deny-list."""
        return self._authenticate(token, 0.0)

    def authenticate_renewal(self, token: str) -> AuthenticatedDevice:
        """Like `authenticate`, but the certificate may have ended within the grace: for `renew` alone."""
        return self._authenticate(token, self._grace)

    def _authenticate(self, token: str, grace: float) -> AuthenticatedDevice:
        keyid = tokens.keyid_of(token)
        der = self.certificate(keyid)
        if der is None:
            raise TrustError("the device token names a key that this controller never certified")
        certificate = certificates.load_certificate_der(der)
        now = self._clock.now()
        identity = self.anchor.verify(certificate, now, grace=grace)
        tokens.verify(token, certificate, now)
        self.check_permitted(identity, keyid)
        return AuthenticatedDevice(identity, keyid, _PROOF)

    def certificate(self, keyid: str) -> bytes | None:
        """A certificate (DER) issued here."""
        with self._store.reading() as session:
            row = records.certificate(session, keyid)
            return row.der if row else None

    def denied(self) -> list[str]:
        """The certificates that `check_permitted` refuses, though their time has not ended."""
        with self._store.reading() as session:
            now = self._clock.now()
            devices = {row.name: row.spec["revoked"] for row in resources.find(session, "Device")}
            found = [
                row.keyid
                for row in records.certificates_valid_at(session, now, "device")
                if row.revoked or devices.get(row.name, True)
            ]
            stores = records.certificates_valid_at(session, now, "store")
            return sorted(found + [row.keyid for row in stores if row.revoked])

    def check_permitted(self, identity: Identity, keyid: str) -> None:
        """The deny-list. Raises Forbidden for a revoked certificate, a revoked or deleted device."""
        with self._store.reading() as session:
            row = records.certificate(session, keyid)
            refused = row is None or row.revoked
            if not refused and isinstance(identity, DeviceIdentity):
                device = resources.get(session, "Device", identity.name.device)
                refused = (
                    device is None or device.spec["revoked"] or device.spec["site"] != identity.name.site
                )
        if refused:
            raise Forbidden(f"{identity} is revoked")


def _by(token: EnrollmentTokenRow, request: EnrollmentRequestRow | None) -> str:
    approved = f", approved by {request.decided_by}" if request else ""
    return f"token of {token.created_by}{approved}"


def _key_digest(public: PublicKey) -> str:
    return sha256_hex(
        public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
