"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# SQLite's INTEGER has 64 bits, and only INTEGER makes a primary key count up by itself.
INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "file",
        sa.Column("number", INT64, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("bytes", INT64, nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("format", sa.String(), nullable=True),
        sa.Column("num_rows", INT64, nullable=True),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("number"),
        sa.UniqueConstraint("id"),
    )
    with op.batch_alter_table("file", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_file_sha256"), ["sha256"], unique=False)

    op.create_table(
        "job",
        sa.Column("number", INT64, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("idempotency_key", sa.String(), nullable=True),
        sa.Column("body_sha256", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=True),
        sa.Column("priority", INT64, nullable=False),
        sa.Column("gpus", INT64, nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("spec", sa.String(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("inputs", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("want", sa.String(), nullable=False),
        sa.Column("not_before", sa.DateTime(), nullable=False),
        sa.Column("queue_rank", INT64, nullable=False),
        sa.Column("attempt", INT64, nullable=False),
        sa.Column("failures", INT64, nullable=False),
        sa.Column("lost_count", INT64, nullable=False),
        sa.Column("lost_step", INT64, nullable=False),
        sa.Column("started_at", sa.DateTime(), nullable=True),
        sa.Column("finished_at", sa.DateTime(), nullable=True),
        sa.Column("token_sha256", sa.String(), nullable=True),
        sa.Column("lease_until", sa.DateTime(), nullable=True),
        sa.Column("start_by", sa.DateTime(), nullable=True),
        sa.Column("worker_id", sa.String(), nullable=True),
        sa.Column("step", INT64, nullable=False),
        sa.Column("total_steps", INT64, nullable=True),
        sa.Column("loss", sa.Float(), nullable=True),
        sa.Column("tokens_seen", INT64, nullable=False),
        sa.Column("tokens_per_second", sa.Float(), nullable=True),
        sa.Column("failure_reason", sa.String(), nullable=True),
        sa.Column("failure_message", sa.String(), nullable=True),
        sa.Column("log_tail", sa.JSON(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.CheckConstraint(
            "(state in ('claimed','running','stopping')) = (token_sha256 is not null)", name="job_token"
        ),
        sa.CheckConstraint(
            "(state in ('succeeded','failed','cancelled')) = (finished_at is not null)", name="job_finished"
        ),
        sa.CheckConstraint(
            "state in ('queued','claimed','running','stopping','paused','succeeded','failed','cancelled')",
            name="job_state",
        ),
        sa.CheckConstraint("want in ('run','pause','cancel')", name="job_want"),
        sa.CheckConstraint("(token_sha256 is not null) = (lease_until is not null)", name="job_lease"),
        sa.PrimaryKeyConstraint("number"),
        sa.UniqueConstraint("id"),
        sa.UniqueConstraint("owner", "idempotency_key"),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.create_index("job_queue", ["state", "priority", "queue_rank", "number"], unique=False)

    op.create_table(
        "key",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("secret_sha256", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("expires_at", sa.DateTime(), nullable=True),
        sa.CheckConstraint("role in ('admin','user','worker')", name="key_role"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
        sa.UniqueConstraint("secret_sha256"),
    )
    op.create_table(
        "metric_name",
        sa.Column("id", INT64, nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
    )
    op.create_table(
        "worker",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("boot_id", sa.String(), nullable=False),
        sa.Column("gpus", INT64, nullable=False),
        sa.Column("device", sa.String(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("versions", sa.JSON(), nullable=False),
        sa.Column("registered_at", sa.DateTime(), nullable=False),
        sa.Column("seen_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "attempt",
        sa.Column("job", INT64, nullable=False),
        sa.Column("attempt", INT64, nullable=False),
        sa.Column("worker_id", sa.String(), nullable=False),
        sa.Column("boot_id", sa.String(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=False),
        sa.Column("token_sha256", sa.String(), nullable=False),
        sa.Column("claimed_at", sa.DateTime(), nullable=False),
        sa.Column("ended_at", sa.DateTime(), nullable=True),
        sa.Column("outcome", sa.String(), nullable=True),
        sa.Column("start_step", INT64, nullable=True),
        sa.ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job", "attempt"),
        sa.UniqueConstraint("worker_id", "request_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "checkpoint",
        sa.Column("job", INT64, nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("step", INT64, nullable=False),
        sa.Column("attempt", INT64, nullable=False),
        sa.Column("manifest_sha256", sa.String(), nullable=False),
        sa.Column("files", sa.JSON(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("corrupt", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job", "name"),
    )
    with op.batch_alter_table("checkpoint", schema=None) as batch_op:
        batch_op.create_index("checkpoint_step", ["job", "step"], unique=False)

    op.create_table(
        "evaluation",
        sa.Column("job", INT64, nullable=False),
        sa.Column("step", INT64, nullable=False),
        sa.Column("attempt", INT64, nullable=False),
        sa.Column("eval_loss", sa.Float(), nullable=True),
        sa.Column("perplexity", sa.Float(), nullable=True),
        sa.Column("token_accuracy", sa.Float(), nullable=True),
        sa.Column("num_tokens", INT64, nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job", "step", "attempt"),
    )
    op.create_table(
        "event",
        sa.Column("id", INT64, nullable=False),
        sa.Column("job", INT64, nullable=False),
        sa.Column("attempt", INT64, nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("event", schema=None) as batch_op:
        batch_op.create_index("event_job", ["job", "id"], unique=False)
        batch_op.create_index(
            "event_terminal",
            ["job"],
            unique=True,
            sqlite_where=sa.text("type in ('succeeded','failed','cancelled')"),
            postgresql_where=sa.text("type in ('succeeded','failed','cancelled')"),
        )

    op.create_table(
        "job_metric",
        sa.Column("job", INT64, nullable=False),
        sa.Column("name_id", INT64, nullable=False),
        sa.ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["name_id"],
            ["metric_name.id"],
        ),
        sa.PrimaryKeyConstraint("job", "name_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "log_line",
        sa.Column("id", INT64, nullable=False),
        sa.Column("job", INT64, nullable=False),
        sa.Column("attempt", INT64, nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("log_line", schema=None) as batch_op:
        batch_op.create_index("log_line_job", ["job", "id"], unique=False)

    op.create_table(
        "metric",
        sa.Column("job", INT64, nullable=False),
        sa.Column("name_id", INT64, nullable=False),
        sa.Column("step", INT64, nullable=False),
        sa.Column("attempt", INT64, nullable=False),
        sa.Column("value", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job", "name_id", "step", "attempt"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "stream",
        sa.Column("job", INT64, nullable=False),
        sa.Column("attempt", INT64, nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("next_seq", INT64, nullable=False),
        sa.ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job", "attempt", "kind"),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table("stream")
    op.drop_table("metric")
    with op.batch_alter_table("log_line", schema=None) as batch_op:
        batch_op.drop_index("log_line_job")

    op.drop_table("log_line")
    op.drop_table("job_metric")
    with op.batch_alter_table("event", schema=None) as batch_op:
        batch_op.drop_index(
            "event_terminal", sqlite_where=sa.text("type in ('succeeded','failed','cancelled')")
        )
        batch_op.drop_index("event_job")

    op.drop_table("event")
    op.drop_table("evaluation")
    with op.batch_alter_table("checkpoint", schema=None) as batch_op:
        batch_op.drop_index("checkpoint_step")

    op.drop_table("checkpoint")
    op.drop_table("attempt")
    op.drop_table("worker")
    op.drop_table("metric_name")
    op.drop_table("key")
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.drop_index("job_queue")

    op.drop_table("job")
    with op.batch_alter_table("file", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_file_sha256"))

    op.drop_table("file")
