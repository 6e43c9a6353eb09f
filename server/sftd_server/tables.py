"""The tables. Every schema change is a new migration under migrations/versions.

Times are UTC, ids are text with a readable prefix, enums are text. `job.number` is the internal key of a job: it
keeps the many rows of metrics and logs small, and orders the queue.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, SQLModel

# 64 bits on every database. SQLite's INTEGER has them, and only INTEGER makes a primary key count up by itself.
Int64 = BigInteger().with_variant(Integer(), "sqlite")


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, stored in UTC without a zone, read back with one."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class KeyRow(SQLModel, table=True):
    """An access key. The secret itself is nowhere: only its sha256."""

    __tablename__ = "key"
    __table_args__ = (CheckConstraint("role in ('admin','user','worker')", name="key_role"),)

    id: str = Field(primary_key=True)
    name: str = Field(unique=True)
    role: str
    secret_sha256: str = Field(unique=True)
    created_at: datetime = Field(sa_type=UtcDateTime)
    expires_at: datetime | None = Field(sa_type=UtcDateTime)
    max_running_jobs: int | None = Field(default=None, sa_type=Int64)  # None: as many as there are slots
    max_queued_jobs: int | None = Field(default=None, sa_type=Int64)
    max_gpu_hours_per_month: float | None = None


class FileRow(SQLModel, table=True):
    """An uploaded file; its content is the blob of that hash."""

    __tablename__ = "file"

    number: int | None = Field(default=None, primary_key=True, sa_type=Int64)
    id: str = Field(unique=True)
    owner: str
    filename: str
    purpose: str
    bytes: int = Field(sa_type=Int64)
    sha256: str = Field(index=True)
    status: str  # uploaded, processed or error
    format: str | None
    num_rows: int | None = Field(sa_type=Int64)
    created_at: datetime = Field(sa_type=UtcDateTime)
    status_details: str | None = None  # what is wrong with its rows
    expires_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class JobRow(SQLModel, table=True):
    """A job: what was asked for, where it stands, and who holds its lease."""

    __tablename__ = "job"
    __table_args__ = (
        CheckConstraint(
            "state in ('queued','claimed','running','stopping','paused','succeeded','failed','cancelled')",
            name="job_state",
        ),
        CheckConstraint("want in ('run','pause','cancel')", name="job_want"),
        CheckConstraint(
            "(state in ('claimed','running','stopping')) = (token_sha256 is not null)", name="job_token"
        ),
        CheckConstraint("(token_sha256 is not null) = (lease_until is not null)", name="job_lease"),
        CheckConstraint(
            "(state in ('succeeded','failed','cancelled')) = (finished_at is not null)", name="job_finished"
        ),
        UniqueConstraint("owner", "idempotency_key"),
        Index("job_lease_until", "lease_until"),
        Index("job_queue", "state", "priority", "queue_rank", "number"),
        Index("job_owner_body", "owner", "body_sha256"),
        {"sqlite_autoincrement": True},
    )

    number: int | None = Field(default=None, primary_key=True, sa_type=Int64)
    id: str = Field(unique=True)
    owner: str
    idempotency_key: str | None
    body_sha256: str

    # What was asked for.
    name: str | None
    priority: int = Field(sa_type=Int64)
    gpus: int = Field(sa_type=Int64)
    base_model: str
    method: str
    spec: str  # JobSpec as JSON
    labels: dict[str, str] = Field(sa_type=JSON)  # the spec's metadata
    inputs: dict[str, Any] = Field(sa_type=JSON)  # Inputs as JSON: files pinned by hash, and the base
    created_at: datetime = Field(sa_type=UtcDateTime)
    requires: dict[str, Any] | None = Field(
        default=None, sa_type=JSON
    )  # the spec's, for matching with workers
    retry_of: str | None = None  # ids of jobs
    clone_of: str | None = None
    seed_job: int | None = Field(default=None, sa_type=Int64)  # begin from this job's checkpoint
    seed_checkpoint: str | None = None  # and this one of it
    suffix: str | None = None  # part of the name of what it makes
    checking_files: bool = False  # not to be claimed before its files have been checked

    # Budgets, and what has been used of them by attempts that have ended.
    max_seconds: float | None = None
    max_gpu_seconds: float | None = None
    max_tokens: int | None = Field(default=None, sa_type=Int64)
    used_seconds: float = 0.0
    used_gpu_seconds: float = 0.0
    expected_gpu_seconds: float = 0.0  # what the scheduler takes it to need

    # Where it stands.
    state: str
    want: str = "run"
    pause_reason: str | None = None  # schemas.PauseReason
    yield_to: str | None = None  # the job that it shall make room for
    needs_disk_bytes: int | None = Field(
        default=None, sa_type=Int64
    )  # paused for want of space: goes on when there is
    queued_at: datetime = Field(sa_type=UtcDateTime)  # since when it waits
    not_before: datetime = Field(sa_type=UtcDateTime)
    queue_rank: int = Field(default=0, sa_type=Int64)  # below 0: released by a worker, goes first
    attempt: int = Field(default=0, sa_type=Int64)
    failures: int = Field(default=0, sa_type=Int64)
    lost_count: int = Field(default=0, sa_type=Int64)
    lost_step: int = Field(default=-1, sa_type=Int64)  # newest checkpoint at the last loss
    stalls: int = Field(default=0, sa_type=Int64)  # how often it hung
    started_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    finished_at: datetime | None = Field(default=None, sa_type=UtcDateTime)

    # Who holds it.
    token_sha256: str | None = None
    lease_until: datetime | None = Field(default=None, sa_type=UtcDateTime)
    start_by: datetime | None = Field(default=None, sa_type=UtcDateTime)
    worker_id: str | None = None

    # How far it is.
    step: int = Field(default=0, sa_type=Int64)
    total_steps: int | None = Field(default=None, sa_type=Int64)
    loss: float | None = None
    tokens_seen: int = Field(default=0, sa_type=Int64)
    tokens_per_second: float | None = None

    # How it ended.
    failure_reason: str | None = None
    failure_message: str | None = None
    log_tail: list[str] = Field(default=[], sa_type=JSON)
    result: dict[str, Any] | None = Field(default=None, sa_type=JSON)  # the result's manifest
    result_deleted_at: datetime | None = Field(
        default=None, sa_type=UtcDateTime
    )  # somebody deleted the model


class AttemptRow(SQLModel, table=True):
    """One taking of a job by a worker. `outcome` is None while it lasts."""

    __tablename__ = "attempt"
    __table_args__ = (
        ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        UniqueConstraint("worker_id", "request_id"),
        {"sqlite_with_rowid": False},
    )

    job: int = Field(primary_key=True, sa_type=Int64)
    attempt: int = Field(primary_key=True, sa_type=Int64)
    worker_id: str
    boot_id: str
    request_id: str
    token_sha256: str
    claimed_at: datetime = Field(sa_type=UtcDateTime)
    ended_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    outcome: str | None = None
    start_step: int | None = Field(
        default=None, sa_type=Int64
    )  # -1: from scratch; metrics after it are this attempt's
    started_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    gpus: int = Field(default=1, sa_type=Int64)
    uncounted_seconds: float = 0.0  # of it: the server's clock jumped, or its worker was gone
    protocol: int = Field(default=1, sa_type=Int64)  # what its worker speaks
    reason: str | None = None  # why it failed, was paused or given back
    message: str | None = None


class DependencyRow(SQLModel, table=True):
    """`job` may run only when `needs` has succeeded."""

    __tablename__ = "dependency"
    __table_args__ = (
        ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        ForeignKeyConstraint(["needs"], ["job.number"], ondelete="CASCADE"),
        Index("dependency_needs", "needs"),
        {"sqlite_with_rowid": False},
    )

    job: int = Field(primary_key=True, sa_type=Int64)
    needs: int = Field(primary_key=True, sa_type=Int64)


class StreamRow(SQLModel, table=True):
    """How far a numbered stream of an attempt has come."""

    __tablename__ = "stream"
    __table_args__ = (
        ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        {"sqlite_with_rowid": False},
    )

    job: int = Field(primary_key=True, sa_type=Int64)
    attempt: int = Field(primary_key=True, sa_type=Int64)
    kind: str = Field(primary_key=True)
    next_seq: int = Field(default=0, sa_type=Int64)
    last_seq: int | None = Field(default=None, sa_type=Int64)  # where the newest batch began
    last_sha256: str | None = None  # of its items


class MetricNameRow(SQLModel, table=True):
    """Metric names, stored once."""

    __tablename__ = "metric_name"

    id: int | None = Field(default=None, primary_key=True, sa_type=Int64)
    name: str = Field(unique=True)


class JobMetricRow(SQLModel, table=True):
    """Which metric names a job has."""

    __tablename__ = "job_metric"
    __table_args__ = (
        ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        ForeignKeyConstraint(["name_id"], ["metric_name.id"]),
        {"sqlite_with_rowid": False},
    )

    job: int = Field(primary_key=True, sa_type=Int64)
    name_id: int = Field(primary_key=True, sa_type=Int64)


class MetricRow(SQLModel, table=True):
    """One value. NULL stands for NaN, which SQLite cannot store; infinities are kept."""

    __tablename__ = "metric"
    __table_args__ = (
        ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        {"sqlite_with_rowid": False},
    )

    job: int = Field(primary_key=True, sa_type=Int64)
    name_id: int = Field(primary_key=True, sa_type=Int64)
    step: int = Field(primary_key=True, sa_type=Int64)
    attempt: int = Field(primary_key=True, sa_type=Int64)
    value: float | None = Field(sa_type=Float)


class LogLineRow(SQLModel, table=True):
    """One line of a job's log."""

    __tablename__ = "log_line"
    __table_args__ = (
        ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        Index("log_line_job", "job", "id"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(default=None, primary_key=True, sa_type=Int64)
    job: int = Field(sa_type=Int64)
    attempt: int = Field(sa_type=Int64)
    text: str
    created_at: datetime = Field(sa_type=UtcDateTime)


class EventRow(SQLModel, table=True):
    """Something that happened to a job."""

    __tablename__ = "event"
    __table_args__ = (
        ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        Index("event_job", "job", "id"),
        # A job ends once.
        Index(
            "event_terminal",
            "job",
            unique=True,
            sqlite_where=text("type in ('succeeded','failed','cancelled')"),
            postgresql_where=text("type in ('succeeded','failed','cancelled')"),
        ),
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(default=None, primary_key=True, sa_type=Int64)
    job: int = Field(sa_type=Int64)
    attempt: int = Field(sa_type=Int64)
    type: str
    message: str
    data: dict[str, Any] = Field(default={}, sa_type=JSON)
    created_at: datetime = Field(sa_type=UtcDateTime)


class CheckpointRow(SQLModel, table=True):
    """A checkpoint that a worker reported whole. `name` is its folder under the job's checkpoints/."""

    __tablename__ = "checkpoint"
    __table_args__ = (
        ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        Index("checkpoint_step", "job", "step"),
    )

    job: int = Field(primary_key=True, sa_type=Int64)
    name: str = Field(primary_key=True)
    step: int = Field(sa_type=Int64)
    attempt: int = Field(sa_type=Int64)
    manifest_sha256: str
    files: dict[str, Any] = Field(sa_type=JSON)
    metrics: dict[str, float] = Field(sa_type=JSON)
    corrupt: bool = False
    pinned: str | None = None  # kept under this name
    deleted_at: datetime | None = Field(default=None, sa_type=UtcDateTime)  # its files are gone, or going
    mirrored_at: datetime | None = Field(
        default=None, sa_type=UtcDateTime
    )  # its files are in the artifact store
    created_at: datetime = Field(sa_type=UtcDateTime)


class EvaluationRow(SQLModel, table=True):
    """One evaluation. NULL stands for NaN."""

    __tablename__ = "evaluation"
    __table_args__ = (ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),)

    job: int = Field(primary_key=True, sa_type=Int64)
    step: int = Field(primary_key=True, sa_type=Int64)
    attempt: int = Field(primary_key=True, sa_type=Int64)
    eval_loss: float | None
    perplexity: float | None
    token_accuracy: float | None
    num_tokens: int = Field(sa_type=Int64)
    created_at: datetime = Field(sa_type=UtcDateTime)


class WorkerRow(SQLModel, table=True):
    """A process of a worker that has registered."""

    __tablename__ = "worker"

    id: str = Field(primary_key=True)
    boot_id: str = Field(primary_key=True)
    gpus: int = Field(sa_type=Int64)
    device: str
    labels: dict[str, str] = Field(sa_type=JSON)
    versions: dict[str, str] = Field(sa_type=JSON)
    registered_at: datetime = Field(sa_type=UtcDateTime)
    seen_at: datetime = Field(sa_type=UtcDateTime)
    protocol: int = Field(default=1, sa_type=Int64)
    gpu_memory_gb: float | None = None
    gpu_names: list[str] = Field(default=[], sa_type=JSON)
    shares_data: bool = True  # it sees the server's data folder
    draining: bool = False  # it shall take no new jobs
    gone_at: datetime | None = Field(default=None, sa_type=UtcDateTime)  # it is known to be dead
    free_gpus: int | None = Field(default=None, sa_type=Int64)  # when it last asked for a job
    disk_free_bytes: int | None = Field(default=None, sa_type=Int64)


class UsageRow(SQLModel, table=True):
    """GPU-seconds that an owner's ended attempts have used; halved every half-life after `as_of`."""

    __tablename__ = "usage"

    owner: str = Field(primary_key=True)
    gpu_seconds: float
    as_of: datetime = Field(sa_type=UtcDateTime)


class ServerRow(SQLModel, table=True):
    """A server process on this database."""

    __tablename__ = "server"

    id: str = Field(primary_key=True)
    version: str
    started_at: datetime = Field(sa_type=UtcDateTime)
    seen_at: datetime = Field(sa_type=UtcDateTime)


class FactRow(SQLModel, table=True):
    """What all servers of this installation share: its id, the secret that lease tokens are derived from."""

    __tablename__ = "fact"

    name: str = Field(primary_key=True)
    value: str


class StoredRow(SQLModel, table=True):
    """A blob that is whole in the artifact store."""

    __tablename__ = "stored"

    sha256: str = Field(primary_key=True)
    bytes: int = Field(sa_type=Int64)
    created_at: datetime = Field(sa_type=UtcDateTime)


class GoneRow(SQLModel, table=True):
    """A job or file that was deleted: lists go on after it all the same."""

    __tablename__ = "gone"

    id: str = Field(primary_key=True)
    number: int = Field(sa_type=Int64)
    deleted_at: datetime = Field(sa_type=UtcDateTime)


class UploadRow(SQLModel, table=True):
    """A file that comes in parts."""

    __tablename__ = "upload"

    id: str = Field(primary_key=True)
    owner: str
    filename: str
    purpose: str
    bytes: int = Field(sa_type=Int64)  # what was announced
    mime_type: str
    status: str  # pending, completed, cancelled or expired
    file_lifetime_seconds: int | None = Field(default=None, sa_type=Int64)  # of the file that it becomes
    file_id: str | None = None
    created_at: datetime = Field(sa_type=UtcDateTime)
    expires_at: datetime = Field(sa_type=UtcDateTime)


class UploadPartRow(SQLModel, table=True):
    """A part of an upload, whole on disk."""

    __tablename__ = "upload_part"
    __table_args__ = (
        ForeignKeyConstraint(["upload"], ["upload.id"], ondelete="CASCADE"),
        Index("upload_part_upload", "upload"),
    )

    id: str = Field(primary_key=True)
    upload: str
    bytes: int = Field(sa_type=Int64)
    sha256: str
    created_at: datetime = Field(sa_type=UtcDateTime)


class GpuMonthRow(SQLModel, table=True):
    """GPU-seconds that an owner's attempts, ended in a month (`2030-01`, UTC), have used. It outlives the jobs."""

    __tablename__ = "gpu_month"

    owner: str = Field(primary_key=True)
    month: str = Field(primary_key=True)
    gpu_seconds: float


class AuditRow(SQLModel, table=True):
    """A change: who, what, when, from where."""

    __tablename__ = "audit"
    __table_args__ = {"sqlite_autoincrement": True}  # SQLAlchemy's own form

    number: int | None = Field(default=None, primary_key=True, sa_type=Int64)
    created_at: datetime = Field(sa_type=UtcDateTime)
    key_id: str | None
    key_name: str | None
    role: str | None
    action: str  # job.create, key.delete, …
    target: str | None  # the id of what was changed
    address: str | None
    request_id: str | None
    details: dict[str, Any] = Field(default={}, sa_type=JSON)


class AnalysisRow(SQLModel, table=True):
    """Data that a worker counts with a model's tokenizer, for plans and previews. `id` is a hash of what is asked."""

    __tablename__ = "analysis"
    __table_args__ = (
        CheckConstraint("state in ('wanted','claimed','done','failed')", name="analysis_state"),
        Index("analysis_queue", "state", "created_at"),
    )

    id: str = Field(primary_key=True)
    owner: str  # who asked for it first
    request: dict[str, Any] = Field(sa_type=JSON)
    state: str = "wanted"
    worker_id: str | None = None
    token_sha256: str | None = None
    lease_until: datetime | None = Field(default=None, sa_type=UtcDateTime)
    tries: int = Field(default=0, sa_type=Int64)
    result: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    error: str | None = None
    created_at: datetime = Field(sa_type=UtcDateTime)
    used_at: datetime = Field(sa_type=UtcDateTime)
