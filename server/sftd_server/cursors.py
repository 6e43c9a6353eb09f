"""Where a list goes on: after the item with an id, also when that item has been deleted meanwhile, this week."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlmodel import Session, and_, col, delete, exists, func, literal, not_, select

from sftd_server.ids import JOB, RESULT_FILE
from sftd_server.tables import FileRow, GoneRow, JobRow

REMEMBERED = timedelta(days=7)  # how long a list goes on after what was deleted
MAX_SWEPT = 1000  # in one write


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


def forgettable(session: Session, before: datetime) -> list[str]:
    """Some that were deleted before that. A result file stays as long as its job, which would make it again."""
    its_job = literal(JOB) + func.substr(GoneRow.id, len(RESULT_FILE) + 1)
    is_result = col(GoneRow.id).startswith(RESULT_FILE, autoescape=True)
    stays = and_(is_result, exists().where(col(JobRow.id) == its_job))
    query = select(GoneRow.id).where(GoneRow.deleted_at < before, not_(stays))
    return list(session.exec(query.limit(MAX_SWEPT)))


def forget(session: Session, ids: Sequence[str]) -> None:
    """Lists no longer go on after these."""
    session.exec(delete(GoneRow).where(col(GoneRow.id).in_(ids)))
