"""The file that health checks look at: fresh while the worker works, absent before it is registered, stale when it hangs."""

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import FakeServer, WorkerProcess


def touched_at(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def test_an_idle_and_a_busy_worker_show_life(
    server: "FakeServer", worker: "WorkerProcess", tmp_path: Path
) -> None:
    alive = tmp_path / "alive"
    worker.start({"steps": 10**6, "step_seconds": 0.02}, alive_file=str(alive))
    server.until(lambda: touched_at(alive))
    idle_since = time.time()
    server.until(lambda: touched_at(alive) > idle_since)

    server.post_job()
    server.until(lambda: len(server.steps()) > 3)
    busy_since = time.time()

    server.until(lambda: touched_at(alive) > busy_since)


def test_a_worker_whose_server_went_away_still_shows_life(
    server: "FakeServer", worker: "WorkerProcess", tmp_path: Path
) -> None:
    alive = tmp_path / "alive"
    worker.start({}, alive_file=str(alive))
    server.until(lambda: touched_at(alive))

    server.down()
    away_since = time.time()

    server.until(lambda: touched_at(alive) > away_since)
    server.up()  # the fixture takes it down again


def test_a_worker_that_is_not_registered_shows_no_life(
    server: "FakeServer", worker: "WorkerProcess", tmp_path: Path
) -> None:
    alive = tmp_path / "alive"
    alive.touch()  # left by an earlier worker
    server.add_fault("register", times=3, status=503)

    worker.start({}, alive_file=str(alive))
    server.until(lambda: len(server.calls) >= 3)

    assert not alive.exists()
    server.until(lambda: touched_at(alive))


def test_a_worker_that_hangs_shows_no_life(
    server: "FakeServer", worker: "WorkerProcess", tmp_path: Path
) -> None:
    alive = tmp_path / "alive"
    worker.start({}, alive_file=str(alive))
    server.until(lambda: touched_at(alive))

    assert worker.process
    os.kill(worker.process.pid, signal.SIGSTOP)
    hangs_since = time.time()
    time.sleep(1.5)  # longer than the second between two touches

    assert touched_at(alive) <= hangs_since
    os.kill(worker.process.pid, signal.SIGCONT)
