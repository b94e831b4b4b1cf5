"""Enrolment that a person approves."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("enrollment_token") as table:
        table.add_column(sa.Column("approval", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "enrollment_request",
        sa.Column("token_digest", sa.String(), primary_key=True, nullable=False),
        sa.Column("name", sa.String(), nullable=False, index=True),
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("key_digest", sa.String(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.Column("decided_by", sa.String(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("enrollment_request")
    with op.batch_alter_table("enrollment_token") as table:
        table.drop_column("approval")
