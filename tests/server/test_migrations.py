"""The schema goes up, matches the tables, and comes down; a start that is killed leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import inspect
from sqlalchemy.exc import IntegrityError
from sqlmodel import SQLModel

from sftd_server import migrations
from sftd_server.db import make_engine


def tables(url: str) -> set[str]:
    engine = make_engine(url)
    found = set(inspect(engine).get_table_names())
    engine.dispose()
    return found


def test_up_check_down(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/test.db"

    for command in ("upgrade", "check", "downgrade", "upgrade", "upgrade"):
        subprocess.run(
            [sys.executable, "-m", "sftd_server.migrations", command, "--database-url", url], check=True
        )

    assert tables(url) == {*SQLModel.metadata.tables, "alembic_version"}


def test_a_migration_that_breaks_midway_leaves_nothing_and_runs_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/test.db"
    engine = make_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE worker (x)")  # in the way of the sixth table

    with pytest.raises(Exception, match="already exists"):
        migrations.upgrade(engine)
    assert tables(url) == {"worker"}

    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE worker")
    migrations.upgrade(engine)
    migrations.check(engine)
    engine.dispose()


@pytest.mark.parametrize(
    "change",
    [
        "state = 'nonsense'",
        "want = 'nonsense'",
        "state = 'running'",
        "state = 'running', token_sha256 = 'x'",
        "state = 'succeeded'",
        "finished_at = '2030-01-01'",
        "token_sha256 = 'x', lease_until = '2030-01-01'",
    ],
)
def test_the_database_itself_refuses_a_job_that_contradicts_itself(shared_box, change: str) -> None:
    shared_box.submit()

    with pytest.raises(IntegrityError, match=r"(?i)check constraint"):
        shared_box.run(
            shared_box.server.db.write(
                lambda session: session.connection().exec_driver_sql(f"UPDATE job SET {change}")
            )
        )


def test_the_database_itself_refuses_a_second_end(box) -> None:
    box.running().finish()
    again = (
        "INSERT INTO event (job, attempt, type, message, data, created_at)"
        " VALUES (1, 1, 'failed', '', '{}', '2030-01-01')"
    )

    with pytest.raises(IntegrityError, match=r"(?i)unique constraint"):
        box.run(box.server.db.write(lambda session: session.connection().exec_driver_sql(again)))
