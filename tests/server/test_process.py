"""The server as a process: it says where it listens, stops cleanly, and loses nothing when it is killed."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

KEY = "sftd-admin-key-of-the-tests"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], httpx.Client]]]:
    processes = []

    def run() -> tuple[subprocess.Popen[str], httpx.Client]:
        environment = {**os.environ, "SFTD_ADMIN_KEY": KEY, "XDG_STATE_HOME": str(tmp_path / "state")}
        command = [sys.executable, "-m", "sftd_server.app", "--data", str(tmp_path / "data"), "--port", "0"]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        processes.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.search(r"listens on (http://\S+);", line)
        assert url, line
        assert KEY not in line
        return process, httpx.Client(base_url=url[1], headers={"authorization": f"Bearer {KEY}"}, timeout=20)

    yield run
    for process in processes:
        process.kill()
        process.wait()


def running_job(client: httpx.Client, data: Path) -> tuple[str, dict[str, str], httpx.Client]:
    file_id = client.post("/files", files={"file": b'{"text": "a"}'}).json()["id"]
    client.post("/jobs", json={"base_model": "org/m", "training_file": file_id})
    secret = (data / "worker.key").read_text().strip()
    worker = httpx.Client(base_url=client.base_url, headers={"authorization": f"Bearer {secret}"}, timeout=20)
    claim = {"worker_id": "w", "boot_id": "b", "request_id": "r", "gpus": 1, "wait_seconds": 0}
    worker.post("/worker/register", json={"worker_id": "w", "boot_id": "b", "gpus": 1, "device": "cpu"})
    lease = worker.post("/worker/claim", json=claim).json()
    token = {"x-lease-token": lease["token"]}
    url = f"/worker/jobs/{lease['job_id']}"
    worker.post(f"{url}/heartbeat", json={"attempt": 1, "started": True}, headers=token)
    return url, token, worker


def test_kill_9_loses_no_acknowledged_line(start, tmp_path: Path) -> None:
    process, client = start()
    url, token, worker = running_job(client, tmp_path / "data")
    acknowledged = 0

    def append() -> None:
        nonlocal acknowledged
        while True:
            body = {"attempt": 1, "seq": acknowledged, "lines": [f"line {acknowledged}"]}
            try:
                answer = worker.post(f"{url}/logs", json=body, headers=token)
            except httpx.HTTPError:
                return
            acknowledged = answer.json()["next_seq"]

    appending = threading.Thread(target=append)
    appending.start()
    while acknowledged < 100:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    appending.join()

    _, client = start()
    job_id = url.rsplit("/", 1)[1]
    lines = client.get(f"/jobs/{job_id}/logs", params={"limit": 10_000}).json()["data"]
    assert [line["text"] for line in lines[:acknowledged]] == [f"line {i}" for i in range(acknowledged)]
    assert len(lines) - acknowledged in (0, 1)  # the last one may be stored without an answer
    assert client.get(f"/jobs/{job_id}").json()["state"] == "running"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_clean_with_open_streams_and_long_polls(
    start, tmp_path: Path, number: signal.Signals
) -> None:
    process, client = start()
    url, token, worker = running_job(client, tmp_path / "data")
    job_id = url.rsplit("/", 1)[1]
    answers: list[int] = []
    ready = threading.Barrier(4)

    def follow() -> None:
        with httpx.Client(base_url=client.base_url, headers=client.headers, timeout=20) as mine:
            path = f"/jobs/{job_id}/events"
            with mine.stream("GET", path, headers={"accept": "text/event-stream"}) as answer:
                lines = answer.iter_lines()
                next(lines)
                ready.wait()
                answers.append(sum(1 for _ in lines))

    def poll(path: str, body: dict[str, object]) -> None:
        ready.wait()
        answers.append(worker.post(path, json=body, headers=token).status_code)

    claim = {"worker_id": "w", "boot_id": "b", "request_id": "r2", "gpus": 1, "wait_seconds": 30}
    beat = {"attempt": 1, "started": True, "wait_seconds": 10}
    threads = [
        threading.Thread(target=follow),
        threading.Thread(target=poll, args=("/worker/claim", claim)),
        threading.Thread(target=poll, args=(f"{url}/heartbeat", beat)),
    ]
    for thread in threads:
        thread.start()
    ready.wait()
    time.sleep(0.3)  # until the polls have arrived: nothing outside tells

    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(10) == 0
    took = time.monotonic() - began
    for thread in threads:
        thread.join(5)

    assert took < 10
    assert len(answers) == 3
    wal = tmp_path / "data" / "sftd.db-wal"
    assert not wal.exists() or wal.stat().st_size == 0
    assert process.stdout is not None
    assert "Traceback" not in process.stdout.read()


def test_a_second_server_on_the_same_folder_is_told_so(start, tmp_path: Path) -> None:
    start()
    command = [sys.executable, "-m", "sftd_server.app", "--data", str(tmp_path / "data"), "--port", "0"]

    second = subprocess.run(command, capture_output=True, text=True, check=False)

    assert second.returncode == 1
    assert "Another sftd-server runs on" in second.stderr
    assert "Traceback" not in second.stderr


def test_wrong_settings_are_told_in_a_sentence(tmp_path: Path) -> None:
    environment = {**os.environ, "SFTD_DATABASE_URL": "mysql://x", "SFTD_LEASE_SECONDS": "0"}
    command = [sys.executable, "-m", "sftd_server.app", "--data", str(tmp_path)]

    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run.returncode == 1
    assert "SFTD_DATABASE_URL: only SQLite and PostgreSQL" in run.stderr
    assert "SFTD_LEASE_SECONDS" in run.stderr
