"""What the database itself writes down: triggers that note every change of a job and every row that a worker's call makes.

Rows stand in the order in which they were committed: SQLite has one writer, and on PostgreSQL whoever writes for a job
holds the lock on its row. So "no write of attempt a after the claim of attempt a+1" is a question of order in one table.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

_INSERTS = {
    "metric": ("attempt", "step"),
    "log_line": ("attempt", "id"),
    "evaluation": ("attempt", "step"),
    "event": ("attempt", "type"),
    "checkpoint": ("attempt", "step"),
    "attempt": ("attempt", "worker_id"),
}
_VERBS = {"metric": "INSERT OR UPDATE", "evaluation": "INSERT OR UPDATE"}  # their rows may be written again
_JOB_COLUMNS = "what, job, attempt, detail, before, after, old_attempt, old_token, new_token"
_JOB_VALUES = (
    "'job', NEW.number, NEW.attempt, NEW.want, OLD.state, NEW.state, OLD.attempt,"
    " coalesce(OLD.token_sha256, ''), coalesce(NEW.token_sha256, '')"
)
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


class Tables(Protocol):
    """The server's database, read from outside. Rows are dictionaries; `?` stands for a value."""

    def rows(self, query: str, *values: object) -> list[dict[str, Any]]: ...  # rows hold anything

    def is_whole(self) -> bool:
        """Does the database find nothing wrong with its files?"""
        ...

    def install(self) -> None:
        """Begin to write down. Once for a database, before the first job."""
        ...


class SqliteTables:
    """A SQLite file."""

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
        return self.rows("PRAGMA integrity_check") == [{"integrity_check": "ok"}]

    def install(self) -> None:
        self.execute(
            "CREATE TABLE witnessed (n INTEGER PRIMARY KEY AUTOINCREMENT, what TEXT, job INTEGER,"
            " attempt INTEGER, detail TEXT, before TEXT DEFAULT '', after TEXT DEFAULT '', old_attempt INTEGER DEFAULT 0,"
            " old_token TEXT DEFAULT '', new_token TEXT DEFAULT '')",
            *(_on_write(name, *columns, verb="INSERT") for name, columns in _INSERTS.items()),
            *(_on_write(name, *_INSERTS[name], verb="UPDATE") for name in _VERBS),
            f"CREATE TRIGGER audit_job AFTER UPDATE ON job WHEN {' OR '.join(f'OLD.{name} IS NOT NEW.{name}' for name in _WATCHED)}"
            f" BEGIN INSERT INTO witnessed ({_JOB_COLUMNS}) VALUES ({_JOB_VALUES}); END",
        )

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            yield connection
        finally:
            connection.close()


class PostgresTables:
    """A database of a PostgreSQL server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def rows(self, query: str, *values: object) -> list[dict[str, Any]]:  # rows hold anything
        import psycopg
        from psycopg.rows import dict_row

        with psycopg.connect(self.url, autocommit=True, row_factory=dict_row) as connection:
            found = connection.execute(query.replace("?", "%s"), values).fetchall()  # type: ignore[arg-type]  # our own text
            return [{name: _plain(value) for name, value in row.items()} for row in found]

    def is_whole(self) -> bool:
        return True  # it checks its pages as it reads them

    def install(self) -> None:
        import psycopg

        changed = " OR ".join(f"OLD.{name} IS DISTINCT FROM NEW.{name}" for name in _WATCHED)
        statements = [
            "CREATE TABLE witnessed (n BIGSERIAL PRIMARY KEY, what TEXT, job BIGINT, attempt BIGINT, detail TEXT,"
            " before TEXT DEFAULT '', after TEXT DEFAULT '', old_attempt BIGINT DEFAULT 0, old_token TEXT DEFAULT '',"
            " new_token TEXT DEFAULT '')",
            f"CREATE FUNCTION audit_job() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO witnessed ({_JOB_COLUMNS})"
            f" VALUES ({_JOB_VALUES}); RETURN NULL; END $$",
            f"CREATE TRIGGER audit_job AFTER UPDATE ON job FOR EACH ROW WHEN ({changed}) EXECUTE FUNCTION audit_job()",
        ]
        for table, (attempt, detail) in _INSERTS.items():
            statements += [
                f"CREATE FUNCTION audit_{table}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO witnessed"
                f" (what, job, attempt, detail) VALUES (CASE WHEN TG_OP = 'INSERT' THEN '{table}' ELSE 'update {table}'"
                f" END, NEW.job, NEW.{attempt}, NEW.{detail}); RETURN NULL; END $$",
                f"CREATE TRIGGER audit_{table} AFTER {_VERBS.get(table, 'INSERT')} ON {table} FOR EACH ROW"
                f" EXECUTE FUNCTION audit_{table}()",
            ]
        with psycopg.connect(self.url) as connection:
            for statement in statements:
                connection.execute(statement)  # type: ignore[call-overload]  # our own text


def entries(tables: Tables) -> list[Entry]:
    """All that was written down, in the order of commits."""
    return [Entry(**row) for row in tables.rows("SELECT * FROM witnessed ORDER BY n")]


def _plain(value: object) -> Any:  # a column's value, as SQLite gives it
    if isinstance(value, datetime):
        return value.isoformat(sep=" ")
    return json.dumps(value) if isinstance(value, dict | list) else value


def _on_write(table: str, attempt: str, detail: str, *, verb: str) -> str:
    what = table if verb == "INSERT" else f"update {table}"
    return (
        f"CREATE TRIGGER audit_{verb.lower()}_{table} AFTER {verb} ON {table} BEGIN INSERT INTO witnessed"
        f" (what, job, attempt, detail) VALUES ('{what}', NEW.job, NEW.{attempt}, NEW.{detail}); END"
    )
