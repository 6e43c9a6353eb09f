"""Several server processes on one PostgreSQL database, as if behind one address."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg
import pytest
from tests.postgres import Postgres

KEY = "sftd-admin-key-of-the-tests"
STREAM = {"accept": "text/event-stream"}


@dataclass
class Process:
    """A server process, and who calls it."""

    process: subprocess.Popen[str]
    url: str
    worker_key: str

    @property
    def user(self) -> httpx.Client:
        return self._client(KEY)

    @property
    def worker(self) -> httpx.Client:
        return self._client(self.worker_key)

    def _client(self, key: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

    def takes_worker_key(self, key: str) -> bool:
        hello = {"worker_id": "w", "boot_id": "b", "gpus": 1, "protocol": 2, "device": "cpu"}
        return self._client(key).post("/worker/register", json=hello).status_code == 200

    def submit(self) -> str:
        file_id = self.user.post("/files", files={"file": b'{"text": "a"}'}).json()["id"]
        answer = self.user.post("/jobs", json={"base_model": "org/m", "training_file": file_id})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def claim(self, request_id: str = "r", **more: object) -> httpx.Response:
        """Claim; a process that is not known here registers first."""
        who = {"worker_id": "w", "boot_id": "b", "gpus": 1, "protocol": 2}
        claim = {**who, "request_id": request_id, "wait_seconds": 0, **more}
        answer = self.worker.post("/worker/claim", json=claim)
        if answer.status_code == 409 and answer.json()["error"]["code"] == "worker_unregistered":
            hello = {**{name: claim[name] for name in who}, "device": "cpu"}
            self.worker.post("/worker/register", json=hello).raise_for_status()
            answer = self.worker.post("/worker/claim", json=claim)
        return answer

    def report(self, lease: dict, kind: str, **body: object) -> httpx.Response:
        return self.worker.post(
            f"/worker/jobs/{lease['job_id']}/{kind}",
            json={"attempt": lease["attempt"], **body},
            headers={"x-lease-token": lease["token"]},
        )


Start = Callable[..., Process]


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    made = postgres.create(empty=True)
    yield made
    postgres.drop(made)


@pytest.fixture
def start(tmp_path: Path, url: str) -> Iterator[Start]:
    """Starts a server; `data` names its folder, the same for all unless it is given."""
    processes: list[subprocess.Popen[str]] = []

    def run(data: str = "data", **environment: str) -> Process:
        variables = {
            "SFTD_ADMIN_KEY": KEY,
            "SFTD_DATABASE_URL": url,
            "XDG_STATE_HOME": str(tmp_path / "state"),
        }
        command = [sys.executable, "-m", "sftd_server.app", "--data", str(tmp_path / data), "--port", "0"]
        process = subprocess.Popen(
            command,
            env={**os.environ, **variables, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"listens on (http://\S+);", line):
                key = tmp_path / data / "worker.key"
                return Process(process, found[1], key.read_text().strip() if key.exists() else "")
        raise AssertionError("".join(lines))

    yield run
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def pair(start: Start) -> tuple[Process, Process]:
    return start(), start()


def test_a_job_goes_through_two_servers_as_through_one(pair: tuple[Process, Process]) -> None:
    a, b = pair
    frames: list[str] = []
    open_ = threading.Event()
    polled: list[httpx.Response] = []
    polling = threading.Thread(target=lambda: polled.append(b.claim(wait_seconds=20)))
    polling.start()
    time.sleep(0.5)  # until the claim is held at B: nothing outside tells

    began = time.monotonic()
    job_id = a.submit()
    polling.join(20)
    assert time.monotonic() - began < 5
    lease = polled[0].json()
    assert lease["job_id"] == job_id

    def follow() -> None:
        with a.user.stream("GET", f"/jobs/{job_id}/logs", headers=STREAM) as answer:
            for line in answer.iter_lines():
                open_.set()
                if line.startswith("data: "):
                    frames.append(line.removeprefix("data: "))

    following = threading.Thread(target=follow)
    following.start()
    assert open_.wait(10)
    b.report(lease, "heartbeat", started=True)
    for seq in range(3):
        server = (a, b)[seq % 2]  # the worker's calls come out at either
        assert server.report(lease, "logs", seq=seq, lines=[f"line {seq}"]).json() == {"next_seq": seq + 1}
        deadline = time.monotonic() + 5
        while len(frames) <= seq and time.monotonic() < deadline:
            time.sleep(0.01)
        assert json.loads(frames[seq])["text"] == f"line {seq}"

    beats: list[httpx.Response] = []
    beat = {"started": True, "wait_seconds": 10}
    beating = threading.Thread(target=lambda: beats.append(b.report(lease, "heartbeat", **beat)))
    beating.start()
    time.sleep(0.5)
    began = time.monotonic()
    a.user.post(f"/jobs/{job_id}/cancel")
    beating.join(15)
    assert time.monotonic() - began < 3
    assert beats[0].json()["want"] == "cancel"
    assert beats[0].json()["refused_means_down"] is False

    assert b.report(lease, "finish", state="cancelled").status_code == 200
    following.join(10)
    assert json.loads(frames[-1]) == {"state": "cancelled"}


def test_each_job_is_claimed_once_whichever_server_is_asked(pair: tuple[Process, Process]) -> None:
    jobs = {pair[i % 2].submit() for i in range(24)}

    def claim_all(i: int) -> list[str]:
        found = []
        for j in range(200):
            answer = pair[(i + j) % 2].claim(f"r-{i}-{j}", worker_id=f"w{i}")
            if answer.status_code == 200:
                found.append(answer.json()["job_id"])
            elif pair[0].user.get("/jobs", params={"state": "queued"}).json()["data"] == []:
                return found
        raise AssertionError("jobs stay in the queue")

    with ThreadPoolExecutor(6) as pool:
        claimed = [job_id for found in pool.map(claim_all, range(6)) for job_id in found]

    assert sorted(claimed) == sorted(jobs)


def test_one_claim_sent_to_both_servers_is_one_lease(pair: tuple[Process, Process]) -> None:
    for i in range(8):
        pair[0].submit()
        pair[0].submit()
        with ThreadPoolExecutor(2) as pool:
            one, other = pool.map(lambda server, i=i: server.claim(f"same-{i}"), pair)
        leases = [answer.json() for answer in (one, other) if answer.status_code == 200]
        assert {one.status_code, other.status_code} <= {200, 204}
        assert len({(lease["job_id"], lease["token"]) for lease in leases}) == 1


def test_one_submission_sent_to_both_servers_is_one_job(pair: tuple[Process, Process]) -> None:
    file_id = pair[0].user.post("/files", files={"file": b'{"text": "a"}'}).json()["id"]

    def post(i: int) -> str:
        spec = {"base_model": "org/m", "training_file": file_id}
        answer = pair[i % 2].user.post("/jobs", json=spec, headers={"idempotency-key": "once"})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(post, range(40)))) == 1


def test_a_key_that_one_server_makes_or_deletes_counts_at_the_other(pair: tuple[Process, Process]) -> None:
    a, b = pair

    def status_at_b(secret: str, expected: int) -> int:
        deadline = time.monotonic() + 5
        status = 0
        while status != expected and time.monotonic() < deadline:
            headers = {"authorization": f"Bearer {secret}"}
            status = httpx.get(f"{b.url}/jobs", headers=headers).status_code
        return status

    made = a.user.post("/keys", json={"name": "ci"}).json()
    assert status_at_b(made["secret"], 200) == 200
    a.user.delete(f"/keys/{made['id']}")
    assert status_at_b(made["secret"], 401) == 401


def test_kill_9_of_one_server_loses_nothing(pair: tuple[Process, Process]) -> None:
    a, b = pair
    job_id = a.submit()
    lease = b.claim().json()
    b.report(lease, "heartbeat", started=True)
    acknowledged = 0
    stopped = threading.Event()

    def append() -> None:
        nonlocal acknowledged
        servers = [a, b]
        while not stopped.is_set():
            body = {"seq": acknowledged, "lines": [f"line {acknowledged}"]}
            try:
                answer = servers[0].report(lease, "logs", **body)
            except httpx.HTTPError:
                servers.reverse()  # what a balancer does
                continue
            if answer.status_code == 416:
                acknowledged = int(answer.headers["x-expected-seq"])
            elif answer.status_code == 200:
                acknowledged = answer.json()["next_seq"]

    appending = threading.Thread(target=append)
    appending.start()
    while acknowledged < 30:
        time.sleep(0.01)
    a.process.send_signal(signal.SIGKILL)
    at_kill = acknowledged
    deadline = time.monotonic() + 20
    while acknowledged < at_kill + 30 and time.monotonic() < deadline:
        time.sleep(0.01)
    stopped.set()
    appending.join()

    assert acknowledged >= at_kill + 30
    lines = b.user.get(f"/jobs/{job_id}/logs", params={"limit": 10_000}).json()["data"]
    assert [line["text"] for line in lines] == [f"line {i}" for i in range(len(lines))]
    assert len(lines) >= acknowledged
    assert b.user.get(f"/jobs/{job_id}").json()["state"] == "running"


def test_a_server_with_a_fresh_folder_joins_and_takes_no_key_away(
    start: Start, url: str, tmp_path: Path
) -> None:
    first = start(SFTD_ADMIN_KEY="")
    admin = (tmp_path / "data" / "admin.key").read_text().strip()

    second = start("other", SFTD_ADMIN_KEY="")

    for server in (first, second):
        assert (
            httpx.get(f"{server.url}/keys", headers={"authorization": f"Bearer {admin}"}).status_code == 200
        )
    other = tmp_path / "other"
    assert not (other / "admin.key").exists()
    assert not (other / "worker.key").exists()
    assert (other / "installation.id").read_text() == (tmp_path / "data" / "installation.id").read_text()
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT count(*) FROM server").fetchone()
        assert rows == (2,)
        second.process.send_signal(signal.SIGTERM)
        assert second.process.wait(10) == 0
        connection.rollback()
        assert connection.execute("SELECT count(*) FROM server").fetchone() == (1,)


def test_the_folder_of_another_installation_is_refused(start: Start, tmp_path: Path) -> None:
    start()
    other = tmp_path / "other"
    other.mkdir()
    (other / "installation.id").write_text("inst_of_somebody_else\n")

    with pytest.raises(AssertionError, match="belongs to the installation inst_of_somebody_else"):
        start("other")


def test_two_servers_may_start_at_once_on_an_empty_database(start: Start, url: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        servers = list(pool.map(lambda i: start(f"data{i}"), range(3)))

    assert {server.user.get("/jobs").status_code for server in servers} == {200}
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM fact").fetchone() == (2,)
    made = [server.worker_key for server in servers if server.worker_key]
    assert len(made) == 1  # the first to come made it, and nobody took it away
    assert all(server.takes_worker_key(made[0]) for server in servers)


def test_servers_that_start_at_once_on_one_folder_make_one_key(start: Start) -> None:
    with ThreadPoolExecutor(3) as pool:
        servers = list(pool.map(lambda _: start("data", SFTD_ADMIN_KEY=""), range(3)))

    assert len({server.worker_key for server in servers}) == 1
    assert all(server.takes_worker_key(servers[0].worker_key) for server in servers)


def test_a_database_that_does_not_answer_is_told_in_a_sentence(tmp_path: Path, postgres: Postgres) -> None:
    url = f"postgresql://sftd:hidden-word@127.0.0.1:{postgres.port}/nothing_here"
    environment = {**os.environ, "SFTD_DATABASE_URL": url}
    command = [sys.executable, "-m", "sftd_server.app", "--data", str(tmp_path), "--port", "0"]

    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run.returncode == 1
    assert 'database "nothing_here" does not exist' in run.stderr
    assert "Traceback" not in run.stderr
    assert "hidden-word" not in run.stderr + run.stdout
