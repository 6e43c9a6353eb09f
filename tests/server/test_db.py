"""The writer: groups of writes, each on its own; readers that cannot write."""

import asyncio
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from sftd_server import migrations
from sftd_server.db import Database, DatabaseClosed, touch


@pytest.fixture
def db(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path}/test.db")
    migrations.upgrade(database.engine)
    return database


def insert(name: str):
    return lambda session: session.execute(text("INSERT INTO metric_name (name) VALUES (:n)"), {"n": name})


def names(session) -> list[str]:
    return [row[0] for row in session.execute(text("SELECT name FROM metric_name ORDER BY id"))]


def test_writes_are_committed_in_groups_and_each_fails_alone(db: Database) -> None:
    async def scenario() -> list[object]:
        writes = [db.write(insert(str(i % 50))) for i in range(100)]  # the second fifty break UNIQUE
        gathered = asyncio.gather(*writes, return_exceptions=True)
        await asyncio.sleep(0)
        db.start()
        outcomes = await gathered
        found = await db.read(names)
        await db.stop()
        return [*outcomes, found]

    *outcomes, found = asyncio.run(scenario())

    assert [isinstance(outcome, Exception) for outcome in outcomes] == [False] * 50 + [True] * 50
    assert found == [str(i) for i in range(50)]
    assert (db.num_commits, db.num_writes) == (1, 100)


def test_a_reader_cannot_write(db: Database) -> None:
    async def scenario() -> None:
        with pytest.raises(OperationalError, match="readonly"):
            await db.read(insert("x"))
        db.start()
        await db.stop()

    asyncio.run(scenario())


def test_whoever_waits_is_woken_by_a_commit_and_not_by_a_failure(db: Database) -> None:
    async def scenario() -> list[bool]:
        db.start()
        signal = db.signal("job:1")
        woken = []

        def fail(session) -> None:
            touch(session, "job:1")
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await db.write(fail)
        woken.append(signal.is_set())
        await db.write(lambda session: touch(session, "job:1"))
        woken.append(signal.is_set())
        woken.append(db.signal("job:1").is_set())
        await db.stop()
        return woken

    assert asyncio.run(scenario()) == [False, True, False]


def test_a_stop_finishes_what_is_queued_and_refuses_the_rest(db: Database, tmp_path: Path) -> None:
    async def scenario() -> list[object]:
        writes = asyncio.gather(*[db.write(insert(str(i))) for i in range(300)])
        await asyncio.sleep(0)
        db.start()
        await db.stop()
        with pytest.raises(DatabaseClosed):
            await db.write(insert("late"))
        return await writes

    assert len(asyncio.run(scenario())) == 300
    wal = tmp_path / "test.db-wal"
    assert not wal.exists() or wal.stat().st_size == 0


@pytest.mark.sqlite
def test_a_full_disk_fails_the_write_says_so_and_is_over_when_there_is_room(
    box, assert_error, caplog
) -> None:
    lease = box.running()
    lease.post("logs", seq=0, lines=["before"])

    def limit(session) -> None:  # holds for the writer's connection, which is given up with the failed write
        used = session.connection().exec_driver_sql("PRAGMA page_count").scalar()
        session.connection().exec_driver_sql(f"PRAGMA max_page_count={used + 2}")

    box.run(box.server.db.write(limit))
    full = lease.post("logs", seq=1, lines=["x" * 8000] * 30)

    assert_error(full, 507, "disk_full")
    assert full.headers["retry-after"]
    assert [line["text"] for line in box.admin.get(f"/jobs/{lease.job_id}/logs").json()["data"]] == ["before"]
    assert lease.post("logs", seq=1, lines=["x" * 8000] * 30).json() == {"next_seq": 31}
    # One line a request, or the log of a full disk fills another one; and not what users sent.
    told = [record for record in caplog.records if full.headers["x-request-id"] in record.getMessage()]
    assert [(record.levelname, record.exc_info, "\n" in record.getMessage()) for record in told] == [
        ("WARNING", None, False)
    ]
    assert "x" * 8 not in caplog.text


@pytest.mark.sqlite
def test_a_database_that_another_process_holds_is_said_to_be_busy(box, assert_error) -> None:
    lease = box.running()

    def wait_less(session) -> None:
        session.connection().exec_driver_sql("PRAGMA busy_timeout=100")

    box.run(box.server.db.write(wait_less))
    with sqlite3.connect(box.server.folder.path / "sftd.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        busy = lease.post("logs", seq=0, lines=["x"])
        other.execute("ROLLBACK")

    assert_error(busy, 503, "database_busy")
    assert busy.headers["retry-after"]
    assert lease.post("logs", seq=0, lines=["x"]).json() == {"next_seq": 1}


def test_the_pragmas_are_those_that_lose_nothing(db: Database) -> None:
    with db.engine.connect() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }

    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}
