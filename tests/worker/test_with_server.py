"""Workers and the real server, both killed: nothing is lost, nothing is told twice."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sftd import Client
from sftd.errors import ConnectionFailed

HERE = Path(__file__).parent


class Box:
    """A server and workers as processes that a test kills and starts again."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self.folder = folder
        self.script = folder / "script.json"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._clean = {name: value for name, value in os.environ.items() if not name.startswith("SFTD_")}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.start_server()
        self.client = Client(f"http://127.0.0.1:{self.port}", (self.data / "admin.key").read_text().strip())

    def start_server(self) -> None:
        environment = {
            **self._clean,
            "SFTD_DATA": str(self.data),
            "SFTD_PORT": str(self.port),
            "SFTD_LEASE_SECONDS": "2",
            "SFTD_REAP_SECONDS": "0.2",
            "SFTD_BACKOFF_SECONDS": "0",
            "XDG_STATE_HOME": str(self.folder / "state"),
        }
        self.server = subprocess.Popen(
            [sys.executable, "-m", "sftd_server.app"], env=environment, stdout=subprocess.PIPE
        )
        self.processes.append(self.server)
        assert self.server.stdout
        assert b"listens on" in self.server.stdout.readline()

    def start_worker(self, name: str) -> subprocess.Popen[bytes]:
        settings = {
            "server_url": f"http://127.0.0.1:{self.port}",
            "data": str(self.data),
            "worker_name": name,
            "device": "cpu",
            "warm": False,
            "trainer_argv": [sys.executable, "-S", str(HERE / "scripted_trainer.py"), str(self.script)],
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, str(HERE / "run_worker.py"), json.dumps(settings)],
                env=self._clean,
                stderr=log,
            )
        self.processes.append(worker)
        return worker

    def post(self, **script: Any) -> str:
        self.script.write_text(json.dumps(script))
        rows = self.folder / "rows.jsonl"
        rows.write_text('{"prompt": "a", "completion": "b"}\n')
        return self.client.jobs.create(
            base_model="org/model", training_file=self.client.files.upload(rows).id
        ).id

    def until(self, ready: Callable[[], object], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, [path.read_text() for path in self.folder.glob("*.log")]
            time.sleep(0.05)  # another process's state: there is nothing to wait on

    def steps(self, job_id: str) -> list[int]:
        return [point.step for point in self.client.jobs.metrics(job_id)]


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    yield box
    for process in box.processes:
        process.kill()
        process.wait()


def test_a_killed_server_gets_everything_and_takes_no_job_away(box: Box) -> None:
    job_id = box.post(steps=150, step_seconds=0.03, checkpoint_every=50)
    box.start_worker("one")
    box.until(lambda: len(box.steps(job_id)) > 5)

    box.server.kill()
    box.server.wait()
    spool = box.data / "jobs" / job_id / "logs/events.jsonl"
    box.until(lambda: '"step": 140' in spool.read_text())  # longer than the lease
    box.start_server()
    job = box.client.jobs.wait(job_id, timeout_seconds=20)

    assert job.attempt == 1
    assert box.steps(job_id) == list(range(1, 151))
    assert [found.step for found in box.client.jobs.checkpoints(job_id)] == [50, 100, 150]


def test_a_killed_workers_job_goes_on_elsewhere_from_its_checkpoint(box: Box) -> None:
    job_id = box.post(steps=60, step_seconds=0.02, checkpoint_every=10)
    first = box.start_worker("one")
    box.until(lambda: list(box.client.jobs.checkpoints(job_id)))

    first.kill()
    box.start_worker("two")
    job = box.client.jobs.wait(job_id, timeout_seconds=30)

    assert job.attempt == 2
    assert box.steps(job_id) == list(range(1, 61))
    types = [event.type for event in box.client.jobs.events(job_id)]
    assert types.count("succeeded") == 1
    assert "lease_expired" in types


def test_a_stopped_workers_job_is_queued_again_at_once(box: Box) -> None:
    job_id = box.post(steps=60, step_seconds=0.02)
    first = box.start_worker("one")
    box.until(lambda: len(box.steps(job_id)) > 5)

    first.terminate()
    assert first.wait(10) == 0
    assert box.client.jobs.retrieve(job_id).state == "queued"
    box.start_worker("two")
    box.client.jobs.wait(job_id, timeout_seconds=20)

    assert box.steps(job_id) == list(range(1, 61))
    assert "lease_expired" not in [event.type for event in box.client.jobs.events(job_id)]


def test_a_pause_taken_back_lets_the_job_go_on(box: Box) -> None:
    job_id = box.post(steps=60, step_seconds=0.02)
    box.start_worker("one")
    box.until(lambda: len(box.steps(job_id)) > 5)

    box.client.jobs.pause(job_id)
    box.until(lambda: box.client.jobs.retrieve(job_id).state == "paused")
    box.client.jobs.resume(job_id)
    box.client.jobs.wait(job_id, timeout_seconds=20)

    assert box.steps(job_id) == list(range(1, 61))


def test_a_job_is_cancelled_in_any_state_within_five_seconds(box: Box) -> None:
    box.start_worker("one")
    for pause in (0.0, 0.05, 0.2, 0.6):
        job_id = box.post(steps=10**6, step_seconds=0.02, ignore_signals=True)
        time.sleep(pause)  # so that the cancel falls into another state each time

        asked_at = time.monotonic()
        box.client.jobs.cancel(job_id)
        box.until(lambda: box.client.jobs.retrieve(job_id).state == "cancelled", 6)  # noqa: B023  # called at once

        assert time.monotonic() - asked_at < 5


def test_a_server_that_stops_for_good_is_said(box: Box) -> None:
    box.server.kill()
    box.server.wait()

    with pytest.raises(ConnectionFailed, match="Nothing listens"):
        box.client.jobs.retrieve("job_1")
