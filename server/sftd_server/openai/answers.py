"""A job, its events and its checkpoints as OpenAI's clients read them. Our own fields ride along."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from sqlmodel import Session, col, select

from sftd.schemas import Job, JobState, PauseReason, Want
from sftd.spec import JobSpec
from sftd_server.errors import NotFound
from sftd_server.ids import result_file_id
from sftd_server.jobs import metrics, queries
from sftd_server.jobs.queries import Context, JobFilter
from sftd_server.jobs.service import find_job
from sftd_server.openai import names
from sftd_server.openai.lists import OpenAIList, listed, unix
from sftd_server.openai.translation import hyperparameters_of
from sftd_server.tables import CheckpointRow, EventRow, FileRow, JobRow

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
_STATUSES: dict[JobState, Status] = {
    JobState.QUEUED: "queued",
    JobState.CLAIMED: "running",  # a worker has it, and may be fetching the model
    JobState.RUNNING: "running",
    JobState.STOPPING: "running",  # it is saving what it has
    JobState.PAUSED: "paused",
    JobState.SUCCEEDED: "succeeded",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}
_PARAM_OF_FAILURE = {"bad_data": "training_file", "model_not_found": "model", "model_unsupported": "model"}
_LEVELS: dict[str, Literal["warn", "error"]] = {
    "failed": "error",
    **dict.fromkeys(("retrying", "lease_expired", "worker_restarted", "checkpoint_corrupt"), "warn"),
}
_EVENT, _CHECKPOINT = "ftevent-", "ftckpt-"
_MAX_NUMBER = 2**63 - 1


class OpenAIModel(BaseModel):
    """Base of these answers. NaN and infinities are strings, as everywhere in this service."""

    model_config = ConfigDict(ser_json_inf_nan="strings")


class Hyperparameters(OpenAIModel):
    """What the job trains with; nothing is `auto` any more."""

    n_epochs: int | float | None
    batch_size: int = Field(description="Rows of a step, over all micro-steps and devices.")
    learning_rate_multiplier: float


class Supervised(OpenAIModel):
    """The one method that there is."""

    hyperparameters: Hyperparameters


class MethodAnswer(OpenAIModel):
    """Always supervised. `spec.method` says full, lora or qlora."""

    type: Literal["supervised"] = "supervised"
    supervised: Supervised


class JobError(OpenAIModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None
    remedy: str = Field(description="Who can mend it, and how.")


class WandbAnswer(OpenAIModel):
    """Where Weights & Biases shows the run."""

    project: str
    name: str | None
    entity: str | None
    tags: list[str]


class Integration(OpenAIModel):
    """What follows the run."""

    type: Literal["wandb"] = "wandb"
    wandb: WandbAnswer


class FineTuningJob(OpenAIModel):
    """A job. The fields after `method` are this service's own."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None = Field(description="Once it has succeeded, until its model is deleted.")
    organization_id: str = Field(description="The owner: the name of the key that posted it.")
    status: Status
    hyperparameters: Hyperparameters
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None = Field(description="Tokens that went through the model, once it is over.")
    error: JobError | None
    seed: int
    estimated_finish: int | None
    integrations: list[Integration]
    metadata: dict[str, str]
    method: MethodAnswer
    suffix: str | None
    state: JobState
    want: Want
    spec: JobSpec
    name: str | None
    priority: int
    started_at: int | None
    pause_reason: PauseReason | None
    queue_position: int | None
    why_waiting: str | None
    retry_of: str | None
    clone_of: str | None
    run_seconds: float
    gpu_seconds: float
    attempt: int
    worker_id: str | None
    step: int
    total_steps: int | None
    progress: float
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None


class FineTuningEvent(OpenAIModel):
    """Something that happened to a job. `data` holds its type on the own surface, and what belongs to it."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message"] = "message"
    data: dict[str, Any]  # differs by type


class CheckpointMetrics(OpenAIModel):
    """What was measured last at or before the step; None where nothing was."""

    step: int
    train_loss: float | None
    train_mean_token_accuracy: float | None
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    full_valid_loss: float | None
    full_valid_mean_token_accuracy: float | None


class FineTuningCheckpoint(OpenAIModel):
    """A whole checkpoint."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics


# ---------------------------------------------------------------- jobs


def job(session: Session, job_id: str, context: Context) -> FineTuningJob:
    """One job as it stands."""
    return _jobs(session, [queries.job(session, job_id, context)])[0]


def jobs(
    session: Session, wanted: JobFilter, context: Context, *, after: str | None, limit: int
) -> OpenAIList[FineTuningJob]:
    """Jobs, newest first."""
    page = queries.jobs(session, wanted, context, after=after, limit=limit)
    data = _jobs(session, page.data)
    return listed(data, [one.id for one in data], more=page.has_more)


def _jobs(session: Session, found: Sequence[Job]) -> list[FineTuningJob]:
    rows = {
        row.id: row
        for row in session.exec(select(JobRow).where(col(JobRow.id).in_([one.id for one in found])))
    }
    results = {one.id: result_file_id(one.id) for one in found}
    wanted = {*results.values(), *(one.spec.training_file for one in found)}
    files = dict(session.exec(select(FileRow.id, FileRow.num_rows).where(col(FileRow.id).in_(wanted))).all())
    return [
        _job(
            one,
            rows[one.id],
            base=names.base_name(session, one.base_model),
            num_rows=files.get(one.spec.training_file),
            result_files=[results[one.id]] if results[one.id] in files else [],
        )
        for one in found
    ]


def _job(
    found: Job, row: JobRow, *, base: str, num_rows: int | None, result_files: list[str]
) -> FineTuningJob:
    numbers = Hyperparameters(**hyperparameters_of(found.spec, num_rows))
    wandb, failure = found.spec.wandb, found.failure
    error = failure and JobError(
        code=failure.reason,
        message=failure.message,
        param=_PARAM_OF_FAILURE.get(failure.reason),
        remedy=failure.remedy,
    )
    return FineTuningJob(
        id=found.id,
        created_at=unix(found.created_at) or 0,
        finished_at=unix(found.finished_at),
        model=base,
        fine_tuned_model=names.result_name(row),
        organization_id=found.owner,
        status="validating_files" if _is_checked(row) else _STATUSES[found.state],
        hyperparameters=numbers,
        training_file=found.spec.training_file,
        validation_file=found.spec.validation_file,
        result_files=result_files,
        trained_tokens=found.tokens_seen if found.state.terminal else None,
        error=error,
        seed=found.spec.seed,
        estimated_finish=unix(found.estimated_finish_at),
        integrations=[Integration(wandb=WandbAnswer(**wandb.model_dump()))] if wandb else [],
        metadata=found.metadata,
        method=MethodAnswer(supervised=Supervised(hyperparameters=numbers)),
        suffix=row.suffix,
        state=found.state,
        want=found.want,
        spec=found.spec,
        name=found.name,
        priority=found.priority,
        started_at=unix(found.started_at),
        pause_reason=found.pause_reason,
        queue_position=found.queue_position,
        why_waiting=found.why_waiting,
        retry_of=found.retry_of,
        clone_of=found.clone_of,
        run_seconds=found.run_seconds,
        gpu_seconds=found.gpu_seconds,
        attempt=found.attempt,
        worker_id=found.worker_id,
        step=found.step,
        total_steps=found.total_steps,
        progress=found.progress,
        loss=found.loss,
        eval_loss=found.eval_loss,
        tokens_per_second=found.tokens_per_second,
    )


def _is_checked(row: JobRow) -> bool:
    return row.checking_files and row.state == JobState.QUEUED


# ---------------------------------------------------------------- events


def events(session: Session, job_id: str, *, after: str | None, limit: int) -> OpenAIList[FineTuningEvent]:
    """Events of a job, newest first."""
    query = select(EventRow).where(EventRow.job == find_job(session, job_id).number)
    if after is not None:
        query = query.where(col(EventRow.id) < _number_in(after, _EVENT))
    rows = session.exec(query.order_by(col(EventRow.id).desc()).limit(limit + 1)).all()
    data = [
        FineTuningEvent(
            id=f"{_EVENT}{row.id}",
            created_at=unix(row.created_at) or 0,
            level=_LEVELS.get(row.type, "info"),
            message=row.message,
            data={**row.data, "type": row.type, "attempt": row.attempt},
        )
        for row in rows[:limit]
    ]
    return listed(data, [event.id for event in data], more=len(rows) > limit)


def _number_in(cursor: str, prefix: str) -> int:
    """The number that an id ends with: what it names may be gone, its place is not."""
    digits = cursor.removeprefix(prefix)
    if not (cursor.startswith(prefix) and digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise NotFound(
            f"There is no {cursor!r} to go on after; give the last id of a page.",
            code="unknown_cursor",
            param="after",
        )
    return min(int(digits), _MAX_NUMBER)


# ---------------------------------------------------------------- checkpoints


def checkpoints(
    session: Session, job_id: str, *, after: str | None, limit: int
) -> OpenAIList[FineTuningCheckpoint]:
    """Whole checkpoints of a job, the newest step first; where a step was saved again, the newest."""
    row = find_job(session, job_id)
    by_step = {found.step: found for found in queries.whole_checkpoints(session, row.number)}
    steps = sorted(by_step, reverse=True)
    if after is not None:
        before = _number_in(after, f"{_CHECKPOINT}{job_id}-")
        steps = [step for step in steps if step < before]
    shown = steps[:limit]
    measured = _measured(session, row, shown)
    data = [_checkpoint(row, by_step[step], measured[step]) for step in shown]
    return listed(data, [one.id for one in data], more=len(steps) > limit)


def _checkpoint(row: JobRow, found: CheckpointRow, measured: CheckpointMetrics) -> FineTuningCheckpoint:
    return FineTuningCheckpoint(
        id=f"{_CHECKPOINT}{row.id}-{found.step}",
        created_at=unix(found.created_at) or 0,
        fine_tuned_model_checkpoint=names.name_of(row, found.step),
        fine_tuning_job_id=row.id,
        step_number=found.step,
        metrics=measured,
    )


def _measured(session: Session, row: JobRow, steps: Sequence[int]) -> dict[int, CheckpointMetrics]:
    losses = metrics.newest_at(session, row.number, "loss", steps)
    evaluated = queries.evaluations(session, row.id).data if steps else []
    found: dict[int, CheckpointMetrics] = {}
    for step in steps:
        last = next((one for one in reversed(evaluated) if one.step <= step), None)
        loss, accuracy = (last.eval_loss, last.token_accuracy) if last else (None, None)
        found[step] = CheckpointMetrics(
            step=step,
            train_loss=losses.get(step),
            train_mean_token_accuracy=None,  # no trainer measures it
            # Every evaluation goes over all validation rows.
            valid_loss=loss,
            valid_mean_token_accuracy=accuracy,
            full_valid_loss=loss,
            full_valid_mean_token_accuracy=accuracy,
        )
    return found
