"""The first tables."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _text(name: str, **options: Any) -> sa.Column[str]:
    return sa.Column(name, sa.String(), nullable=False, **options)


def _float(name: str, nullable: bool = False) -> sa.Column[float]:
    return sa.Column(name, sa.Float(), nullable=nullable)


def _serial() -> sa.Column[int]:
    return sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True)


def upgrade() -> None:
    op.create_table(
        "resource",
        sa.Column("id", sa.Integer(), primary_key=True),
        _text("kind"),
        _text("name"),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("annotations", sa.JSON(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("resource_version", sa.Integer(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("status", sa.JSON(), nullable=False),
        _float("created_at"),
        sa.UniqueConstraint("kind", "name"),
    )
    op.create_table(
        "certificate",
        _text("keyid", primary_key=True),
        _text("name", index=True),
        _text("role"),
        sa.Column("der", sa.LargeBinary(), nullable=False),
        _text("key_digest"),
        _float("issued_at"),
        _float("expires_at"),
        sa.Column("revoked", sa.Boolean(), nullable=False),
    )
    op.create_table(
        "enrollment_token",
        _text("digest", primary_key=True),
        _text("role"),
        sa.Column("sites", sa.JSON(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        _text("created_by"),
        _float("expires_at"),
        _float("used_at", nullable=True),
        _text("used_by"),
    )
    op.create_table(
        "api_token",
        _text("digest", primary_key=True),
        _text("name", unique=True),
        _text("role"),
        _float("created_at"),
    )
    op.create_table(
        "desired",
        _text("device", primary_key=True),
        sa.Column("generation", sa.Integer(), nullable=False),
        _text("content"),
        sa.Column("envelope", sa.LargeBinary(), nullable=False),
        _float("expires_at"),
    )
    op.create_table(
        "assignment",
        _text("device", primary_key=True),
        _text("slot", primary_key=True),
        _text("fleet"),
        _text("rollout"),
        sa.Column("active", sa.JSON(), nullable=False),
        sa.Column("previous", sa.JSON(), nullable=True),
    )
    op.create_table(
        "position",
        _text("device", primary_key=True),
        _text("channel", primary_key=True),
        sa.Column("boot", sa.BigInteger(), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.Column("ended", sa.Boolean(), nullable=False),
    )
    op.create_table(
        "report",
        _serial(),
        _text("device", index=True),
        _float("at"),
        sa.Column("body", sa.JSON(), nullable=False),
    )
    op.create_table(
        "audit",
        _serial(),
        _float("at"),
        _text("who"),
        _text("action"),
        _text("kind"),
        _text("name"),
        _text("detail"),
    )
    op.create_table(
        "release",
        sa.Column("targets_version", sa.Integer(), primary_key=True, autoincrement=False),
        _text("model"),
        sa.Column("version", sa.Integer(), nullable=False),
        _text("digest"),
        _float("published_at"),
        _text("published_by"),
    )


def downgrade() -> None:
    for table in (
        "release", "audit", "report", "position", "assignment", "desired", "api_token",
        "enrollment_token", "certificate", "resource",
    ):  # fmt: skip
        op.drop_table(table)
