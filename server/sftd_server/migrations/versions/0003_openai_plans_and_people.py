"""What files, keys and jobs need for OpenAI's surface, plans, limits and the audit log.

Files are checked after their upload, expire, and come in parts; a list goes on after what has been deleted; keys have limits; a
worker counts data for plans; every change is written down.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NEW_COLUMNS: dict[str, list[sa.Column[Any]]] = {
    "file": [
        sa.Column("status_details", sa.String(), nullable=True),
        sa.Column("expires_at", sa.DateTime(), nullable=True),
    ],
    "job": [
        sa.Column("checking_files", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("suffix", sa.String(), nullable=True),
        sa.Column("result_deleted_at", sa.DateTime(), nullable=True),
    ],
    "key": [
        sa.Column("max_running_jobs", INT64, nullable=True),
        sa.Column("max_queued_jobs", INT64, nullable=True),
        sa.Column("max_gpu_hours_per_month", sa.Float(), nullable=True),
    ],
}
_TABLES = ("analysis", "audit", "gpu_month", "upload_part", "upload", "gone")


def upgrade() -> None:
    for table, columns in _NEW_COLUMNS.items():
        for column in columns:
            op.add_column(table, column)
    op.create_index("job_owner_body", "job", ["owner", "body_sha256"])
    op.create_table(
        "gone",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("number", INT64, nullable=False),
        sa.Column("deleted_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "upload",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("bytes", INT64, nullable=False),
        sa.Column("mime_type", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("file_lifetime_seconds", INT64, nullable=True),
        sa.Column("file_id", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("expires_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "upload_part",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("upload", sa.String(), nullable=False),
        sa.Column("bytes", INT64, nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["upload"], ["upload.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("upload_part_upload", "upload_part", ["upload"])
    op.create_table(
        "gpu_month",
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("month", sa.String(), nullable=False),
        sa.Column("gpu_seconds", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "month"),
    )
    op.create_table(
        "audit",
        sa.Column("number", INT64, nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("key_name", sa.String(), nullable=True),
        sa.Column("role", sa.String(), nullable=True),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("target", sa.String(), nullable=True),
        sa.Column("address", sa.String(), nullable=True),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("number"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "analysis",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("worker_id", sa.String(), nullable=True),
        sa.Column("token_sha256", sa.String(), nullable=True),
        sa.Column("lease_until", sa.DateTime(), nullable=True),
        sa.Column("tries", INT64, nullable=False),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("used_at", sa.DateTime(), nullable=False),
        sa.CheckConstraint("state in ('wanted','claimed','done','failed')", name="analysis_state"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("analysis_queue", "analysis", ["state", "created_at"])


def downgrade() -> None:
    for table in _TABLES:
        op.drop_table(table)
    op.drop_index("job_owner_body", table_name="job")
    for table, columns in _NEW_COLUMNS.items():
        for column in columns:
            op.drop_column(table, column.name)
