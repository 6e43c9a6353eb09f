"""Making room: a job of lower rank is asked to save, yield its slots and come back, so that a waiting one can run.

Policies: `priority` takes from jobs of lower priority alone; `fair_share` also from owners of the same priority who have
used far more lately. A victim keeps all its progress and queues again behind those that wait. No job takes the place of
one of higher priority, and none that of its own owner's at the same; the margin of fair share keeps two jobs from
taking turns.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement
from sqlmodel import Session, col, select, update

from sftd.schemas import JobState, Want
from sftd_server.db import touch
from sftd_server.jobs import accounts, limits, scheduling
from sftd_server.jobs.limits import Standing
from sftd_server.jobs.scheduling import YIELDS_SINCE, Place, Waiting
from sftd_server.jobs.service import Note, add_event
from sftd_server.jobs.states import LEASED
from sftd_server.settings import Settings
from sftd_server.tables import AttemptRow, JobRow

MIN_RUN_SECONDS = 60.0  # a job that has just begun would have been started for nothing
MAX_LOOKED_AT = 50  # waiting jobs, in one look
FAIR_FACTOR = 2.0  # an owner is over-served with so many times the usage of the one who waits
FAIR_SECONDS = 3600.0  # and so many GPU-seconds more


@dataclass(frozen=True)
class _Running:
    """A job that could be asked to yield."""

    row: JobRow
    process: tuple[str, str]
    gpus: int
    started_at: datetime


def make_room(session: Session, settings: Settings, now: datetime) -> int:
    """Ask running jobs to yield to the first waiting job that this helps. Returns how many were asked."""
    # Locked first: of two servers that look at once, the second then sees what the first has asked for.
    running = _running(session, now) if settings.preemption != "off" else []
    yielded_to = _call_off(session, settings, now)
    if not running:
        return 0
    used = scheduling.usage(session, settings, now)
    limited = limits.standings(session, now)
    places = [p for p in scheduling.places(session, now) if p.alive and not p.draining]
    grace = now - timedelta(seconds=settings.preempt_after_seconds)
    for i, job in enumerate(scheduling.ready_jobs(session, settings, now)):
        if i == MAX_LOOKED_AT:
            break
        able = [place for place in places if job.suits(place) and job.has_disk(place)]
        if job.since > grace or job.id in yielded_to or _is_spoken_for(job, yielded_to.values(), limited):
            continue
        if any(job.gpus <= place.free for place in able):
            continue
        victims = _fewest(job, able, [r for r in running if _gives_way(r, job, settings, used)])
        if victims:
            return sum(_ask(session, victim, job, now) for victim in victims)
    return 0


def _is_spoken_for(job: Waiting, owners: Iterable[str], limited: Mapping[str, Standing]) -> bool:
    """Is room being made already for as many jobs of its owner as may still start?"""
    left = limited[job.owner].num_left if job.owner in limited else None
    return left is not None and sum(owner == job.owner for owner in owners) >= left


def _call_off(session: Session, settings: Settings, now: datetime) -> dict[str, str]:
    """Take wishes back whose job does not wait any more, or is held back; return the jobs that room is being made for,
    with their owners."""
    query = select(JobRow).where(col(JobRow.state).in_(LEASED), col(JobRow.yield_to).is_not(None))
    asked = session.exec(query.with_for_update()).all()
    named = select(JobRow.id, JobRow.owner).where(
        JobRow.state == JobState.QUEUED, col(JobRow.id).in_([row.yield_to for row in asked])
    )
    held = scheduling.held_back(session, now) if asked else ()
    waiting = {job_id: owner for job_id, owner in session.exec(named) if owner not in held}
    for row in asked:
        told = row.state == JobState.STOPPING  # its worker is at it already
        if not told and (settings.preemption == "off" or row.yield_to not in waiting):
            session.exec(update(JobRow).where(*_as_seen(row)).values(yield_to=None))
            touch(session, f"want:{row.id}")
    return waiting


def _running(session: Session, now: datetime) -> list[_Running]:
    query = (
        select(JobRow, AttemptRow)
        .join(AttemptRow, accounts.is_newest_attempt())
        .where(JobRow.state == JobState.RUNNING, JobRow.want == Want.RUN, col(JobRow.yield_to).is_(None))
        .where(col(AttemptRow.protocol) >= YIELDS_SINCE)
        .where(col(AttemptRow.started_at) <= now - timedelta(seconds=MIN_RUN_SECONDS))
        .order_by(col(JobRow.number))
        .with_for_update(of=JobRow)
    )
    found = []
    for row, attempt in session.exec(query):
        assert attempt.started_at is not None
        process = (attempt.worker_id, attempt.boot_id)
        found.append(_Running(row, process, attempt.gpus, attempt.started_at))
    return found


def _gives_way(running: _Running, job: Waiting, settings: Settings, used: dict[str, float]) -> bool:
    """May a waiting job take the place of this running one?"""
    row = running.row
    if row.priority != job.priority:
        return row.priority < job.priority
    if settings.preemption != "fair_share" or row.owner == job.owner:
        return False
    theirs, ours = used.get(row.owner, 0.0), used.get(job.owner, 0.0)
    return theirs > FAIR_FACTOR * ours and theirs > ours + FAIR_SECONDS


def _fewest(job: Waiting, places: Sequence[Place], candidates: Sequence[_Running]) -> list[_Running]:
    """The fewest jobs on one worker whose slots make room for the waiting one; of equals those that began last."""
    best: list[_Running] = []
    for place in places:
        here = [running for running in candidates if running.process == place.process]
        chosen = _chosen(job.gpus - place.free, here)
        if chosen and (not best or _cost(chosen) < _cost(best)):
            best = chosen
    return best


def _chosen(num_slots: int, running: list[_Running]) -> list[_Running]:
    """Jobs of at least so many slots together. The largest first is the fewest; the last of them is then the smallest
    that will do, and among those the one that began last."""
    left = sorted(running, key=lambda r: (r.gpus, -r.row.priority, r.started_at), reverse=True)
    chosen: list[_Running] = []
    while num_slots > 0:
        if not left:
            return []
        enough = [r for r in left if r.gpus >= num_slots]
        if enough:
            last = max(enough, key=lambda r: (-r.row.priority, -r.gpus, r.started_at))
            return [*chosen, last]
        chosen.append(left.pop(0))
        num_slots -= chosen[-1].gpus
    return chosen


def _cost(victims: list[_Running]) -> tuple[int, int, float]:
    return (
        len(victims),
        sum(victim.row.priority for victim in victims),
        -min(victim.started_at.timestamp() for victim in victims),
    )


def _ask(session: Session, victim: _Running, job: Waiting, now: datetime) -> int:
    row = victim.row
    asked = session.exec(update(JobRow).where(*_as_seen(row)).values(yield_to=job.id)).rowcount
    if asked:
        data = {"make_room_for": job.id}
        add_event(session, row, Note("preempting", f"Asked to make room for {job.id}.", data), now)
        touch(session, f"want:{row.id}")
    return asked


def _as_seen(row: JobRow) -> tuple[ColumnElement[bool], ...]:
    return (
        col(JobRow.number) == row.number,
        col(JobRow.state) == row.state,
        col(JobRow.want) == row.want,
        col(JobRow.attempt) == row.attempt,
        col(JobRow.yield_to).is_not_distinct_from(row.yield_to),
    )
