"""Run by Alembic: on the connection that the controller hands over, or on `-x database=URL` by hand."""

from __future__ import annotations

import sqlalchemy
from alembic import context
from sqlmodel import SQLModel

import controller.store.tables  # noqa: F401  (fills the metadata)


def run(connection: sqlalchemy.Connection) -> None:
    # render_as_batch: SQLite changes a table by copying it.
    context.configure(
        connection=connection,
        target_metadata=SQLModel.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    engine = sqlalchemy.create_engine(context.get_x_argument(as_dictionary=True)["database"])
    with engine.begin() as own:
        run(own)
