"""What jobs cost: the time that each has used, its budgets, and how much each owner has used lately.

An attempt costs the seconds from its claim to its end, times its gpus: while a worker holds a job, nobody else has them.
An owner's usage is halved every half-life, so that what was used last week does not count for ever. Beside it stands what
an owner has used in each month, which is never halved: a key's limit is held against it.
"""

import math
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import ColumnElement, bindparam, text
from sqlmodel import Session, and_, col, func, select, update

from sftd.protocol import InputFile
from sftd.schemas import PauseReason
from sftd.spec import JobSpec
from sftd_server.errors import Conflict
from sftd_server.tables import AttemptRow, FileRow, JobRow, UsageRow, UtcDateTime

HALF_LIFE_SECONDS = 86400.0
STEP_SECONDS = 1.0  # of a GPU, where no job of the kind has been seen yet
RECENT_JOBS = 500  # among these a job of the same kind is looked for


@dataclass(frozen=True)
class Ending:
    """How an attempt ended."""

    outcome: str
    reason: str | None
    message: str | None
    at: datetime


# ---------------------------------------------------------------- attempts


def is_newest_attempt() -> ColumnElement[bool]:
    """A condition for joining attempts to jobs: the newest of each, which holds the job while the job is leased."""
    return and_(col(AttemptRow.job) == col(JobRow.number), col(AttemptRow.attempt) == col(JobRow.attempt))


def live_attempt(session: Session, row: JobRow, *, lock: bool = False) -> AttemptRow | None:
    """The attempt that holds the job now."""
    query = (
        select(AttemptRow)
        .where(AttemptRow.job == row.number, AttemptRow.attempt == row.attempt)
        .where(col(AttemptRow.outcome).is_(None))
    )
    return session.exec(query.with_for_update() if lock else query).first()


def held_seconds(attempt: AttemptRow | None, now: datetime) -> float:
    """How long an attempt has lasted; not what the server's clock jumped by, and not after its worker had vanished."""
    if attempt is None:
        return 0.0
    lasted = (attempt.ended_at or now) - attempt.claimed_at
    return max(0.0, lasted.total_seconds() - attempt.uncounted_seconds)


def count_until(session: Session, attempt: AttemptRow, heard_at: datetime, now: datetime) -> None:
    """Its worker has vanished: what passed since that was heard of last is nobody's time."""
    counted = min(held_seconds(attempt, now), max(0.0, (heard_at - attempt.claimed_at).total_seconds()))
    here = (col(AttemptRow.job) == attempt.job, col(AttemptRow.attempt) == attempt.attempt)
    uncounted = (now - attempt.claimed_at).total_seconds() - counted
    session.exec(update(AttemptRow).where(*here).values(uncounted_seconds=uncounted))


def end_attempt(session: Session, row: JobRow, ended: Ending, *, half_life_seconds: float) -> None:
    """Write down how the job's attempt ended, and charge the job and its owner for it."""
    attempt = live_attempt(session, row, lock=True)
    if attempt is None:
        return
    here = (col(AttemptRow.job) == attempt.job, col(AttemptRow.attempt) == attempt.attempt)
    session.exec(
        update(AttemptRow)
        .where(*here, col(AttemptRow.outcome).is_(None))
        .values(outcome=ended.outcome, ended_at=ended.at, reason=ended.reason, message=ended.message)
    )
    seconds = held_seconds(attempt, ended.at)
    gpu_seconds = seconds * attempt.gpus
    used = row.used_gpu_seconds + gpu_seconds
    values: dict[str, float] = {"used_seconds": row.used_seconds + seconds, "used_gpu_seconds": used}
    if row.total_steps and row.step:
        values["expected_gpu_seconds"] = used / row.step * max(0, row.total_steps - row.step)
    session.exec(update(JobRow).where(col(JobRow.number) == row.number).values(**values))
    _charge(session, row.owner, gpu_seconds, ended.at, half_life_seconds)
    _charge_month(session, row.owner, gpu_seconds, ended.at)


def month_of(at: datetime) -> str:
    """The month of a moment, as GPU-hours are counted by: `2030-01`."""
    return f"{at.astimezone(UTC):%Y-%m}"


def _charge_month(session: Session, owner: str, gpu_seconds: float, at: datetime) -> None:
    added = text(
        "INSERT INTO gpu_month (owner, month, gpu_seconds) VALUES (:owner, :month, :seconds)"
        " ON CONFLICT (owner, month) DO UPDATE SET gpu_seconds = gpu_month.gpu_seconds + excluded.gpu_seconds"
    )
    values = {"owner": owner, "month": month_of(at), "seconds": gpu_seconds}
    session.connection().execute(added, values)


def _charge(
    session: Session, owner: str, gpu_seconds: float, now: datetime, half_life_seconds: float
) -> None:
    first = text(
        "INSERT INTO usage (owner, gpu_seconds, as_of) VALUES (:owner, 0, :now) ON CONFLICT (owner) DO NOTHING"
    ).bindparams(bindparam("now", type_=UtcDateTime))
    session.connection().execute(first, {"owner": owner, "now": now})
    row = session.exec(select(UsageRow).where(UsageRow.owner == owner).with_for_update()).one()
    values = {"gpu_seconds": decayed(row, now, half_life_seconds) + gpu_seconds, "as_of": now}
    session.exec(update(UsageRow).where(col(UsageRow.owner) == owner).values(**values))


def decayed(row: UsageRow, now: datetime, half_life_seconds: float) -> float:
    """GPU-seconds of an owner, as they count now."""
    age = max(0.0, (now - row.as_of).total_seconds())
    return row.gpu_seconds * math.pow(0.5, age / half_life_seconds)


# ---------------------------------------------------------------- budgets


def exhausted(row: JobRow, attempt: AttemptRow | None, now: datetime) -> PauseReason | None:
    """The budget that the job has used up, if it has."""
    seconds = held_seconds(attempt, now)
    used = {
        PauseReason.MAX_SECONDS: (row.max_seconds, row.used_seconds + seconds),
        PauseReason.MAX_GPU_SECONDS: (
            row.max_gpu_seconds,
            row.used_gpu_seconds + seconds * (attempt.gpus if attempt else 0),
        ),
        PauseReason.MAX_TOKENS: (row.max_tokens, row.tokens_seen),
    }
    return next((name for name, (most, so_far) in used.items() if most is not None and so_far >= most), None)


def require_budget(row: JobRow, attempt: AttemptRow | None, now: datetime) -> None:
    """Raises Conflict where the job would be paused again at once."""
    name = exhausted(row, attempt, now)
    if name is not None:
        most = getattr(row, name)
        raise Conflict(
            f"{row.id} has used up its {name} of {most:g}: raise it first, or set it to null, with"
            f' PATCH /jobs/{row.id} {{"{name}": …}}.',
            code="budget_exhausted",
            param=str(name),
        )


# ---------------------------------------------------------------- estimates


def expected_gpu_seconds(session: Session, spec: JobSpec, training: InputFile) -> float:
    """About what a job will take: its steps, times what a step took in the newest job of the kind that succeeded."""
    steps = spec.max_steps
    if steps is None:
        rows = session.exec(select(FileRow.num_rows).where(FileRow.id == training.file_id)).first() or 1
        steps = math.ceil(
            (spec.num_epochs or 1.0) * rows / (spec.batch_size * spec.gradient_accumulation_steps * spec.gpus)
        )
    newest = session.exec(select(func.max(JobRow.number))).one() or 0
    alike = (
        select(JobRow.used_gpu_seconds, JobRow.total_steps)
        .where(col(JobRow.number) > newest - RECENT_JOBS)
        .where(JobRow.base_model == spec.base_model, JobRow.method == spec.method)
        .where(JobRow.state == "succeeded", JobRow.gpus == spec.gpus, col(JobRow.total_steps) > 0)
        .order_by(col(JobRow.number).desc())
    )
    found = session.exec(alike.limit(1)).first()
    a_step = found[0] / found[1] if found and found[1] else STEP_SECONDS * spec.gpus
    most = (spec.max_gpu_seconds, spec.max_seconds and spec.max_seconds * spec.gpus)
    return min(steps * a_step, *(bound for bound in most if bound), 1e15)
