"""The schema goes up, matches the tables, and comes down; a start that is killed leaves nothing behind."""

import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import psycopg
import pytest
from alembic import command
from sqlalchemy import JSON, Boolean, DateTime, Float, MetaData, String, inspect, select
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

    for action in ("upgrade", "check", "downgrade", "upgrade", "upgrade"):
        subprocess.run(
            [sys.executable, "-m", "sftd_server.migrations", action, "--database-url", url], check=True
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


OLD_VALUES = {
    "job.state": "queued",
    "job.want": "run",
    "job.token_sha256": None,
    "job.lease_until": None,
    "job.finished_at": None,
    "key.role": "admin",
}


def test_a_database_of_the_first_schema_keeps_every_row(tmp_path: Path) -> None:
    """ON DELETE CASCADE is a trap: a table that is made anew is dropped before, and takes what refers to it along."""
    engine = make_engine(f"sqlite:///{tmp_path}/test.db")
    with engine.begin() as connection:
        command.upgrade(migrations._config(connection), "0001")
    before = {}
    with engine.begin() as connection:
        known = MetaData()
        known.reflect(connection)
        old = [table for table in known.sorted_tables if table.name != "alembic_version"]
        for table in old:
            values = {
                column.name: plain_value(f"{table.name}.{column.name}", column.type)
                for column in table.columns
            }
            connection.execute(table.insert().values(values))
        for table in old:
            before[table.name] = [tuple(row) for row in connection.execute(select(*table.columns))]

    migrations.upgrade(engine)
    migrations.check(engine)

    with engine.begin() as connection:
        assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
        for table in old:
            assert [tuple(row) for row in connection.execute(select(*table.columns))] == before[table.name]
        assert len(old) >= 12
        assert all(len(rows) == 1 for rows in before.values())
    engine.dispose()


def plain_value(name: str, kind: object) -> object:
    if name in OLD_VALUES:
        return OLD_VALUES[name]
    if isinstance(kind, DateTime):
        return datetime(2030, 1, 1, 12, 30, 0, 123456)
    if isinstance(kind, JSON):
        return {"a": [1]}
    if isinstance(kind, Float):
        return 0.25
    if isinstance(kind, String):
        return name
    return False if isinstance(kind, Boolean) else 1


def test_postgres_goes_up_matches_the_tables_and_comes_down(postgres) -> None:
    url = postgres.create(empty=True)

    for action in ("upgrade", "check", "downgrade", "upgrade", "upgrade", "check"):
        subprocess.run(
            [sys.executable, "-m", "sftd_server.migrations", action, "--database-url", url], check=True
        )

    assert tables(url) == {*SQLModel.metadata.tables, "alembic_version"}
    postgres.drop(url)


def test_a_migration_of_postgres_that_is_killed_midway_leaves_nothing_and_runs_again(postgres) -> None:
    url = postgres.create(empty=True)
    engine = make_engine(url)
    with engine.begin() as connection:
        command.upgrade(migrations._config(connection), "0001")
    upgrade = [sys.executable, "-m", "sftd_server.migrations", "upgrade", "--database-url", url]
    with psycopg.connect(url) as reader:
        reader.execute(
            "SELECT 1 FROM checkpoint"
        )  # the second table that the migration changes must wait for this
        migrating = subprocess.Popen(upgrade)
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'checkpoint'::regclass"
        deadline = time.monotonic() + 20
        while not (found := postgres.execute(url.rsplit("/", 1)[1], waits)) or found[0][0] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = subprocess.Popen(upgrade)  # another server starts meanwhile: it waits
        migrating.kill()
        migrating.wait()
    assert second.wait(30) == 0

    migrations.check(engine)
    engine.dispose()
    postgres.drop(url)


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
