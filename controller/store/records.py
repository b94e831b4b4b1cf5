"""Everything durable besides resources. Every function works inside the caller's transaction."""

from __future__ import annotations

from typing import Any

from sqlmodel import Session, col, delete, select, update

from controller.store.tables import (
    ApiTokenRow,
    AssignmentRow,
    AuditRow,
    CertificateRow,
    DesiredRow,
    EnrollmentTokenRow,
    PositionRow,
    ReportRow,
)
from edgeward.wire.reports import Report, Reported, Status

REPORTS_KEPT = 500


def audit(
    session: Session, now: float, who: str, action: str, kind: str, name: str, detail: str = ""
) -> None:
    session.add(AuditRow(at=now, who=who, action=action, kind=kind, name=name, detail=detail[:1000]))


def audit_records(session: Session, limit: int) -> list[dict[str, Any]]:
    """The newest `limit` records, oldest first."""
    rows = session.exec(select(AuditRow).order_by(col(AuditRow.id).desc()).limit(limit)).all()
    return [row.model_dump(exclude={"id"}) for row in reversed(rows)]


def certificate(session: Session, keyid: str) -> CertificateRow | None:
    return session.get(CertificateRow, keyid)


def certificates_of(session: Session, name: str) -> list[CertificateRow]:
    return list(session.exec(select(CertificateRow).where(CertificateRow.name == name)))


def certificates_valid_at(session: Session, now: float, role: str) -> list[CertificateRow]:
    """Those whose time has not ended, revoked ones too."""
    return list(
        session.exec(
            select(CertificateRow).where(CertificateRow.role == role, col(CertificateRow.expires_at) > now)
        )
    )


def revoke_certificates(session: Session, name: str) -> int:
    """Put every certificate of `name` on the deny-list; how many were not on it."""
    done = session.exec(
        update(CertificateRow)
        .where(col(CertificateRow.name) == name, col(CertificateRow.revoked).is_(False))
        .values(revoked=True)
    )
    return int(done.rowcount)


def consume_token(session: Session, digest: str, name: str, now: float) -> EnrollmentTokenRow | None:
    """The token, if it is unused and in time; from now on it is used. One statement, so that only one wins."""
    done = session.exec(
        update(EnrollmentTokenRow)
        .where(
            col(EnrollmentTokenRow.digest) == digest,
            col(EnrollmentTokenRow.used_at).is_(None),
            col(EnrollmentTokenRow.expires_at) > now,
        )
        .values(used_at=now, used_by=name)
    )
    return session.get(EnrollmentTokenRow, digest) if done.rowcount == 1 else None


def enrollment_token(session: Session, digest: str) -> EnrollmentTokenRow | None:
    return session.get(EnrollmentTokenRow, digest)


def api_token(session: Session, digest: str) -> ApiTokenRow | None:
    return session.get(ApiTokenRow, digest)


def drop_api_token(session: Session, name: str) -> bool:
    """Whether there was one of this name."""
    return bool(session.exec(delete(ApiTokenRow).where(col(ApiTokenRow.name) == name)).rowcount)


def desired(session: Session, device: str) -> DesiredRow | None:
    return session.get(DesiredRow, device)


def desired_states(session: Session) -> dict[str, DesiredRow]:
    return {row.device: row for row in session.exec(select(DesiredRow))}


def assignments(session: Session) -> dict[tuple[str, str], AssignmentRow]:
    """By device and slot."""
    return {(row.device, row.slot): row for row in session.exec(select(AssignmentRow))}


def advance(session: Session, device: str, channel: str, message: Status | Reported | Report) -> bool:
    """Whether the message is newer than all before on its channel; if so it counts from now on.

    A last will is signed before the births that follow it, so it may come once after each birth of its boot.
    """
    row = session.exec(
        select(PositionRow)
        .where(PositionRow.device == device, PositionRow.channel == channel)
        .with_for_update()
    ).one_or_none()
    ends = isinstance(message, Status) and message.state == "offline"
    if row is None:
        session.add(PositionRow(device=device, channel=channel, boot=message.boot, n=message.n, ended=ends))
        return True
    if (message.boot, message.n) > (row.boot, row.n):
        row.boot, row.n, row.ended = message.boot, message.n, ends
        return True
    if ends and message.boot == row.boot and not row.ended:
        row.ended = True
        return True
    return False


def add_report(session: Session, device: str, at: float, body: dict[str, Any]) -> None:
    """Keep the newest REPORTS_KEPT reports of each device."""
    row = ReportRow(device=device, at=at, body=body)
    session.add(row)
    session.flush()
    oldest = session.exec(
        select(ReportRow.id)
        .where(ReportRow.device == device)
        .order_by(col(ReportRow.id).desc())
        .offset(REPORTS_KEPT)
        .limit(1)
    ).first()
    if oldest is not None:
        session.exec(delete(ReportRow).where(col(ReportRow.device) == device, col(ReportRow.id) <= oldest))


def reports(session: Session, device: str, limit: int) -> list[dict[str, Any]]:
    """The newest `limit` reports, oldest first."""
    rows = session.exec(
        select(ReportRow).where(ReportRow.device == device).order_by(col(ReportRow.id).desc()).limit(limit)
    ).all()
    return [row.body for row in reversed(rows)]


def forget_device(session: Session, device: str) -> None:
    """Drop what the controller holds of a device apart from its (now denied) certificates."""
    for table in (AssignmentRow, DesiredRow, PositionRow, ReportRow):
        session.exec(delete(table).where(col(table.device) == device))
