"""Leases: what every write of a worker begins with, and how a lease is kept.

A lease is held by (attempt, token). Every write of a worker begins with `fenced`, in the same transaction as its
effect: once a job has moved on, nothing of the old attempt is accepted. Only the server's clock decides (on PostgreSQL,
the database's).
`claims` hands leases out, `endings` takes them back.
"""

import hashlib
import random
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlmodel import Session, col, select, update

from sftd.protocol import Directive, Heartbeat
from sftd.schemas import JobState, Want
from sftd_server.db import touch
from sftd_server.errors import Conflict
from sftd_server.jobs import accounts
from sftd_server.jobs.scheduling import YIELDS_SINCE
from sftd_server.jobs.service import Note, add_event, move, wish
from sftd_server.jobs.states import LEASED, Trigger
from sftd_server.settings import Settings
from sftd_server.tables import AttemptRow, JobRow, ServerRow
from sftd_server.workers.registry import is_draining, seen


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
    """The job, if this holder has its lease, locked until the write is done. Raises StaleLease."""
    query = select(JobRow).where(
        JobRow.id == holder.job_id,
        JobRow.attempt == holder.attempt,
        JobRow.token_sha256 == holder.token_sha256,
        col(JobRow.state).in_(LEASED),
    )
    row = session.exec(query.with_for_update()).first()
    if row is None:
        raise StaleLease
    return row


def attempt_of(session: Session, row: JobRow) -> AttemptRow:
    """The attempt that a held job is in."""
    query = select(AttemptRow).where(AttemptRow.job == row.number, AttemptRow.attempt == row.attempt)
    return session.exec(query).one()


def heartbeat(
    session: Session, holder: Holder, beat: Heartbeat, *, settings: Settings, now: datetime
) -> tuple[Directive, int]:
    """Renew the lease; note that training began; return what is wanted of the job and its worker, and the protocol
    that the worker speaks. Only this moves `lease_until`."""
    row = fenced(session, holder)
    attempt = attempt_of(session, row)
    seen(session, attempt, now, beat.disk_free_bytes)
    changes: dict[str, object] = deadlines(settings, now)
    if beat.step > row.step:
        changes["step"] = beat.step
    if beat.base_sha256 is not None and row.inputs.get("base_sha256") != beat.base_sha256:
        changes["inputs"] = {**row.inputs, "base_sha256": beat.base_sha256}
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
    if keep_budget(session, row, attempt, now):
        row = fenced(session, holder)
    directive = _directive(session, row, attempt, settings)
    if beat.started and row.state == JobState.CLAIMED:
        _start(session, row, attempt, now)
    elif directive.want is not Want.RUN or directive.make_room:
        move(
            session,
            row,
            Trigger.TELL,
            now=now,
            notes=[_told(row)],
            values={"start_by": None},
            makes_room=directive.make_room,
        )
    return directive, attempt.protocol


def keep_budget(session: Session, row: JobRow, attempt: AttemptRow, now: datetime) -> bool:
    """Have a job paused that has used up a budget. True where its row has changed by that."""
    spent = accounts.exhausted(row, attempt, now) if row.want == Want.RUN else None
    if spent is None or row.state not in (JobState.CLAIMED, JobState.RUNNING):
        return False
    message = f"Its {spent} of {getattr(row, spent):g} is used up."
    note = Note("pause_requested", message, {"pause_reason": spent})
    wish(session, row, Want.PAUSE, note, now, values={"pause_reason": spent, "yield_to": None})
    return True


def has_news(session: Session, holder: Holder, beat: Heartbeat, settings: Settings) -> bool | None:
    """True where the answer would not be what the worker knows already, or its lease is over; else None."""
    row = session.exec(select(JobRow).where(JobRow.id == holder.job_id)).first()
    if row is None or row.token_sha256 != holder.token_sha256:
        return True
    return True if differs(_directive(session, row, attempt_of(session, row), settings), beat) else None


def differs(directive: Directive, beat: Heartbeat) -> bool:
    """Does the answer say something that the worker does not know yet?"""
    known = (beat.seen_want, beat.seen_make_room, beat.seen_draining)
    return known != (directive.want, directive.make_room, directive.draining)


def _directive(session: Session, row: JobRow, attempt: AttemptRow, settings: Settings) -> Directive:
    """What is wanted. Of a worker that does not know how to make room nothing of the kind is asked."""
    want, knows = Want(row.want), attempt.protocol >= YIELDS_SINCE
    return Directive(
        want=want,
        lease_seconds=settings.lease_seconds,
        make_room=knows and want is Want.RUN and row.yield_to is not None,
        draining=knows and is_draining(session, attempt),
    )


def _start(session: Session, row: JobRow, attempt: AttemptRow, now: datetime) -> None:
    notes = [Note("running", "Training has begun.")] + ([_told(row)] if row.want != Want.RUN else [])
    values = {"start_by": None, "started_at": row.started_at or now}
    if move(session, row, Trigger.START, now=now, notes=notes, values=values) is not None:
        here = (col(AttemptRow.job) == attempt.job, col(AttemptRow.attempt) == attempt.attempt)
        session.exec(update(AttemptRow).where(*here).values(started_at=now))


def _told(row: JobRow) -> Note:
    if row.want == Want.RUN:
        message = f"The worker has been told to make room for {row.yield_to}."
        return Note("stopping", message, {"want": row.want, "make_room_for": row.yield_to})
    return Note("stopping", f"The worker has been told to {row.want}.", {"want": row.want})


def make_good(session: Session, *, settings: Settings, now: datetime, jump: float, server_id: str) -> None:
    """The clock jumped: every lease has its full time, and what passed on the clock alone is charged to nobody."""
    note = Note("clock_jump", f"The server's clock jumped by {jump:.1f} s; the lease was extended.")
    extend_all(session, settings=settings, now=now, note=note)
    since = now - timedelta(seconds=settings.lease_seconds + max(0.0, jump))
    others = select(ServerRow.id).where(ServerRow.id != server_id, col(ServerRow.seen_at) > since)
    if session.exec(others).first() is None:  # else each would count it
        lasting = col(AttemptRow.outcome).is_(None)
        jumped = col(AttemptRow.uncounted_seconds) + jump
        session.exec(update(AttemptRow).where(lasting).values(uncounted_seconds=jumped))


def extend_all(session: Session, *, settings: Settings, now: datetime, note: Note | None = None) -> int:
    """Give every live lease its full time again: after a start of the server, or a jump of the clock."""
    live = select(JobRow).where(col(JobRow.state).in_(LEASED)).order_by(col(JobRow.number))
    rows = list(session.exec(live.with_for_update()))
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
