"""Dependencies, budgets, fair share, retention, several processes of a worker, several servers.

Columns are added one by one: to make a table anew would drop the old one, and with it every row that refers to it.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NEW_COLUMNS: dict[str, list[sa.Column[Any]]] = {
    "job": [
        sa.Column("requires", sa.JSON(), nullable=True),
        sa.Column("retry_of", sa.String(), nullable=True),
        sa.Column("clone_of", sa.String(), nullable=True),
        sa.Column("seed_job", INT64, nullable=True),
        sa.Column("seed_checkpoint", sa.String(), nullable=True),
        sa.Column("max_seconds", sa.Float(), nullable=True),
        sa.Column("max_gpu_seconds", sa.Float(), nullable=True),
        sa.Column("max_tokens", INT64, nullable=True),
        sa.Column("used_seconds", sa.Float(), nullable=False, server_default="0"),
        sa.Column("used_gpu_seconds", sa.Float(), nullable=False, server_default="0"),
        sa.Column("expected_gpu_seconds", sa.Float(), nullable=False, server_default="0"),
        sa.Column("pause_reason", sa.String(), nullable=True),
        sa.Column("yield_to", sa.String(), nullable=True),
        sa.Column("needs_disk_bytes", INT64, nullable=True),
        sa.Column("queued_at", sa.DateTime(), nullable=False, server_default="1970-01-01 00:00:00.000000"),
        sa.Column("stalls", INT64, nullable=False, server_default="0"),
    ],
    "attempt": [
        sa.Column("started_at", sa.DateTime(), nullable=True),
        sa.Column("gpus", INT64, nullable=False, server_default="1"),
        sa.Column("uncounted_seconds", sa.Float(), nullable=False, server_default="0"),
        sa.Column("protocol", INT64, nullable=False, server_default="1"),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("message", sa.String(), nullable=True),
    ],
    "stream": [
        sa.Column("last_seq", INT64, nullable=True),
        sa.Column("last_sha256", sa.String(), nullable=True),
    ],
    "checkpoint": [
        sa.Column("pinned", sa.String(), nullable=True),
        sa.Column("deleted_at", sa.DateTime(), nullable=True),
        sa.Column("mirrored_at", sa.DateTime(), nullable=True),
    ],
}


def upgrade() -> None:
    for table, columns in _NEW_COLUMNS.items():
        for column in columns:
            op.add_column(table, column)
    op.execute("UPDATE job SET queued_at = created_at")
    op.execute("UPDATE job SET pause_reason = 'user' WHERE state = 'paused' OR want = 'pause'")
    op.execute("UPDATE attempt SET gpus = (SELECT gpus FROM job WHERE job.number = attempt.job)")
    op.create_index("job_lease_until", "job", ["lease_until"])
    op.create_table(
        "dependency",
        sa.Column("job", INT64, nullable=False),
        sa.Column("needs", INT64, nullable=False),
        sa.ForeignKeyConstraint(["job"], ["job.number"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["needs"], ["job.number"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job", "needs"),
        sqlite_with_rowid=False,
    )
    op.create_index("dependency_needs", "dependency", ["needs"])
    op.create_table(
        "fact",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "server",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("started_at", sa.DateTime(), nullable=False),
        sa.Column("seen_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "stored",
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("bytes", INT64, nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("sha256"),
    )
    op.create_table(
        "usage",
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("gpu_seconds", sa.Float(), nullable=False),
        sa.Column("as_of", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("owner"),
    )
    # Its key grows by boot_id. Nothing refers to it, so that it may be made anew.
    op.rename_table("worker", "worker_before")
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
        sa.Column("protocol", INT64, nullable=False),
        sa.Column("gpu_memory_gb", sa.Float(), nullable=True),
        sa.Column("gpu_names", sa.JSON(), nullable=False),
        sa.Column("shares_data", sa.Boolean(), nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("gone_at", sa.DateTime(), nullable=True),
        sa.Column("free_gpus", INT64, nullable=True),
        sa.Column("disk_free_bytes", INT64, nullable=True),
        sa.PrimaryKeyConstraint("id", "boot_id", name="worker_process"),
    )
    old = "id, boot_id, gpus, device, labels, versions, registered_at, seen_at"
    op.execute(
        f"INSERT INTO worker ({old}, protocol, gpu_names, shares_data, draining)"
        f" SELECT {old}, 1, '[]', true, false FROM worker_before"
    )
    op.drop_table("worker_before")


def downgrade() -> None:
    op.drop_table("worker")
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
    for table in ("usage", "stored", "server", "fact", "dependency"):
        op.drop_table(table)
    op.drop_index("job_lease_until", table_name="job")
    for table, columns in _NEW_COLUMNS.items():
        for column in columns:
            op.drop_column(table, column.name)
