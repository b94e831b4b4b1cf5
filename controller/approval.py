"""Enrolment that waits for a person: what was asked, who decided, and what the device gets to hear.

The token is spent when the request is made; from then on the request belongs to that token, name and key.
The device asks again with the same three until somebody has decided. Every function works inside the
caller's transaction.
"""

from __future__ import annotations

from typing import Any

from sqlmodel import Session, col, delete, select

from controller.store import records, resources
from controller.store.tables import EnrollmentRequestRow, EnrollmentTokenRow
from edgeward.errors import Conflict, Forbidden, NotFound
from edgeward.wire.enrollment import EnrollPending

#: How long a request waits, and how long an approved device may take to fetch its certificate.
LIFETIME = 7 * 86400.0
RETRY_AFTER = 5.0

PENDING, APPROVED, DENIED = "pending", "approved", "denied"


def required(session: Session, token: EnrollmentTokenRow) -> bool:
    """Whether the token or its site wants a person's word. Trend stores need none."""
    if token.role != "device":
        return False
    return (
        token.approval or resources.need(session, "Site", token.sites[0]).spec.get("approval") == "required"
    )


def ask(
    session: Session,
    token: EnrollmentTokenRow,
    name: str,
    key_digest: str,
    labels: dict[str, str],
    now: float,
) -> EnrollmentRequestRow:
    """A new request. Raises Conflict when another key has asked for the name."""
    for row in _open(session, name, now):
        if row.key_digest != key_digest:
            raise Conflict(
                f"another device has asked for the name {name!r}",
                hint=f"choose another name, or `edgeward device deny {name}`",
            )
        session.delete(row)  # the same device with a newer token
    row = EnrollmentRequestRow(
        token_digest=token.digest,
        name=name,
        site=token.sites[0],
        key_digest=key_digest,
        labels=labels,
        state=PENDING,
        created_at=now,
        expires_at=now + LIFETIME,
    )
    session.add(row)
    records.audit(session, now, f"device {name}", "request", "Device", name, f"key {key_digest}")
    return row


def answered(
    session: Session, token_digest: str, name: str, key_digest: str, now: float
) -> EnrollmentRequestRow | None:
    """The request of this token, still open or approved; None when there is none of it.

    Raises Forbidden when it was denied, has lapsed, or is somebody else's.
    """
    row = session.get(EnrollmentRequestRow, token_digest)
    if row is None:
        return None
    if (row.name, row.key_digest) != (name, key_digest):
        raise Forbidden("the enrolment token was used for another name or key")
    if row.state == DENIED:
        raise Forbidden(f"{row.decided_by} has denied the enrolment of {name}", hint="ask for a new token")
    if row.expires_at <= now:
        raise Forbidden(
            f"the enrolment of {name} waited for longer than {LIFETIME / 86400:g} days",
            hint="make a new token: `edgeward token create --site SITE`",
        )
    return row


def pending(row: EnrollmentRequestRow) -> EnrollPending:
    return EnrollPending(row.name, row.site, row.key_digest, RETRY_AFTER)


def decide(session: Session, name: str, state: str, fingerprint: str, who: str, now: float) -> None:
    """Approve or deny the request for `name`, whose key must be the one that the person saw.

    Denying also takes back an approval whose certificate has not been fetched. Raises NotFound, Conflict.
    """
    row = next(iter(_open(session, name, now)), None)
    if row is None or (row.state == APPROVED and resources.get(session, "Device", name) is not None):
        raise NotFound(
            f"no device waits for approval as {name[:80]!r}", hint="see `edgeward device requests`"
        )
    if row.key_digest != fingerprint:
        raise Conflict(
            f"the request for {name!r} is of another key, {row.key_digest}",
            hint="compare it with what the device shows",
        )
    row.state, row.decided_by = state, who
    row.expires_at = now + LIFETIME
    session.add(row)
    action = {APPROVED: "approve", DENIED: "deny"}[state]
    records.audit(session, now, who, action, "Device", name, f"key {row.key_digest}")


def waiting(session: Session, now: float) -> list[dict[str, Any]]:
    """What a person has to decide, oldest first."""
    rows = session.exec(
        select(EnrollmentRequestRow)
        .where(EnrollmentRequestRow.state == PENDING, col(EnrollmentRequestRow.expires_at) > now)
        .order_by(col(EnrollmentRequestRow.created_at))
    )
    return [
        {
            "name": row.name,
            "site": row.site,
            "fingerprint": row.key_digest,
            "labels": row.labels,
            "createdAt": row.created_at,
            "expiresAt": row.expires_at,
        }
        for row in rows
    ]


def forget(session: Session, name: str) -> None:
    """An approval must not outlive the device that it was for."""
    session.exec(delete(EnrollmentRequestRow).where(col(EnrollmentRequestRow.name) == name))


def _open(session: Session, name: str, now: float) -> list[EnrollmentRequestRow]:
    return list(
        session.exec(
            select(EnrollmentRequestRow)
            .where(
                EnrollmentRequestRow.name == name,
                EnrollmentRequestRow.state != DENIED,
                col(EnrollmentRequestRow.expires_at) > now,
            )
            .with_for_update()
        )
    )
