"""Alembic's way into the database: the connection that the caller has opened, inside its transaction."""

from typing import Literal

from alembic import context
from sqlmodel import SQLModel
from sqlmodel.sql.sqltypes import AutoString

from sftd_server import tables


def _plain_types(kind: str, item: object, context: object) -> str | Literal[False]:
    """A released migration stands for itself: it names SQL types, not classes of ours."""
    if kind == "type" and isinstance(item, tables.UtcDateTime):
        return "sa.DateTime()"
    if item is tables.Int64:
        return "INT64"
    if kind == "type" and isinstance(item, AutoString):
        return "sa.String()"
    return False


_ = tables.JobRow  # importing the module registers the tables
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=SQLModel.metadata,
    compare_type=True,
    render_as_batch=True,
    render_item=_plain_types,
    transactional_ddl=True,
)
context.run_migrations()
