"""Reads jobs and what belongs to them. Everything here runs on a connection that cannot write."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Text, cast, text
from sqlmodel import Session, col, select

from sftd.schemas import (
    REMEDIES,
    Attempt,
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
    PauseReason,
    Want,
)
from sftd.spec import JobSpec
from sftd_server.cursors import number_of
from sftd_server.errors import Conflict, NotFound
from sftd_server.jobs import accounts
from sftd_server.jobs.metrics import from_storage, recent_seconds, windows
from sftd_server.jobs.service import find_job
from sftd_server.jobs.waiting import Queue
from sftd_server.settings import Settings
from sftd_server.tables import AttemptRow, CheckpointRow, EvaluationRow, EventRow, JobRow, LogLineRow

T = TypeVar("T")


@dataclass(frozen=True)
class JobFilter:
    """Which jobs to list."""

    states: Sequence[str]
    owner: str | None
    metadata: dict[str, str]
    without_metadata: bool = False  # those that have none


@dataclass(frozen=True)
class StoredFiles:
    """Files on record: the folder they lie in, relative to the data folder, and their manifest."""

    folder: str
    files: dict[str, ManifestFile]


@dataclass(frozen=True)
class Context:
    """What an answer about a job depends on besides its rows."""

    settings: Settings
    now: datetime

    @property
    def jobs_folder(self) -> Path:
        return self.settings.data / "jobs"


def job(session: Session, job_id: str, context: Context) -> Job:
    """One job as it stands; of a queued one also who goes before it, and why."""
    row = find_job(session, job_id)
    queue = Queue(session, context.settings, context.now)
    return _job(session, row, context, queue, thoroughly=True)


def jobs(
    session: Session, wanted: JobFilter, context: Context, *, after: str | None, limit: int
) -> Page[Job]:
    """Jobs, newest first."""
    query = select(JobRow).order_by(col(JobRow.number).desc()).limit(limit + 1)
    if wanted.states:
        query = query.where(col(JobRow.state).in_(wanted.states))
    if wanted.owner is not None:
        query = query.where(JobRow.owner == wanted.owner)
    sqlite = session.connection().dialect.name == "sqlite"
    for i, (key, value) in enumerate(wanted.metadata.items()):
        each = "json_each" if sqlite else "json_each_text"
        clause = text(
            f"EXISTS (SELECT 1 FROM {each}(job.labels) AS pair WHERE pair.key = :key{i} AND pair.value = :value{i})"
        )
        query = query.where(clause.bindparams(**{f"key{i}": key, f"value{i}": value}))
    if wanted.without_metadata:
        query = query.where(cast(col(JobRow.labels), Text) == "{}")
    if after is not None:
        query = query.where(col(JobRow.number) < _cursor(session, after))
    rows = session.exec(query).all()
    queue = Queue(session, context.settings, context.now)
    data = [_job(session, row, context, queue, thoroughly=False) for row in rows[:limit]]
    more = len(rows) > limit
    return Page[Job](data=data, has_more=more, next_after=data[-1].id if more else None)


def _cursor(session: Session, after: str) -> int:
    """Where a list of jobs goes on, also after one that has been deleted. Raises NotFound."""
    number = number_of(session, JobRow, after)
    if number is None:
        raise NotFound(f"There is no job {after!r}; GET /jobs lists them.", code="unknown_job")
    return number


def events(
    session: Session, job_id: str, *, after: int, limit: int, attempt: int | None = None
) -> Page[Event]:
    """Events of a job, or of one attempt, oldest first."""
    number = find_job(session, job_id).number
    query = select(EventRow).where(EventRow.job == number, col(EventRow.id) > after)
    if attempt is not None:
        query = query.where(EventRow.attempt == attempt)
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


def logs(
    session: Session, job_id: str, *, after: int, limit: int, attempt: int | None = None
) -> Page[LogLine]:
    """Log lines of a job, or of one attempt, oldest first."""
    number = find_job(session, job_id).number
    query = select(LogLineRow).where(LogLineRow.job == number, col(LogLineRow.id) > after)
    if attempt is not None:
        query = query.where(LogLineRow.attempt == attempt)
    rows = session.exec(query.order_by(col(LogLineRow.id)).limit(limit + 1)).all()
    data = [
        LogLine(id=row.id or 0, attempt=row.attempt, text=row.text, created_at=row.created_at)
        for row in rows[:limit]
    ]
    return _page(data, more=len(rows) > limit, cursor=data[-1].id if data else None)


def attempts(session: Session, job_id: str, now: datetime) -> Page[Attempt]:
    """Attempts of a job, the first one first."""
    number = find_job(session, job_id).number
    query = select(AttemptRow).where(AttemptRow.job == number).order_by(col(AttemptRow.attempt))
    return _page(
        [
            Attempt(
                job_id=job_id,
                attempt=row.attempt,
                worker_id=row.worker_id,
                boot_id=row.boot_id,
                claimed_at=row.claimed_at,
                started_at=row.started_at,
                ended_at=row.ended_at,
                outcome=row.outcome,
                reason=row.reason,
                message=row.message,
                start_step=row.start_step,
                gpus=row.gpus,
                gpu_seconds=accounts.held_seconds(row, now) * row.gpus,
            )
            for row in session.exec(query)
        ]
    )


def checkpoints(session: Session, job_id: str) -> Page[Checkpoint]:
    """Whole checkpoints of a job by step; where a step was saved again, the newest."""
    rows = whole_checkpoints(session, find_job(session, job_id).number)
    by_step = {row.step: row for row in rows}  # in order of attempts: the last one stays
    return _page([checkpoint_answer(job_id, by_step[step]) for step in sorted(by_step)])


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
    row = whole_checkpoint(session, find_job(session, job_id), step)
    return StoredFiles(f"jobs/{job_id}/checkpoints/{row.name}", _manifest(row.files))


def result_files(session: Session, job_id: str) -> StoredFiles:
    """The files of a job's result."""
    row = find_job(session, job_id)
    if row.result_deleted_at is not None:
        raise NotFound(f"The model that {job_id} made has been deleted.", code="result_deleted")
    if not row.result:
        raise Conflict(
            f"{job_id} is {row.state} and has no result" + (" yet." if row.finished_at is None else "."),
            code="no_result",
        )
    return StoredFiles(f"jobs/{job_id}/results", _manifest(row.result))


def whole_checkpoint(session: Session, job: JobRow, step: int) -> CheckpointRow:
    """The newest whole checkpoint of a step. Raises NotFound."""
    rows = [row for row in whole_checkpoints(session, job.number) if row.step == step]
    if not rows:
        raise NotFound(
            f"{job.id} has no checkpoint of step {step}; GET /jobs/{job.id}/checkpoints lists them.",
            code="unknown_checkpoint",
        )
    return rows[-1]


def whole_checkpoints(session: Session, number: int | None) -> Sequence[CheckpointRow]:
    """Checkpoints that are there and not known to be corrupt, by step and attempt."""
    query = (
        select(CheckpointRow)
        .where(CheckpointRow.job == number, col(CheckpointRow.corrupt).is_(False))
        .where(col(CheckpointRow.deleted_at).is_(None))
    )
    return session.exec(query.order_by(col(CheckpointRow.step), col(CheckpointRow.attempt))).all()


# ---------------------------------------------------------------- rows to answers


def _page(data: list[T], *, more: bool = False, cursor: int | None = None) -> Page[T]:
    return Page[T](data=data, has_more=more, next_after=cursor if more else None)


def _job(session: Session, row: JobRow, context: Context, queue: Queue, *, thoroughly: bool) -> Job:
    state, now = JobState(row.state), context.now
    spec = JobSpec.model_validate_json(row.spec)
    position = queue.position(row) if state is JobState.QUEUED else None
    live = accounts.live_attempt(session, row) if state.leased else None
    held_seconds = accounts.held_seconds(live, now)
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
        spec=spec,
        metadata=row.labels,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        pause_reason=_pause_reason(row),
        queue_position=position,
        why_waiting=None if position is None else queue.why(row, position=position if thoroughly else None),
        after=spec.after,
        retry_of=row.retry_of,
        clone_of=row.clone_of,
        run_seconds=row.used_seconds + held_seconds,
        gpu_seconds=row.used_gpu_seconds + held_seconds * row.gpus,
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
        folder=str(context.jobs_folder / row.id),
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


def _pause_reason(row: JobRow) -> PauseReason | None:
    pausing = row.want == Want.PAUSE and not JobState(row.state).terminal
    if row.state != JobState.PAUSED and not pausing:
        return None
    return PauseReason(row.pause_reason or PauseReason.USER)


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


def checkpoint_answer(job_id: str, row: CheckpointRow) -> Checkpoint:
    """A checkpoint as it is answered."""
    files = _manifest(row.files)
    return Checkpoint(
        job_id=job_id,
        step=row.step,
        attempt=row.attempt,
        bytes=sum(file.bytes for file in files.values()),
        files=files,
        metrics=row.metrics,
        pinned=row.pinned,
        created_at=row.created_at,
    )


def _manifest(files: dict[str, Any]) -> dict[str, ManifestFile]:  # a JSON column
    return {name: ManifestFile.model_validate(file) for name, file in files.items()}
