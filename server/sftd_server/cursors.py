"""Where a list goes on: after the item with an id, also when that item has been deleted meanwhile."""

from datetime import datetime
from typing import Any

from sqlmodel import Session, select

from sftd_server.tables import FileRow, GoneRow, JobRow


def number_of(session: Session, table: type[FileRow] | type[JobRow], item_id: str) -> int | None:
    """The number of a job or file, which orders its list; None where there never was one of that id."""
    columns: Any = table  # both have id and number
    found = session.exec(select(columns.number).where(columns.id == item_id)).first()
    if found is None:
        found = session.exec(select(GoneRow.number).where(GoneRow.id == item_id)).first()
    return None if found is None else int(found)


def bury(session: Session, item_id: str, number: int | None, now: datetime) -> None:
    """Remember where a job or file stood that is deleted in this transaction."""
    assert number is not None
    session.merge(GoneRow(id=item_id, number=number, deleted_at=now))
