"""The tables, declared once; migrations/versions/ makes and changes them. Times are seconds since 1970."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Column, Integer, LargeBinary, UniqueConstraint
from sqlmodel import Field, SQLModel


def _json() -> Any:
    return Field(sa_column=Column(JSON, nullable=False))


def _big() -> Any:
    return Field(sa_column=Column(BigInteger, nullable=False))


def _bytes() -> Any:
    return Field(sa_column=Column(LargeBinary, nullable=False))


class ResourceRow(SQLModel, table=True):
    """One resource of any kind; `generation` counts spec changes, `resource_version` every change."""

    __tablename__ = "resource"
    __table_args__ = (UniqueConstraint("kind", "name"),)

    id: int | None = Field(default=None, primary_key=True)
    kind: str
    name: str
    labels: dict[str, str] = _json()
    annotations: dict[str, str] = _json()
    generation: int = 1
    resource_version: int = 1
    spec: dict[str, Any] = _json()
    status: dict[str, Any] = _json()
    created_at: float


class CertificateRow(SQLModel, table=True):
    """Every certificate ever issued: the deny-list is its `revoked` column. `key_digest`: SHA-256 of the public key."""

    __tablename__ = "certificate"

    keyid: str = Field(primary_key=True)
    name: str = Field(index=True)
    role: str
    der: bytes = _bytes()
    key_digest: str
    issued_at: float
    expires_at: float
    revoked: bool = False


class EnrollmentTokenRow(SQLModel, table=True):
    """A single-use token, as its SHA-256 only."""

    __tablename__ = "enrollment_token"

    digest: str = Field(primary_key=True)
    role: str
    sites: list[str] = _json()
    labels: dict[str, str] = _json()
    created_by: str
    expires_at: float
    used_at: float | None = None
    used_by: str = ""
    approval: bool = False


class EnrollmentRequestRow(SQLModel, table=True):
    """A device that waits for a person. `state`: pending, approved or denied; `key_digest` as for certificates."""

    __tablename__ = "enrollment_request"

    token_digest: str = Field(primary_key=True)
    name: str = Field(index=True)
    site: str
    key_digest: str
    labels: dict[str, str] = _json()
    state: str
    created_at: float
    expires_at: float
    decided_by: str = ""


class ApiTokenRow(SQLModel, table=True):
    """A person's or a tool's token, as its SHA-256 only."""

    __tablename__ = "api_token"

    digest: str = Field(primary_key=True)
    name: str = Field(unique=True)
    role: str
    created_at: float


class DesiredRow(SQLModel, table=True):
    """The newest desired state of a device; `content` is the digest of what it says, times and generation apart."""

    __tablename__ = "desired"

    device: str = Field(primary_key=True)
    generation: int
    content: str
    envelope: bytes = _bytes()
    expires_at: float


class AssignmentRow(SQLModel, table=True):
    """Which model a rollout gave a device's slot, and which one it had before."""

    __tablename__ = "assignment"

    device: str = Field(primary_key=True)
    slot: str = Field(primary_key=True)
    fleet: str
    rollout: str
    active: dict[str, Any] = _json()
    previous: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))


class PositionRow(SQLModel, table=True):
    """The newest (boot, n) accepted per device and channel: what is not newer is a replay."""

    __tablename__ = "position"

    device: str = Field(primary_key=True)
    channel: str = Field(primary_key=True)
    boot: int = _big()
    n: int = _big()
    ended: bool = False


class ReportRow(SQLModel, table=True):
    __tablename__ = "report"

    id: int | None = Field(
        default=None,
        sa_column=Column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    )
    device: str = Field(index=True)
    at: float
    body: dict[str, Any] = _json()


class AuditRow(SQLModel, table=True):
    """Who did what when; never a secret."""

    __tablename__ = "audit"

    id: int | None = Field(
        default=None,
        sa_column=Column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    )
    at: float
    who: str
    action: str
    kind: str
    name: str
    detail: str = ""


class ReleaseRow(SQLModel, table=True):
    """A published targets metadata version and the manifest it added."""

    __tablename__ = "release"

    targets_version: int = Field(primary_key=True)
    model: str
    version: int
    digest: str
    published_at: float
    published_by: str
