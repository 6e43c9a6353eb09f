"""What the server answers: jobs, files, events, checkpoints, evaluations. Every field is present, or it is None."""

from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from sftd.spec import JobSpec

T = TypeVar("T")


class Answer(BaseModel):
    """Base of all answers. A newer server may send more fields than this client knows: they are ignored."""

    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")


class JobState(StrEnum):
    """Where a job stands. `docs/states.md` draws the moves."""

    QUEUED = "queued"
    CLAIMED = "claimed"
    RUNNING = "running"
    STOPPING = "stopping"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)

    @property
    def leased(self) -> bool:
        """A worker holds the job."""
        return self in (JobState.CLAIMED, JobState.RUNNING, JobState.STOPPING)


class Want(StrEnum):
    """What the user wants of a job; the holder of the lease carries it out."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


class PauseReason(StrEnum):
    """Why a job is paused, or is about to be."""

    USER = "user"
    MAX_SECONDS = "max_seconds"
    MAX_GPU_SECONDS = "max_gpu_seconds"
    MAX_TOKENS = "max_tokens"
    DISK_LOW = "disk_low"  # goes on by itself when there is space again

    @property
    def is_budget(self) -> bool:
        return self in (PauseReason.MAX_SECONDS, PauseReason.MAX_GPU_SECONDS, PauseReason.MAX_TOKENS)


class FailureReason(StrEnum):
    """Why a job failed. `REMEDIES` says in one line who can fix it and how."""

    BAD_DATA = "bad_data"
    BAD_SPEC = "bad_spec"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_UNSUPPORTED = "model_unsupported"
    OUT_OF_MEMORY = "out_of_memory"
    DIVERGED = "diverged"
    DISK_FULL = "disk_full"
    WRONG_WORLD = "wrong_world"
    CHECKPOINT_CORRUPT = "checkpoint_corrupt"
    TRAINER_DIED = "trainer_died"
    TRAINER_ERROR = "trainer_error"
    WORKER_LOST = "worker_lost"
    WORKER_ERROR = "worker_error"
    STALLED = "stalled"
    DEPENDENCY_FAILED = "dependency_failed"


REMEDIES: dict[FailureReason, str] = {
    FailureReason.BAD_DATA: "Mend the named rows of the data file, upload it again and post the job again.",
    FailureReason.BAD_SPEC: "Change the named field of the spec and post the job again.",
    FailureReason.MODEL_NOT_FOUND: "Check base_model; a gated or private model needs HF_TOKEN in the worker's environment.",
    FailureReason.MODEL_UNSUPPORTED: "Choose another base_model, or turn off the option that the message names.",
    FailureReason.OUT_OF_MEMORY: "Lower max_seq_length or lora.rank, turn on gradient_checkpointing, use qlora, or more gpus.",
    FailureReason.DIVERGED: "Lower learning_rate or lengthen the warm-up; the last good checkpoint is kept.",
    FailureReason.DISK_FULL: "The box's owner frees disk space; then post the job again.",
    FailureReason.WRONG_WORLD: "Start as many processes as gpus says (torchrun --nproc_per_node).",
    FailureReason.CHECKPOINT_CORRUPT: "The box's owner checks the disk; no whole checkpoint was left to resume from.",
    FailureReason.TRAINER_DIED: "See the last lines of the log; a kill from outside is often the machine's memory running out.",
    FailureReason.TRAINER_ERROR: "See the last lines of the log; if they do not name a mistake of yours, report it as a bug.",
    FailureReason.WORKER_LOST: "The box's owner checks the worker; it vanished again and again without a new checkpoint.",
    FailureReason.WORKER_ERROR: "The box's owner looks into the worker's log.",
    FailureReason.STALLED: "See the stacks in the log for where it hung; retry goes on from the last checkpoint.",
    FailureReason.DEPENDENCY_FAILED: "Mend or retry the job that this one waits for, then retry this one.",
}


class Failure(Answer):
    """Why a job failed, what to do about it, and the end of its log."""

    reason: FailureReason
    message: str
    remedy: str
    log_tail: list[str]


class Job(Answer):
    """A job as the server knows it."""

    id: str
    object: Literal["job"] = "job"
    name: str | None
    state: JobState
    want: Want
    owner: str
    priority: int
    base_model: str
    method: str
    spec: JobSpec
    metadata: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    pause_reason: PauseReason | None = Field(None, description="Why it is paused, or about to be.")
    queue_position: int | None = Field(description="1 is next; None unless queued.")
    why_waiting: str | None = Field(None, description="What a queued job waits for, in words.")
    after: list[str] = Field([], description="Jobs that must have succeeded before this one runs.")
    retry_of: str | None = Field(None, description="The job that this one tries again.")
    clone_of: str | None = Field(None, description="The job that this one was copied from.")
    run_seconds: float = Field(0.0, description="Time that workers have held it, over all attempts.")
    gpu_seconds: float = Field(0.0, description="The same times its gpus.")
    estimated_finish_at: datetime | None
    attempt: int = Field(description="How often a worker has taken the job.")
    worker_id: str | None
    step: int
    total_steps: int | None
    progress: float = Field(description="Share of the steps done, 0 to 1.")
    loss: float | None = Field(description="Mean loss over the supervised tokens of the newest step.")
    eval_loss: float | None
    tokens_seen: int = Field(description="Tokens that went through the model.")
    tokens_per_second: float | None
    failure: Failure | None
    folder: str = Field(description="Where the job's files lie on the box.")


class Request(BaseModel):
    """Base of what a call's body holds: unknown fields are mistakes."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_by_name=True, validate_by_alias=True)


class RetryRequest(Request):
    """What `POST /jobs/{id}/retry` takes."""

    start: Literal["checkpoint", "scratch"] = Field(
        "checkpoint", alias="from", description="Go on from its newest checkpoint, or begin anew."
    )
    step: int | None = Field(None, ge=0, lt=2**53, description="Go on from the checkpoint of this step.")


class MoveRequest(Request):
    """What `POST /jobs/{id}/move` takes: one of the three."""

    position: Literal["first", "last"] | None = None
    before: str | None = Field(None, max_length=64, description="Id of a queued job of the same priority.")
    after: str | None = Field(None, max_length=64, description="Id of a queued job of the same priority.")


class PinRequest(Request):
    """What `POST /jobs/{id}/checkpoints/{step}/pin` takes."""

    name: str = Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")


class File(Answer):
    """An uploaded file."""

    id: str
    object: Literal["file"] = "file"
    filename: str
    purpose: str
    bytes: int
    sha256: str
    status: str = Field(description="uploaded (its rows are being checked), processed, or error.")
    status_details: str | None = Field(None, description="What is wrong with its rows, a line each.")
    format: str | None = Field(description="messages, prompt_completion, instruction, sharegpt or text.")
    num_rows: int | None
    created_at: datetime
    expires_at: datetime | None = Field(None, description="When it is deleted by itself.")


class RowPreview(Answer):
    """A row of a data file as it was understood."""

    line: int = Field(description="Its line; its item in a JSON array.")
    format: str | None = Field(description="messages, prompt_completion, instruction, sharegpt or text.")
    messages: list[dict[str, Any]] | None = Field(description="As the model's chat template gets them.")
    weights: list[int] = Field(description="1 for each message that carries the loss.")
    tools: list[dict[str, Any]] | None
    text: str | None
    problem: str | None = Field(description="What is wrong with the row; then nothing else of it is told.")


class Event(Answer):
    """Something that happened to a job: `queued`, `claimed`, `running`, `checkpoint`, `evaluation`, `succeeded`, …"""

    id: int
    job_id: str
    type: str
    message: str
    data: dict[str, Any]  # differs by type; every key is listed in docs/api.md
    attempt: int
    created_at: datetime


class LogLine(Answer):
    """One line of a job's log."""

    id: int
    attempt: int
    text: str
    created_at: datetime


class MetricPoint(Answer):
    """The metrics of one optimizer step: `point.loss`, `point.learning_rate`, …"""

    model_config = ConfigDict(extra="allow", ser_json_inf_nan="strings")
    __pydantic_extra__: dict[str, float] = Field(init=False)  # NaN and infinities come as strings
    step: int


class ManifestFile(Answer):
    """One file of a checkpoint or result."""

    bytes: int
    sha256: str


class Checkpoint(Answer):
    """A checkpoint that the server has on record."""

    job_id: str
    step: int
    attempt: int
    bytes: int
    files: dict[str, ManifestFile]
    metrics: dict[str, float]
    pinned: str | None = Field(None, description="The name it was pinned under: it is kept.")
    created_at: datetime


class Attempt(Answer):
    """One taking of a job by a worker."""

    job_id: str
    attempt: int
    worker_id: str
    boot_id: str
    claimed_at: datetime
    started_at: datetime | None = Field(description="When training began.")
    ended_at: datetime | None = Field(description="None while it lasts.")
    outcome: str | None = Field(
        description="succeeded, failed, cancelled, paused, released, preempted, lost, not_started; None while it lasts."
    )
    reason: str | None = Field(description="Why it failed, was paused or given back.")
    message: str | None
    start_step: int | None = Field(
        description="The step it went on from; -1 from scratch, None before it began."
    )
    gpus: int
    gpu_seconds: float


class Evaluation(Answer):
    """One evaluation, over all supervised tokens of the validation rows."""

    job_id: str
    step: int
    attempt: int
    eval_loss: float
    perplexity: float
    token_accuracy: float
    num_tokens: int
    created_at: datetime


class Worker(Answer):
    """A worker that has registered."""

    id: str
    boot_id: str
    gpus: int
    device: str
    labels: dict[str, str]
    versions: dict[str, str]
    seen_at: datetime
    job_ids: list[str]
    gpu_memory_gb: float | None = Field(None, description="Memory of its smallest GPU, in GiB; None on CPU.")
    draining: bool = Field(False, description="It takes no new jobs.")
    alive: bool = Field(True, description="Heard of lately.")


class StorageItem(Answer):
    """Something on the server's disk that goes, or has gone."""

    kind: str = Field(description="checkpoint, spool, file, blob, cache or leftover.")
    job_id: str | None
    name: str
    step: int | None = Field(description="Of a checkpoint.")
    bytes: int
    why: str


class Storage(Answer):
    """How full the server's disk is, with what, and what would be deleted next."""

    object: Literal["storage"] = "storage"
    total_bytes: int = Field(description="Size of the disk that the data folder lies on.")
    free_bytes: int
    reserve_bytes: int = Field(description="With less room than this, reports, uploads and claims wait.")
    low: bool = Field(description="They wait now.")
    bytes: dict[str, int] = Field(
        description="By kind: checkpoints, results, logs, leftovers, jobs_other, files, uploads, cache, models, database, ballast."
    )
    next: list[StorageItem] = Field(description="What would be deleted now; at most 1,000 items.")
    next_bytes: int = Field(description="All that would be deleted now.")


class Collected(Answer):
    """What was deleted."""

    object: Literal["collected"] = "collected"
    dry_run: bool = Field(description="Nothing was deleted; this is what would be.")
    freed_bytes: int
    removed: list[StorageItem] = Field(description="At most 1,000 items.")


class Key(Answer):
    """An access key, without its secret."""

    id: str
    name: str
    role: Literal["admin", "user", "worker"]
    created_at: datetime
    expires_at: datetime | None
    max_running_jobs: int | None = Field(None, description="Jobs of this key that may run at once.")
    max_queued_jobs: int | None = Field(None, description="Jobs of this key that may wait.")
    max_gpu_hours_per_month: float | None = Field(
        None, description="GPU-hours of a calendar month (UTC); then no job of this key is posted or started."
    )


class OwnKey(Key):
    """The key of the caller, and what is used of its limits."""

    running_jobs: int
    queued_jobs: int
    gpu_hours_this_month: float = Field(
        description="Of attempts that ended in this month, and of those that last."
    )
    month_ends_at: datetime = Field(
        description="When GPU-hours are counted anew: the next month's first day, UTC."
    )


class NewKey(Key):
    """A key just made: the only time its secret is shown."""

    secret: str


class KeyRequest(BaseModel):
    """What `POST /keys` takes."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")
    role: Literal["admin", "user", "worker"] = "user"
    expires_in_seconds: int | None = Field(None, ge=1, le=10 * 365 * 86400)
    max_running_jobs: int | None = Field(None, ge=1, le=10**6)
    max_queued_jobs: int | None = Field(None, ge=1, le=10**6)
    max_gpu_hours_per_month: float | None = Field(None, gt=0, le=10**9, allow_inf_nan=False)


class KeyChange(Request):
    """What `PATCH /keys/{key_id}` takes: what is left out stays, null takes it away."""

    expires_in_seconds: int | None = Field(
        None, ge=1, le=10 * 365 * 86400, description="From now on; null: it does not expire."
    )
    max_running_jobs: int | None = Field(None, ge=1, le=10**6)
    max_queued_jobs: int | None = Field(None, ge=1, le=10**6)
    max_gpu_hours_per_month: float | None = Field(None, gt=0, le=10**9, allow_inf_nan=False)


class AuditEntry(Answer):
    """A change that was made: who, what, when, from where."""

    id: int
    created_at: datetime
    key_id: str | None = Field(description="None for what the server did by itself.")
    key_name: str | None
    role: str | None
    action: str = Field(description="job.create, job.cancel, file.delete, key.create, …")
    target: str | None = Field(description="Id of what was changed.")
    address: str | None
    request_id: str | None
    details: dict[str, Any]  # differs by action


class Page(Answer, Generic[T]):
    """A page of a list. `next_after` is the cursor of the following page, or None."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    next_after: str | int | None


class ErrorBody(Answer):
    """The inside of every error answer."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(Answer):
    """The one error shape."""

    error: ErrorBody
