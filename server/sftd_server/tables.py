"""The tables. Every schema change is a new migration under migrations/versions.

Times are UTC, ids are text with a readable prefix, enums are text. `job.number` is the internal key of a job: it
keeps the many rows of metrics and logs small, and orders the queue.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    CheckConstraint,
    DateTime,
    Dialect,
    Float,
    ForeignKeyConstraint,
    Index,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, SQLModel


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


class FileRow(SQLModel, table=True):
    """An uploaded file; its content is the blob of that hash."""

    __tablename__ = "file"

    number: int | None = Field(default=None, primary_key=True)
    id: str = Field(unique=True)
    owner: str
    filename: str
    purpose: str
    bytes: int
    sha256: str = Field(index=True)
    status: str
    format: str | None
    num_rows: int | None
    created_at: datetime = Field(sa_type=UtcDateTime)


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
        Index("job_queue", "state", "priority", "queue_rank", "number"),
        {"sqlite_autoincrement": True},
    )

    number: int | None = Field(default=None, primary_key=True)
    id: str = Field(unique=True)
    owner: str
    idempotency_key: str | None
    body_sha256: str

    # What was asked for.
    name: str | None
    priority: int
    gpus: int
    base_model: str
    method: str
    spec: str  # JobSpec as JSON
    labels: dict[str, str] = Field(sa_type=JSON)  # the spec's metadata
    inputs: dict[str, Any] = Field(sa_type=JSON)  # Inputs as JSON: files pinned by hash, and the base
    created_at: datetime = Field(sa_type=UtcDateTime)

    # Where it stands.
    state: str
    want: str = "run"
    not_before: datetime = Field(sa_type=UtcDateTime)
    queue_rank: int = 0  # below 0: released by a worker, goes first
    attempt: int = 0
    failures: int = 0
    lost_count: int = 0
    lost_step: int = -1  # newest checkpoint at the last loss
    started_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    finished_at: datetime | None = Field(default=None, sa_type=UtcDateTime)

    # Who holds it.
    token_sha256: str | None = None
    lease_until: datetime | None = Field(default=None, sa_type=UtcDateTime)
    start_by: datetime | None = Field(default=None, sa_type=UtcDateTime)
    worker_id: str | None = None

    # How far it is.
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    tokens_seen: int = 0
    tokens_per_second: float | None = None

    # How it ended.
    failure_reason: str | None = None
    failure_message: str | None = None
    log_tail: list[str] = Field(default=[], sa_type=JSON)
    result: dict[str, Any] | None = Field(default=None, sa_type=JSON)  # the result's manifest


class AttemptRow(SQLModel, table=True):
    """One taking of a job by a worker. `outcome` is None while it lasts."""

    __tablename__ = "attempt"
    __table_args__ = (
        ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        UniqueConstraint("worker_id", "request_id"),
        {"sqlite_with_rowid": False},
    )

    job: int = Field(primary_key=True)
    attempt: int = Field(primary_key=True)
    worker_id: str
    boot_id: str
    request_id: str
    token_sha256: str
    claimed_at: datetime = Field(sa_type=UtcDateTime)
    ended_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    outcome: str | None = None
    start_step: int | None = None  # -1: from scratch; metrics after it are this attempt's


class StreamRow(SQLModel, table=True):
    """How far a numbered stream of an attempt has come."""

    __tablename__ = "stream"
    __table_args__ = (
        ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        {"sqlite_with_rowid": False},
    )

    job: int = Field(primary_key=True)
    attempt: int = Field(primary_key=True)
    kind: str = Field(primary_key=True)
    next_seq: int = 0


class MetricNameRow(SQLModel, table=True):
    """Metric names, stored once."""

    __tablename__ = "metric_name"

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True)


class JobMetricRow(SQLModel, table=True):
    """Which metric names a job has."""

    __tablename__ = "job_metric"
    __table_args__ = (
        ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        ForeignKeyConstraint(["name_id"], ["metric_name.id"]),
        {"sqlite_with_rowid": False},
    )

    job: int = Field(primary_key=True)
    name_id: int = Field(primary_key=True)


class MetricRow(SQLModel, table=True):
    """One value. NULL stands for NaN, which SQLite cannot store; infinities are kept."""

    __tablename__ = "metric"
    __table_args__ = (
        ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        {"sqlite_with_rowid": False},
    )

    job: int = Field(primary_key=True)
    name_id: int = Field(primary_key=True)
    step: int = Field(primary_key=True)
    attempt: int = Field(primary_key=True)
    value: float | None = Field(sa_type=Float)


class LogLineRow(SQLModel, table=True):
    """One line of a job's log."""

    __tablename__ = "log_line"
    __table_args__ = (
        ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        Index("log_line_job", "job", "id"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(default=None, primary_key=True)
    job: int
    attempt: int
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
        ),
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(default=None, primary_key=True)
    job: int
    attempt: int
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

    job: int = Field(primary_key=True)
    name: str = Field(primary_key=True)
    step: int
    attempt: int
    manifest_sha256: str
    files: dict[str, Any] = Field(sa_type=JSON)
    metrics: dict[str, float] = Field(sa_type=JSON)
    corrupt: bool = False
    created_at: datetime = Field(sa_type=UtcDateTime)


class EvaluationRow(SQLModel, table=True):
    """One evaluation. NULL stands for NaN."""

    __tablename__ = "evaluation"
    __table_args__ = (ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),)

    job: int = Field(primary_key=True)
    step: int = Field(primary_key=True)
    attempt: int = Field(primary_key=True)
    eval_loss: float | None
    perplexity: float | None
    token_accuracy: float | None
    num_tokens: int
    created_at: datetime = Field(sa_type=UtcDateTime)


class WorkerRow(SQLModel, table=True):
    """A worker that has registered."""

    __tablename__ = "worker"

    id: str = Field(primary_key=True)
    boot_id: str
    gpus: int
    device: str
    labels: dict[str, str] = Field(sa_type=JSON)
    versions: dict[str, str] = Field(sa_type=JSON)
    registered_at: datetime = Field(sa_type=UtcDateTime)
    seen_at: datetime = Field(sa_type=UtcDateTime)
