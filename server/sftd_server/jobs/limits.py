"""What the limits of a key leave its owner: jobs that wait, jobs that run, GPU-hours of a month.

A job is its owner's, and an owner is the key of that name; where the key is gone, nothing limits its jobs any more. An
attempt counts in the month (UTC) in which it ends, one that lasts in this month: both from the claim on.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlmodel import Session, col, func, or_, select

from sftd.schemas import JobState
from sftd_server.errors import LimitReached
from sftd_server.jobs import accounts
from sftd_server.jobs.states import LEASED
from sftd_server.tables import AttemptRow, GpuMonthRow, JobRow, KeyRow

_LIMITED = select(KeyRow).where(
    or_(
        col(KeyRow.max_running_jobs).is_not(None),
        col(KeyRow.max_queued_jobs).is_not(None),
        col(KeyRow.max_gpu_hours_per_month).is_not(None),
    )
)


@dataclass(frozen=True)
class Standing:
    """How an owner stands to the limits of the key."""

    owner: str
    max_running_jobs: int | None
    max_queued_jobs: int | None
    max_gpu_hours_per_month: float | None
    num_running: int
    gpu_hours: float  # of this month
    now: datetime

    @property
    def hours_used_up(self) -> str | None:
        """In words, where they are."""
        most = self.max_gpu_hours_per_month
        if most is None or self.gpu_hours < most:
            return None
        month = accounts.month_of(self.now)
        return f"{self.owner} has used {self.gpu_hours:,.2f} of the {most:g} GPU-hours of its key in {month}"

    @property
    def why_held(self) -> str | None:
        """Why no further job of the owner starts now; None where one may."""
        used_up = self.hours_used_up
        if used_up is not None:
            again = f"{next_month(self.now):%Y-%m-%d} 00:00 UTC"
            return f"{used_up}: its jobs start again on {again}, or when an admin raises max_gpu_hours_per_month."
        if self.num_left is not None and self.num_left <= 0:
            jobs = "1 job runs" if self.num_running == 1 else f"{self.num_running} jobs run"
            return f"{jobs} for {self.owner}, and its key allows no more (max_running_jobs {self.max_running_jobs})."
        return None

    @property
    def num_left(self) -> int | None:
        """Jobs that may still start beside those that run; None: any number."""
        return None if self.max_running_jobs is None else self.max_running_jobs - self.num_running


def standings(session: Session, now: datetime, *, owner: str | None = None) -> dict[str, Standing]:
    """Of all owners whose keys have limits, or of one."""
    rows = session.exec(_LIMITED if owner is None else _LIMITED.where(KeyRow.name == owner)).all()
    return _standings(session, rows, now) if rows else {}


def standing(session: Session, key: KeyRow, now: datetime) -> Standing:
    """Of the owner of one key, with or without limits."""
    return _standings(session, [key], now)[key.name]


def num_queued(session: Session, owner: str) -> int:
    """Jobs of an owner that wait."""
    here = (JobRow.owner == owner, JobRow.state == JobState.QUEUED)
    return session.exec(select(func.count()).select_from(JobRow).where(*here)).one()


def next_month(now: datetime) -> datetime:
    """When the next month begins."""
    return datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=UTC)


def require_place(session: Session, owner: str, now: datetime) -> None:
    """Before a job is queued: one more may wait, and there are GPU-hours left. Raises LimitReached.

    The key's row stays locked until the job is there, so that of two servers the second counts the first one's job.
    """
    found = _locked(session, owner, now)
    if found is None:
        return
    if found.hours_used_up is not None:
        raise LimitReached(
            f"{found.hours_used_up} (max_gpu_hours_per_month). Post it again from"
            f" {next_month(now):%Y-%m-%d} 00:00 UTC on, or ask an admin to raise that limit.",
            param="max_gpu_hours_per_month",
        )
    most = found.max_queued_jobs
    if most is None:
        return
    waiting = num_queued(session, owner)
    if waiting >= most:
        raise LimitReached(
            f"{owner} has {waiting} {'job' if waiting == 1 else 'jobs'} in the queue, and its key allows {most}"
            " (max_queued_jobs). Wait until one has started, cancel one, or ask an admin to raise that limit.",
            param="max_queued_jobs",
        )


def may_start(session: Session, owner: str, now: datetime) -> bool:
    """Before a job is handed out: whether its owner may have one more run. The key's row stays locked, as above."""
    found = _locked(session, owner, now)
    return found is None or found.why_held is None


def bounds_running(session: Session, owner: str) -> bool:
    """Whether jobs of this owner may wait for others of it to end."""
    here = (KeyRow.name == owner, col(KeyRow.max_running_jobs).is_not(None))
    return session.exec(select(KeyRow.id).where(*here)).first() is not None


def _locked(session: Session, owner: str, now: datetime) -> Standing | None:
    """None where nothing limits the owner: then nothing is locked."""
    if owner not in standings(session, now, owner=owner):
        return None
    session.exec(select(KeyRow.id).where(KeyRow.name == owner).with_for_update()).first()
    return standings(session, now, owner=owner).get(owner)  # read behind the lock


def _standings(session: Session, keys: Collection[KeyRow], now: datetime) -> dict[str, Standing]:
    names = [key.name for key in keys]
    here = (GpuMonthRow.month == accounts.month_of(now), col(GpuMonthRow.owner).in_(names))
    seconds = {row.owner: row.gpu_seconds for row in session.exec(select(GpuMonthRow).where(*here))}
    running = dict.fromkeys(names, 0)
    held = (
        select(JobRow.owner, AttemptRow)
        .join(AttemptRow, accounts.is_newest_attempt())
        .where(col(JobRow.state).in_(LEASED), col(JobRow.owner).in_(names))
    )
    for owner, attempt in session.exec(held):
        running[owner] += 1
        seconds[owner] = seconds.get(owner, 0.0) + attempt.gpus * accounts.held_seconds(attempt, now)
    return {
        key.name: Standing(
            owner=key.name,
            max_running_jobs=key.max_running_jobs,
            max_queued_jobs=key.max_queued_jobs,
            max_gpu_hours_per_month=key.max_gpu_hours_per_month,
            num_running=running[key.name],
            gpu_hours=seconds.get(key.name, 0.0) / 3600,
            now=now,
        )
        for key in keys
    }
