"""Who goes next: the order of the queue, which worker may run which job, and for whom slots are kept free.

Order: priority; rank (below 0: given back by a worker, or moved ahead; above 0: moved to the end); fair share; age. The
fair share score of a job is its owner's GPU-seconds of late, plus those that it is expected to take, less the seconds it
has waited times its gpus: short jobs and those who have used little go first, and nobody waits for ever. Nothing here
writes.

Jobs that the limits of their owner's key hold back are passed over as if they were not there: nothing is kept free and
nobody makes room for them.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Float, case, literal, true
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlmodel import Session, and_, col, or_, select

from sftd.schemas import JobState, Want
from sftd.spec import RequiresSpec
from sftd_server.jobs import accounts, dependencies, limits
from sftd_server.jobs.states import LEASED
from sftd_server.settings import Settings
from sftd_server.tables import AttemptRow, JobRow, UsageRow, UtcDateTime, WorkerRow

ALIVE_SECONDS = 90.0  # a worker that was heard of so lately is there
SEEDED_SINCE = 2  # older workers cannot begin with another job's checkpoint
YIELDS_SINCE = 2  # older workers do not know how to make room
_PAGE = 32


class seconds_between(FunctionElement[float]):
    """Seconds from one moment to another, on either database."""

    inherit_cache = True
    type = Float()


@compiles(seconds_between, "sqlite")
def _on_sqlite(element: Any, compiler: SQLCompiler, **options: Any) -> str:  # SQLAlchemy's own
    since, until = (compiler.process(clause, **options) for clause in element.clauses)
    return f"((julianday({until}) - julianday({since})) * 86400.0)"


@compiles(seconds_between, "postgresql")
def _on_postgresql(element: Any, compiler: SQLCompiler, **options: Any) -> str:  # SQLAlchemy's own
    since, until = (compiler.process(clause, **options) for clause in element.clauses)
    return f"CAST(EXTRACT(EPOCH FROM (CAST({until} AS TIMESTAMP) - {since})) AS DOUBLE PRECISION)"


@dataclass(frozen=True)
class Place:
    """A worker process, as far as the choice of a job needs to know it."""

    id: str
    boot_id: str
    gpus: int
    free: int
    protocol: int
    gpu_memory_gb: float | None
    labels: dict[str, str]
    draining: bool = False
    alive: bool = True
    disk_free_bytes: int | None = None

    @property
    def process(self) -> tuple[str, str]:
        return self.id, self.boot_id


@dataclass(frozen=True)
class Waiting:
    """A job in the queue, as far as the choice needs to know it."""

    number: int
    id: str
    owner: str
    priority: int
    gpus: int
    requires: RequiresSpec | None
    seed_job: int | None
    needs_disk_bytes: int | None
    since: datetime  # when its wait began

    def suits(self, place: Place) -> bool:
        """May that worker run it at all, once its slots are free?"""
        return (
            self.gpus <= place.gpus
            and (self.seed_job is None or place.protocol >= SEEDED_SINCE)
            and (self.requires is None or has(place, self.requires))
        )

    def has_disk(self, place: Place) -> bool:
        """Is there the space that it was put aside for want of, as far as is known?"""
        return (self.needs_disk_bytes or 0) <= (
            place.disk_free_bytes if place.disk_free_bytes is not None else 2**63
        )


_COLUMNS = (
    JobRow.number,
    JobRow.id,
    JobRow.owner,
    JobRow.priority,
    JobRow.gpus,
    JobRow.requires,
    JobRow.seed_job,
    JobRow.needs_disk_bytes,
    JobRow.queued_at,
    JobRow.not_before,
)


def has(place: Place, requires: RequiresSpec) -> bool:
    """Has the worker what a job requires?"""
    if requires.worker is not None and requires.worker != place.id:
        return False
    if requires.gpu_memory_gb is not None and (place.gpu_memory_gb or 0) < requires.gpu_memory_gb:
        return False
    for label in requires.labels:
        name, equals, value = label.partition("=")
        if name not in place.labels or (equals and place.labels[name] != value):
            return False
    return True


def waiting(row: JobRow) -> Waiting:
    """What the choice needs to know of a job."""
    assert row.number is not None
    asked = (row.number, row.id, row.owner, row.priority, row.gpus, row.requires)
    return _waiting((*asked, row.seed_job, row.needs_disk_bytes, row.queued_at, row.not_before))


def _waiting(values: Sequence[Any]) -> Waiting:  # of _COLUMNS, in their order
    number, id, owner, priority, gpus, requires, seed_job, needs_disk, queued_at, not_before = values
    wanted = RequiresSpec.model_validate(requires) if requires else None
    since = max(queued_at, not_before)
    return Waiting(number, id, owner, priority, gpus, wanted, seed_job, needs_disk, since)


# ---------------------------------------------------------------- order


def held_back(session: Session, now: datetime) -> list[str]:
    """Owners of whose jobs none may start now."""
    return [owner for owner, found in limits.standings(session, now).items() if found.why_held]


def is_ready(now: datetime, held: Collection[str] = ()) -> ColumnElement[bool]:
    """A condition: the job could run now, if a worker were free for it. `held`: owners that are held back."""
    return and_(
        col(JobRow.owner).not_in(list(held)) if held else true(),
        col(JobRow.state) == JobState.QUEUED,
        col(JobRow.want) == Want.RUN,
        col(JobRow.not_before) <= now,
        col(JobRow.checking_files).is_(False),
        dependencies.are_met(),
    )


def usage(session: Session, settings: Settings, now: datetime) -> dict[str, float]:
    """GPU-seconds of late, by owner: of attempts that have ended, decayed, and of those that last."""
    if not settings.fair_share:
        return {}
    half_life = settings.fair_share_half_life_seconds
    used = {row.owner: accounts.decayed(row, now, half_life) for row in session.exec(select(UsageRow))}
    held = (
        select(JobRow.owner, AttemptRow)
        .join(AttemptRow, accounts.is_newest_attempt())
        .where(col(JobRow.state).in_(LEASED))
    )
    for owner, attempt in session.exec(held):
        used[owner] = used.get(owner, 0.0) + attempt.gpus * accounts.held_seconds(attempt, now)
    return {owner: seconds for owner, seconds in used.items() if seconds >= 1.0}


def score(settings: Settings, used: dict[str, float], now: datetime) -> ColumnElement[float]:
    """The fair share score of a job: the lowest goes first."""
    if not settings.fair_share:
        return literal(0.0)
    owners = case(used, value=col(JobRow.owner), else_=0.0) if used else literal(0.0)
    waited = seconds_between(col(JobRow.queued_at), literal(now, UtcDateTime))
    return owners + col(JobRow.expected_gpu_seconds) - waited * col(JobRow.gpus)


def order(
    settings: Settings, used: dict[str, float], now: datetime
) -> tuple[Any, ...]:  # what order_by takes
    """The queue's order: what to sort by."""
    return (
        col(JobRow.priority).desc(),
        col(JobRow.queue_rank),
        score(settings, used, now),
        col(JobRow.number),
    )


def comes_before(
    session: Session, row: JobRow, settings: Settings, used: dict[str, float], now: datetime
) -> tuple[ColumnElement[bool], ColumnElement[bool], ColumnElement[bool]]:
    """Conditions for the jobs that go before this one: by priority, by rank, by fair share or age."""
    scored = score(settings, used, now)
    own = session.exec(select(scored).where(JobRow.number == row.number)).one()
    same = col(JobRow.priority) == row.priority
    ties = and_(same, col(JobRow.queue_rank) == row.queue_rank)
    return (
        col(JobRow.priority) > row.priority,
        and_(same, col(JobRow.queue_rank) < row.queue_rank),
        and_(ties, or_(scored < own, and_(scored == own, col(JobRow.number) < row.number))),
    )


# ---------------------------------------------------------------- places


def places(session: Session, now: datetime) -> list[Place]:
    """All workers on record that are not known to be gone, by name, with the slots that no job holds."""
    held = held_slots(session)
    alive_since = now - timedelta(seconds=ALIVE_SECONDS)
    query = select(WorkerRow).where(col(WorkerRow.gone_at).is_(None))
    return [
        place_of(row, free=row.gpus - held.get((row.id, row.boot_id), 0), alive=row.seen_at >= alive_since)
        for row in session.exec(query.order_by(col(WorkerRow.id), col(WorkerRow.boot_id)))
    ]


def place_of(row: WorkerRow, *, free: int, alive: bool = True) -> Place:
    """A worker's row as a place."""
    return Place(
        id=row.id,
        boot_id=row.boot_id,
        gpus=row.gpus,
        free=max(0, free),
        protocol=row.protocol,
        gpu_memory_gb=row.gpu_memory_gb,
        labels=row.labels,
        draining=row.draining,
        alive=alive,
        disk_free_bytes=None if row.shares_data else row.disk_free_bytes,
    )


def held_slots(session: Session) -> dict[tuple[str, str], int]:
    """Slots that jobs hold, by worker process."""
    held: dict[tuple[str, str], int] = {}
    query = (
        select(AttemptRow.worker_id, AttemptRow.boot_id, AttemptRow.gpus)
        .join(JobRow, accounts.is_newest_attempt())
        .where(col(JobRow.state).in_(LEASED))
    )
    for worker_id, boot_id, gpus in session.exec(query):
        held[worker_id, boot_id] = held.get((worker_id, boot_id), 0) + gpus
    return held


# ---------------------------------------------------------------- the choice


def ready_jobs(
    session: Session, settings: Settings, now: datetime, *conditions: ColumnElement[bool]
) -> Iterator[Waiting]:
    """Jobs that could run now, in the queue's order; read page by page, since most askers take the first."""
    by = order(settings, usage(session, settings, now), now)
    ready = is_ready(now, held_back(session, now))
    query = select(*_COLUMNS).where(ready, *conditions).order_by(*by)  # type: ignore[call-overload]  # ten columns
    offset = 0
    while True:
        found = session.exec(query.limit(_PAGE).offset(offset)).all()
        yield from map(_waiting, found)
        if len(found) < _PAGE:
            return
        offset += _PAGE


def next_jobs(session: Session, place: Place, settings: Settings, now: datetime) -> Iterator[Waiting]:
    """Jobs for a worker that asks, best first; none behind a job that its slots are kept free for."""
    long_ago = now - timedelta(seconds=settings.reserve_seconds)
    room_made = select(JobRow.yield_to).where(
        col(JobRow.state).in_(LEASED), col(JobRow.yield_to).is_not(None)
    )
    overdue = and_(col(JobRow.queued_at) <= long_ago, col(JobRow.not_before) <= long_ago)
    may_be_kept = and_(col(JobRow.gpus) <= place.gpus, or_(overdue, col(JobRow.id).in_(room_made)))
    for job in ready_jobs(session, settings, now, or_(col(JobRow.gpus) <= place.free, may_be_kept)):
        if not job.suits(place) or not job.has_disk(place):
            continue
        if job.gpus <= place.free:
            yield job
        elif is_kept_for(session, job, place, settings, now):
            return


def is_kept_for(session: Session, job: Waiting, place: Place, settings: Settings, now: datetime) -> bool:
    """Are the worker's free slots kept for this job, which needs more of them? One worker keeps them: the one that makes
    room for it, else the one with the most free."""
    makers = session.exec(
        select(AttemptRow.worker_id, AttemptRow.boot_id)
        .join(JobRow, accounts.is_newest_attempt())
        .where(col(JobRow.state).in_(LEASED), JobRow.yield_to == job.id)
    ).all()
    if makers:
        return place.process in {(worker_id, boot_id) for worker_id, boot_id in makers}
    if job.since > now - timedelta(seconds=settings.reserve_seconds):
        return False
    keeper = keeper_for(job, places(session, now))
    return keeper is not None and keeper.process == place.process


def keeper_for(job: Waiting, known: Sequence[Place]) -> Place | None:
    """The worker that keeps its slots free for a job that has waited too long."""
    able = [place for place in known if place.alive and not place.draining and job.suits(place)]
    return max(able, key=lambda place: place.free, default=None)
