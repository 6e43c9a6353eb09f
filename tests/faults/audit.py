"""What the database itself writes down: triggers that note every change of a job and every row that a worker's call makes.

Rows stand in the order in which they were committed: SQLite has one writer, and on PostgreSQL whoever writes for a job
holds the lock on its row. So "no write of attempt a after the claim of attempt a+1" is a question of order in one table.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INSERTS = {
    "metric": ("attempt", "step"),
    "log_line": ("attempt", "id"),
    "evaluation": ("attempt", "step"),
    "event": ("attempt", "type"),
    "checkpoint": ("attempt", "step"),
    "attempt": ("attempt", "worker_id"),
}
_WATCHED = ("state", "attempt", "token_sha256", "want")


@dataclass(frozen=True)
class Entry:
    """One note of the database. For `job`: `before` and `after` are states, `detail` whether the token changed."""

    n: int
    what: str  # a table's name; "update metric" where a row was changed
    job: int
    attempt: int
    detail: str
    before: str
    after: str
    old_attempt: int
    old_token: str
    new_token: str


class Tables:
    """The server's database, read from outside. Rows are dictionaries."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self, query: str, *values: object) -> list[dict[str, Any]]:  # rows hold anything
        with self._connected() as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query, values)]

    def execute(self, *statements: str) -> None:
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            for statement in statements:
                connection.execute(statement)
            connection.execute("COMMIT")

    def is_whole(self) -> bool:
        """Does SQLite find nothing wrong with its file?"""
        return self.rows("PRAGMA integrity_check") == [{"integrity_check": "ok"}]

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            yield connection
        finally:
            connection.close()


def install(tables: Tables) -> None:
    """Begin to write down. Once for a database, before the first job."""
    tables.execute(
        "CREATE TABLE IF NOT EXISTS audit (n INTEGER PRIMARY KEY AUTOINCREMENT, what TEXT, job INTEGER,"
        " attempt INTEGER, detail TEXT, before TEXT DEFAULT '', after TEXT DEFAULT '', old_attempt INTEGER DEFAULT 0,"
        " old_token TEXT DEFAULT '', new_token TEXT DEFAULT '')",
        *(_on_write(name, *columns, verb="INSERT") for name, columns in _INSERTS.items()),
        *(_on_write(name, *_INSERTS[name], verb="UPDATE") for name in ("metric", "evaluation")),
        "CREATE TRIGGER audit_job AFTER UPDATE ON job WHEN "
        + " OR ".join(f"OLD.{name} IS NOT NEW.{name}" for name in _WATCHED)
        + " BEGIN INSERT INTO audit (what, job, attempt, detail, before, after, old_attempt, old_token, new_token)"
        " VALUES ('job', NEW.number, NEW.attempt, NEW.want, OLD.state, NEW.state, OLD.attempt,"
        " coalesce(OLD.token_sha256, ''), coalesce(NEW.token_sha256, '')); END",
    )


def entries(tables: Tables) -> list[Entry]:
    """All that was written down, in the order of commits."""
    return [Entry(**row) for row in tables.rows("SELECT * FROM audit ORDER BY n")]


def _on_write(table: str, attempt: str, detail: str, *, verb: str) -> str:
    what = table if verb == "INSERT" else f"update {table}"
    return (
        f"CREATE TRIGGER audit_{verb.lower()}_{table} AFTER {verb} ON {table} BEGIN INSERT INTO audit"
        f" (what, job, attempt, detail) VALUES ('{what}', NEW.job, NEW.{attempt}, NEW.{detail}); END"
    )
