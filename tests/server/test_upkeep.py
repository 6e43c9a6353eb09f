"""The write-ahead log: folded when it is quiet, and kept small where readers stand in the way."""

import asyncio
import contextlib
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import text

from sftd_server.upkeep import HUGE_WAL_BYTES, Upkeep, size_of, wal_of

MIB = 1024**2


def in_the_database_itself(data: Path, copy: Path) -> list[str]:
    """What stands in the file without its log."""
    shutil.copy(data / "sftd.db", copy)
    with (
        contextlib.closing(sqlite3.connect(copy)) as connection,
        contextlib.suppress(sqlite3.OperationalError),  # the tables themselves may stand in the log alone
    ):
        return [name for (name,) in connection.execute("SELECT name FROM metric_name")]
    return []


def test_the_log_is_folded_into_the_database_when_nothing_is_written(box, tmp_path: Path) -> None:
    data = box.server.folder.path

    def write(session) -> None:
        session.execute(text("INSERT INTO metric_name (name) VALUES ('told')"))

    box.run(box.server.db.write(write))
    deadline = time.monotonic() + 10
    while in_the_database_itself(data, tmp_path / "copy.db") != ["told"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)  # upkeep is another task


@contextlib.contextmanager
def overlapping_readers(path: Path) -> Iterator[None]:
    """One of them always holds an old state, so that SQLite by itself can never begin its log anew."""
    stopped = threading.Event()

    def read(delay: float) -> None:
        stopped.wait(delay)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            while not stopped.is_set():
                connection.execute("BEGIN")
                connection.execute("SELECT count(*) FROM job").fetchone()
                stopped.wait(0.15)
                connection.execute("ROLLBACK")

    threads = [threading.Thread(target=read, args=(i * 0.05,), daemon=True) for i in range(3)]
    for thread in threads:
        thread.start()
    yield
    stopped.set()
    for thread in threads:
        thread.join()


def test_the_log_stays_small_under_load_and_readers_that_overlap(box) -> None:
    lease = box.running()
    database = box.server.folder.path / "sftd.db"
    wal = wal_of(box.server.settings.database_url)
    assert wal is not None
    sizes, seq = [], 0
    with overlapping_readers(database):
        begin = time.monotonic()
        while seq < 60_000 and time.monotonic() - begin < 60:
            answer = lease.post("logs", seq=seq, lines=["x" * 4000] * 500)  # 2 MB
            assert answer.status_code == 200
            seq += 500
            sizes.append(size_of(wal))
            time.sleep(0.02)

    assert seq >= 60_000
    assert max(sizes) < 64 * MIB, max(sizes)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_database_that_is_a_server_has_no_log_to_fold(box) -> None:
    assert wal_of("postgresql://localhost/sftd") is None
    assert size_of(Path("/nowhere/at/all")) == 0
    assert HUGE_WAL_BYTES < 64 * MIB


def test_an_error_does_not_end_the_upkeep(box, monkeypatch) -> None:
    looks = []

    def look() -> None:
        looks.append(1)
        raise OSError("no answer")

    monkeypatch.setattr(box.server.disk, "look", look)
    monkeypatch.setattr("sftd_server.upkeep.LOOK_SECONDS", 0.01)

    async def scenario() -> None:
        task = asyncio.create_task(Upkeep(box.server).run())
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    box.run(scenario())
    assert len(looks) > 2
