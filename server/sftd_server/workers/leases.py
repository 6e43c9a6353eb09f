"""Leases: what every write of a worker begins with, and how a lease is kept.

A lease is held by (attempt, token). Every write of a worker begins with `fenced`, in the same transaction as its
effect: once a job has moved on, nothing of the old attempt is accepted. Only this process's clock decides.
`claims` hands leases out, `endings` takes them back.
"""

import hashlib
import random
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlmodel import Session, col, select, update

from sftd.protocol import Heartbeat
from sftd.schemas import JobState, Want
from sftd_server.db import touch
from sftd_server.errors import Conflict
from sftd_server.jobs.service import Note, add_event, move
from sftd_server.jobs.states import LEASED, Trigger
from sftd_server.settings import Settings
from sftd_server.tables import JobRow, WorkerRow


class StaleLease(Conflict):
    """409: the job has moved on; whoever still works on it stops at once."""

    def __init__(self) -> None:
        super().__init__(
            "This lease is over: the job has moved on. Stop the training and claim again.", code="stale_lease"
        )


@dataclass(frozen=True)
class Holder:
    """What a worker proves its lease with."""

    job_id: str
    attempt: int
    token_sha256: str


def holder(job_id: str, attempt: int, token: str) -> Holder:
    """Who says to hold a lease. The token itself is kept nowhere."""
    return Holder(job_id, attempt, sha256(token))


def fenced(session: Session, holder: Holder) -> JobRow:
    """The job, if this holder has its lease. Raises StaleLease."""
    query = select(JobRow).where(
        JobRow.id == holder.job_id,
        JobRow.attempt == holder.attempt,
        JobRow.token_sha256 == holder.token_sha256,
        col(JobRow.state).in_(LEASED),
    )
    row = session.exec(query).first()
    if row is None:
        raise StaleLease
    return row


def heartbeat(
    session: Session, holder: Holder, beat: Heartbeat, *, settings: Settings, now: datetime
) -> Want:
    """Renew the lease; note that training began; return what the user wants. Only this moves `lease_until`."""
    row = fenced(session, holder)
    seen(session, row.worker_id, now)
    changes: dict[str, object] = deadlines(settings, now)
    if beat.step > row.step:
        changes["step"] = beat.step
    session.exec(
        update(JobRow)
        .where(
            col(JobRow.number) == row.number,
            col(JobRow.attempt) == holder.attempt,
            col(JobRow.token_sha256) == holder.token_sha256,
            col(JobRow.state).in_(LEASED),
        )
        .values(**changes)
    )
    want = Want(row.want)
    stopping = Note("stopping", f"The worker has been told to {want}.", {"want": want})
    if beat.started and row.state == JobState.CLAIMED:
        notes = [Note("running", "Training has begun.")] + ([stopping] if want is not Want.RUN else [])
        values = {"start_by": None, "started_at": row.started_at or now}
        move(session, row, Trigger.START, now=now, notes=notes, values=values)
    elif want is not Want.RUN:
        move(session, row, Trigger.TELL, now=now, notes=[stopping], values={"start_by": None})
    return want


def differing_want(session: Session, holder: Holder, seen: Want) -> Want | None:
    """What the user wants, where it is not what the worker knows, or its lease is over; else None."""
    row = session.exec(select(JobRow).where(JobRow.id == holder.job_id)).first()
    if row is None or row.token_sha256 != holder.token_sha256:
        return seen
    return Want(row.want) if row.want != seen else None


def extend_all(session: Session, *, settings: Settings, now: datetime, note: Note | None = None) -> int:
    """Give every live lease its full time again: after a start of the server, or a jump of the clock."""
    rows = list(session.exec(select(JobRow).where(col(JobRow.state).in_(LEASED))))
    session.exec(update(JobRow).where(col(JobRow.state).in_(LEASED)).values(**deadlines(settings, now)))
    session.exec(
        update(JobRow)
        .where(col(JobRow.state) == JobState.CLAIMED, col(JobRow.start_by).is_not(None))
        .values(start_by=start_by(settings, now))
    )
    latest = now + timedelta(seconds=settings.max_backoff_seconds)
    session.exec(
        update(JobRow)
        .where(col(JobRow.state) == JobState.QUEUED, col(JobRow.not_before) > latest)
        .values(not_before=now)
    )
    for row in rows if note else ():
        assert note is not None
        add_event(session, row, note, now)
    touch(session, "queue")
    return len(rows)


# ---------------------------------------------------------------- small questions


def seen(session: Session, worker_id: str | None, now: datetime) -> None:
    """Note that a worker was heard of."""
    session.exec(update(WorkerRow).where(col(WorkerRow.id) == worker_id).values(seen_at=now))


def deadlines(settings: Settings, now: datetime) -> dict[str, object]:
    """A lease's full time, from now."""
    return {"lease_until": now + timedelta(seconds=settings.lease_seconds)}


def start_by(settings: Settings, now: datetime) -> datetime:
    """When a job that is claimed now must have begun."""
    return now + timedelta(seconds=settings.start_seconds)


def backoff(settings: Settings, count: int) -> timedelta:
    """Doubling, with jitter so that jobs that fell together do not rise together."""
    seconds = min(settings.max_backoff_seconds, settings.backoff_seconds * 2.0 ** min(count - 1, 30))
    return timedelta(seconds=seconds * random.uniform(0.5, 1.0))


def sha256(token: str) -> str:
    """What is stored of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
