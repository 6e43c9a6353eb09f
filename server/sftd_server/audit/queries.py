"""Reads the audit log, and says what of it is old."""

from dataclasses import dataclass
from datetime import datetime

from sqlmodel import Session, col, delete, or_, select

from sftd.schemas import AuditEntry, Page
from sftd_server.tables import AuditRow

MAX_SWEPT = 10_000  # in one transaction


@dataclass(frozen=True)
class EntryFilter:
    """Which entries to list."""

    action: str | None = None  # job.delete; or job, for all of jobs
    key_name: str | None = None
    target: str | None = None
    since: datetime | None = None
    until: datetime | None = None


def entries(session: Session, wanted: EntryFilter, *, after: int | None, limit: int) -> Page[AuditEntry]:
    """Entries, newest first."""
    query = select(AuditRow).order_by(col(AuditRow.number).desc()).limit(limit + 1)
    if after is not None:
        query = query.where(col(AuditRow.number) < after)
    if wanted.action is not None:
        kind = col(AuditRow.action).startswith(f"{wanted.action}.", autoescape=True)
        query = query.where(or_(AuditRow.action == wanted.action, kind))
    if wanted.key_name is not None:
        query = query.where(AuditRow.key_name == wanted.key_name)
    if wanted.target is not None:
        query = query.where(AuditRow.target == wanted.target)
    if wanted.since is not None:
        query = query.where(col(AuditRow.created_at) >= wanted.since)
    if wanted.until is not None:
        query = query.where(col(AuditRow.created_at) < wanted.until)
    rows = session.exec(query).all()
    data = [AuditEntry(id=row.number, **row.model_dump(exclude={"number"})) for row in rows[:limit]]
    more = len(rows) > limit
    return Page[AuditEntry](data=data, has_more=more, next_after=data[-1].id if more else None)


def any_before(session: Session, moment: datetime) -> bool:
    """Whether the oldest entry is older than that: a look that costs no write."""
    oldest = select(AuditRow.created_at).order_by(col(AuditRow.number)).limit(1)
    found = session.exec(oldest).first()
    return found is not None and found < moment


def forget(session: Session, moment: datetime) -> int:
    """Delete the oldest entries from before that, so many at a time. Returns how many."""
    first = session.exec(select(AuditRow.number).order_by(col(AuditRow.number)).limit(1)).first() or 0
    old = (col(AuditRow.number) < first + MAX_SWEPT, col(AuditRow.created_at) < moment)
    return session.exec(delete(AuditRow).where(*old)).rowcount
