"""Reads jobs and what belongs to them. Everything here runs on a connection that cannot write."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import text
from sqlmodel import Session, and_, col, func, or_, select

from sftd.schemas import (
    REMEDIES,
    Checkpoint,
    Evaluation,
    Event,
    Failure,
    FailureReason,
    Job,
    JobState,
    LogLine,
    ManifestFile,
    Page,
)
from sftd.spec import JobSpec
from sftd_server.errors import Conflict, NotFound
from sftd_server.jobs.metrics import from_storage, recent_seconds, windows
from sftd_server.jobs.service import find_job
from sftd_server.tables import CheckpointRow, EvaluationRow, EventRow, JobRow, LogLineRow

T = TypeVar("T")


@dataclass(frozen=True)
class JobFilter:
    """Which jobs to list."""

    states: Sequence[str]
    owner: str | None
    metadata: dict[str, str]


@dataclass(frozen=True)
class StoredFiles:
    """Files on record: the folder they lie in, relative to the data folder, and their manifest."""

    folder: str
    files: dict[str, ManifestFile]


def job(session: Session, job_id: str, *, jobs_folder: Path, now: datetime) -> Job:
    """One job as it stands."""
    return _job(session, find_job(session, job_id), jobs_folder, now)


def jobs(
    session: Session, wanted: JobFilter, *, after: str | None, limit: int, jobs_folder: Path, now: datetime
) -> Page[Job]:
    """Jobs, newest first."""
    query = select(JobRow).order_by(col(JobRow.number).desc()).limit(limit + 1)
    if wanted.states:
        query = query.where(col(JobRow.state).in_(wanted.states))
    if wanted.owner is not None:
        query = query.where(JobRow.owner == wanted.owner)
    for i, (key, value) in enumerate(wanted.metadata.items()):
        clause = text(
            f"EXISTS (SELECT 1 FROM json_each(job.labels) WHERE json_each.key = :key{i} AND json_each.value = :value{i})"
        )
        query = query.where(clause.bindparams(**{f"key{i}": key, f"value{i}": value}))
    if after is not None:
        query = query.where(col(JobRow.number) < find_job(session, after).number)
    rows = session.exec(query).all()
    data = [_job(session, row, jobs_folder, now) for row in rows[:limit]]
    more = len(rows) > limit
    return Page[Job](data=data, has_more=more, next_after=data[-1].id if more else None)


def events(session: Session, job_id: str, *, after: int, limit: int) -> Page[Event]:
    """Events of a job, oldest first."""
    number = find_job(session, job_id).number
    query = select(EventRow).where(EventRow.job == number, col(EventRow.id) > after)
    rows = session.exec(query.order_by(col(EventRow.id)).limit(limit + 1)).all()
    data = [
        Event(
            id=row.id or 0,
            job_id=job_id,
            type=row.type,
            message=row.message,
            data=row.data,
            attempt=row.attempt,
            created_at=row.created_at,
        )
        for row in rows[:limit]
    ]
    return _page(data, more=len(rows) > limit, cursor=data[-1].id if data else None)


def logs(session: Session, job_id: str, *, after: int, limit: int) -> Page[LogLine]:
    """Log lines of a job, oldest first."""
    number = find_job(session, job_id).number
    query = select(LogLineRow).where(LogLineRow.job == number, col(LogLineRow.id) > after)
    rows = session.exec(query.order_by(col(LogLineRow.id)).limit(limit + 1)).all()
    data = [
        LogLine(id=row.id or 0, attempt=row.attempt, text=row.text, created_at=row.created_at)
        for row in rows[:limit]
    ]
    return _page(data, more=len(rows) > limit, cursor=data[-1].id if data else None)


def checkpoints(session: Session, job_id: str) -> Page[Checkpoint]:
    """Whole checkpoints of a job by step; where a step was saved again, the newest."""
    rows = whole_checkpoints(session, find_job(session, job_id).number)
    by_step = {row.step: row for row in rows}  # in order of attempts: the last one stays
    return _page([_checkpoint(job_id, by_step[step]) for step in sorted(by_step)])


def evaluations(session: Session, job_id: str) -> Page[Evaluation]:
    """Evaluations of a job by step, as an uninterrupted run would have made them."""
    rows = _evaluations(session, find_job(session, job_id).number)
    return _page(
        [
            Evaluation(
                job_id=job_id,
                step=row.step,
                attempt=row.attempt,
                eval_loss=from_storage(row.eval_loss),
                perplexity=from_storage(row.perplexity),
                token_accuracy=from_storage(row.token_accuracy),
                num_tokens=row.num_tokens,
                created_at=row.created_at,
            )
            for row in rows
        ]
    )


def checkpoint_files(session: Session, job_id: str, step: int) -> StoredFiles:
    """The files of the newest whole checkpoint of a step."""
    rows = [row for row in whole_checkpoints(session, find_job(session, job_id).number) if row.step == step]
    if not rows:
        raise NotFound(
            f"{job_id} has no checkpoint of step {step}; GET /jobs/{job_id}/checkpoints lists them.",
            code="unknown_checkpoint",
        )
    return StoredFiles(f"jobs/{job_id}/checkpoints/{rows[-1].name}", _manifest(rows[-1].files))


def result_files(session: Session, job_id: str) -> StoredFiles:
    """The files of a job's result."""
    row = find_job(session, job_id)
    if not row.result:
        raise Conflict(
            f"{job_id} is {row.state} and has no result" + (" yet." if row.finished_at is None else "."),
            code="no_result",
        )
    return StoredFiles(f"jobs/{job_id}/results", _manifest(row.result))


def whole_checkpoints(session: Session, number: int | None) -> Sequence[CheckpointRow]:
    """Checkpoints that are not known to be corrupt, by step and attempt."""
    query = select(CheckpointRow).where(CheckpointRow.job == number, col(CheckpointRow.corrupt).is_(False))
    return session.exec(query.order_by(col(CheckpointRow.step), col(CheckpointRow.attempt))).all()


# ---------------------------------------------------------------- rows to answers


def _page(data: list[T], *, more: bool = False, cursor: int | None = None) -> Page[T]:
    return Page[T](data=data, has_more=more, next_after=cursor if more else None)


def _job(session: Session, row: JobRow, jobs_folder: Path, now: datetime) -> Job:
    state = JobState(row.state)
    evaluated = _evaluations(session, row.number) if row.attempt else []
    share = min(1.0, row.step / row.total_steps) if row.total_steps else 0.0
    return Job(
        id=row.id,
        name=row.name,
        state=state,
        want=row.want,
        owner=row.owner,
        priority=row.priority,
        base_model=row.base_model,
        method=row.method,
        spec=JobSpec.model_validate_json(row.spec),
        metadata=row.labels,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        queue_position=_queue_position(session, row) if state is JobState.QUEUED else None,
        estimated_finish_at=_estimated_finish(session, row, now) if state is JobState.RUNNING else None,
        attempt=row.attempt,
        worker_id=row.worker_id,
        step=row.step,
        total_steps=row.total_steps,
        progress=1.0 if state is JobState.SUCCEEDED else share,
        loss=row.loss,
        eval_loss=from_storage(evaluated[-1].eval_loss) if evaluated else None,
        tokens_seen=row.tokens_seen,
        tokens_per_second=row.tokens_per_second,
        failure=_failure(row),
        folder=str(jobs_folder / row.id),
    )


def _failure(row: JobRow) -> Failure | None:
    if row.state != JobState.FAILED:
        return None
    reason = FailureReason(row.failure_reason or FailureReason.WORKER_ERROR)
    return Failure(
        reason=reason,
        message=row.failure_message or "The worker gave no message.",
        remedy=REMEDIES[reason],
        log_tail=row.log_tail,
    )


def _queue_position(session: Session, row: JobRow) -> int:
    """1 for the job that goes next."""
    before = or_(
        col(JobRow.priority) > row.priority,
        and_(
            col(JobRow.priority) == row.priority,
            or_(
                col(JobRow.queue_rank) < row.queue_rank,
                and_(col(JobRow.queue_rank) == row.queue_rank, col(JobRow.number) < row.number),
            ),
        ),
    )
    query = select(func.count()).select_from(JobRow).where(JobRow.state == JobState.QUEUED, before)
    return session.exec(query).one() + 1


def _estimated_finish(session: Session, row: JobRow, now: datetime) -> datetime | None:
    if not row.total_steps or row.step >= row.total_steps:
        return None
    seconds = recent_seconds(session, row.number, row.attempt)
    if not seconds:
        return None
    left = (row.total_steps - row.step) * sum(seconds) / len(seconds)
    return now + timedelta(seconds=left) if left < 10 * 365 * 86400 else None


def _evaluations(session: Session, number: int | None) -> list[EvaluationRow]:
    query = select(EvaluationRow).where(EvaluationRow.job == number).order_by(col(EvaluationRow.step))
    rows = session.exec(query).all()
    if not rows:
        return []
    allowed = {window.attempt: window for window in windows(session, number)}
    # An evaluation is made *on* a step, the first one before any: its attempt's own start counts too.
    by_step: dict[int, EvaluationRow] = {}
    for row in rows:
        window = allowed.get(row.attempt)
        if window and window.after <= row.step <= window.last:
            kept = by_step.get(row.step)
            by_step[row.step] = row if kept is None or row.attempt > kept.attempt else kept
    return [by_step[step] for step in sorted(by_step)]


def _checkpoint(job_id: str, row: CheckpointRow) -> Checkpoint:
    files = _manifest(row.files)
    return Checkpoint(
        job_id=job_id,
        step=row.step,
        attempt=row.attempt,
        bytes=sum(file.bytes for file in files.values()),
        files=files,
        metrics=row.metrics,
        created_at=row.created_at,
    )


def _manifest(files: dict[str, Any]) -> dict[str, ManifestFile]:  # a JSON column
    return {name: ManifestFile.model_validate(file) for name, file in files.items()}
