"""A disk that is really full: a small tmpfs, filled to the last byte while a worker reports. Needs root, to mount it."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.disks import MIB, fill, small_disk
from tests.waiting import until

from sftd import Client
from sftd_server.ballast import needs_room

WORKER = Path(__file__).parents[1] / "worker"
# Twice the 1,000 pages that the log may take before it is folded: the database may have to grow by as many.
BALLAST, RESERVE = 8 * MIB, 12 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 40) as folder:
        yield folder


@dataclass
class Reporter:
    """What a worker does: metrics and logs as fast as they are taken, and heartbeats beside them."""

    lease: Any
    statuses: list[int] = field(default_factory=list)
    beats: list[int] = field(default_factory=list)
    acknowledged: dict[str, int] = field(default_factory=lambda: {"metrics": 0, "logs": 0})

    def __post_init__(self) -> None:
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(what,), daemon=True)
            for what in (self._report, self._beat)
        ]
        self.error: Exception | None = None

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(20)
        assert self.error is None, self.error

    def _guarded(self, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:
            self.error = error

    def _report(self) -> None:
        while not self._stopped.is_set():
            steps = range(self.acknowledged["metrics"], self.acknowledged["metrics"] + 200)
            points = [{"step": step, "values": {f"m{i}": step + i for i in range(5)}} for step in steps]
            lines = [f"line {self.acknowledged['logs'] + i} " + "x" * 200 for i in range(100)]
            self._send("metrics", points=points)
            self._send("logs", lines=lines)

    def _send(self, kind: str, **items: Any) -> None:
        answer = self.lease.post(kind, seq=self.acknowledged[kind], **items)
        self.statuses.append(answer.status_code)
        if answer.status_code == 200:
            self.acknowledged[kind] = answer.json()["next_seq"]
        elif answer.status_code == 507:
            assert answer.json()["error"]["code"] == "disk_full"
            self._stopped.wait(float(answer.headers["retry-after"]))

    def _beat(self) -> None:
        while not self._stopped.wait(0.05):
            self.beats.append(self.lease.post("heartbeat", started=True).status_code)


def all_of(client: httpx.Client, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after = -1 if path.endswith("metrics") else 0
    while True:
        page = client.get(path, params={"after": after, "limit": 5000}).json()
        found += page["data"]
        if not page["has_more"]:
            return found
        after = page["next_after"]


def is_whole(database: Path) -> bool:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_disk_that_fills_while_a_worker_reports_loses_nothing_and_is_left_alone(
    disk: Path, make_box_at, assert_error
) -> None:
    box = make_box_at(disk / "data")
    doomed, unused = box.submit(priority=-5), box.upload(b'{"text": "a"}\n')
    lease = box.running()
    ballast = disk / "data" / "ballast"
    until(lambda: ballast.exists() and ballast.stat().st_size == BALLAST, 5)
    reporter = Reporter(lease)
    reporter.start()
    until(lambda: reporter.acknowledged["metrics"] > 1000, 10)
    assert not box.server.disk.low

    fill(disk)
    until(lambda: 507 in reporter.statuses, 15)
    until(lambda: box.server.disk.low, 5)

    # What must go on does, for as long as it takes, and what is read is read.
    beats_before = len(reporter.beats)
    until(lambda: len(reporter.beats) > beats_before + 40, 20)
    cancelled = box.admin.post(f"/jobs/{doomed}/cancel")
    assert (cancelled.status_code, cancelled.json().get("state")) == (200, "cancelled"), cancelled.text
    assert box.admin.delete(f"/files/{unused}").status_code == 204
    assert len(all_of(box.admin, f"/jobs/{lease.job_id}/logs")) >= reporter.acknowledged["logs"]
    assert box.admin.get("/storage").json()["low"] is True
    # What is not of need is told why, and when to come again.
    for refused in (
        box.try_claim(),
        box.admin.post("/jobs", json={"base_model": "org/model", "training_file": "file_x"}),
        box.admin.post("/files", files={"file": ("rows", b'{"text": "b"}\n')}),
        box.admin.post("/keys", json={"name": "new"}),
    ):
        assert "owner frees space" in assert_error(refused, 507, "disk_full")["message"]
        assert int(refused.headers["retry-after"]) <= 5

    held = dict(reporter.acknowledged)
    (disk / "filler").unlink()
    begin = time.monotonic()
    until(lambda: reporter.acknowledged["metrics"] > held["metrics"], 15)
    took = time.monotonic() - begin
    assert took < 10
    until(lambda: ballast.exists() and ballast.stat().st_size == BALLAST, 10 - took)
    reporter.stop()
    assert lease.finish("failed").status_code == 200

    assert set(reporter.statuses) == {200, 507}
    assert set(reporter.beats) == {200}  # not one was refused
    steps = [point["step"] for point in all_of(box.admin, f"/jobs/{lease.job_id}/metrics")]
    lines = [line["text"].split()[1] for line in all_of(box.admin, f"/jobs/{lease.job_id}/logs")]
    assert steps == list(range(reporter.acknowledged["metrics"]))
    assert lines == [str(number) for number in range(reporter.acknowledged["logs"])]
    box.stop()
    assert is_whole(disk / "data" / "sftd.db")


def test_the_ballast_is_given_up_for_what_must_be_written(disk: Path, make_box_at) -> None:
    """Without a reserve nobody looks ahead: SQLite itself runs into the end of the disk, in the midst of reports."""
    box = make_box_at(disk / "data", disk_reserve_bytes=0)
    lease = box.running()
    ballast = disk / "data" / "ballast"
    until(lambda: ballast.exists() and ballast.stat().st_size == BALLAST, 5)
    reporter = Reporter(lease)
    reporter.start()

    fill(disk)
    until(lambda: 507 in reporter.statuses, 15)
    assert box.server.disk.num_spent == 1
    assert not ballast.exists()
    beats_before = len(reporter.beats)
    until(lambda: len(reporter.beats) > beats_before + 60, 20)
    (disk / "filler").unlink()
    until(ballast.exists, 10)
    until(lambda: reporter.statuses[-1] == 200, 10)
    reporter.stop()

    assert set(reporter.beats) == {200}
    steps = [point["step"] for point in all_of(box.admin, f"/jobs/{lease.job_id}/metrics")]
    assert steps == list(range(reporter.acknowledged["metrics"]))


def test_a_server_starts_and_stops_on_a_full_disk(disk: Path, make_box_at) -> None:
    box = make_box_at(disk / "data")
    lease = box.running()
    lease.post("logs", seq=0, lines=["x" * 1000] * 100)
    ballast = disk / "data" / "ballast"
    until(lambda: ballast.exists() and ballast.stat().st_size == BALLAST, 5)
    fill(disk)
    until(lambda: box.server.disk.low, 5)
    box.stop()

    again = make_box_at(disk / "data")
    assert again.server.disk.low
    assert len(all_of(again.admin, f"/jobs/{lease.job_id}/logs")) == 100
    lease.worker = again.worker
    assert lease.post("heartbeat", started=True).status_code == 200
    assert lease.finish("failed", message="no room").status_code == 200
    assert again.state(lease.job_id) == "failed"
    again.stop()
    assert is_whole(disk / "data" / "sftd.db")


def test_an_upload_that_does_not_fit_is_refused_before_and_while_it_comes(
    disk: Path, make_box_at, assert_error
) -> None:
    box = make_box_at(disk / "data")
    until(lambda: (disk / "data" / "ballast").exists(), 5)
    row = b'{"text": "' + b"x" * 1000 + b'"}\n'
    large = row * (60 * MIB // len(row))

    assert_error(box.admin.post("/files", files={"file": ("rows", large)}), 507, "disk_full")
    assert not list((disk / "data" / "tmp").iterdir())

    def pieces() -> Iterator[bytes]:  # of a length that is not announced
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="rows"\r\n\r\n'
        for begin in range(0, len(large), MIB):
            yield large[begin : begin + MIB]
        yield b"\r\n--b--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert_error(box.admin.post("/files", content=pieces(), headers=headers), 507, "disk_full")
    assert not list((disk / "data" / "tmp").glob("upload-*"))
    until(lambda: box.admin.post("/files", files={"file": ("rows", row)}).status_code == 200, 10)


def test_parts_that_do_not_fit_are_refused_and_the_upload_goes_on_when_there_is_room(
    disk: Path, make_box_at, assert_error
) -> None:
    box = make_box_at(disk / "data", ballast_bytes=0, disk_reserve_bytes=0)
    row = b'{"text": "' + b"x" * 1000 + b'"}\n'
    part = row * (12 * MIB // len(row))
    body = {"filename": "f", "purpose": "fine-tune", "bytes": 2 * len(part), "mime_type": "text/jsonl"}
    too_large = box.admin.post("/v1/uploads", json={**body, "bytes": 100 * MIB})
    assert_error(too_large, 507, "disk_full")
    upload = f"/v1/uploads/{box.admin.post('/v1/uploads', json=body).json()['id']}"
    ids = [box.admin.post(f"{upload}/parts", files={"data": part}).json()["id"] for _ in range(2)]

    assert_error(box.admin.post(f"{upload}/complete", json={"part_ids": ids}), 507, "disk_full")
    assert_error(box.admin.post(f"{upload}/parts", files={"data": row * 20 * 1024}), 507, "disk_full")

    assert list((disk / "data" / "tmp").iterdir()) == []
    # By the time of their arrival, on a clock that may be set back meanwhile: which they are is what counts.
    assert {found["id"] for found in box.admin.get(upload).json()["parts"]} == set(ids)
    assert box.admin.post(f"{upload}/cancel").json()["status"] == "cancelled"
    until(lambda: not (disk / "data" / "uploads" / upload.rsplit("/")[-1]).exists(), 5)
    assert box.admin.post("/v1/files", files={"file": part}, data={"purpose": "fine-tune"}).status_code == 200


@pytest.fixture
def make_box_at(stopping) -> Iterator[Callable[[Path], Any]]:
    from tests.server.conftest import start_box

    boxes: list[Any] = []

    def make(data: Path, **settings: Any) -> Any:
        boxes.append(start_box(data, **{"ballast_bytes": BALLAST, "disk_reserve_bytes": RESERVE, **settings}))
        return boxes[-1]

    yield make
    for box in boxes:
        box.stop()


# ---------------------------------------------------------------- with a real worker


def test_a_real_worker_trains_on_through_a_full_disk_of_the_database(disk: Path, tmp_path: Path) -> None:
    """Server, worker and trainer as processes; the database alone lies on the disk that is filled."""
    data, script = tmp_path / "data", tmp_path / "script.json"
    script.write_text(
        json.dumps({"steps": 400, "step_seconds": 0.02, "checkpoint_every": 40, "log": "y" * 4000})
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SFTD_")}
    environment = {
        **clean,
        "SFTD_DATA": str(data),
        "SFTD_PORT": "0",
        "SFTD_DATABASE_URL": f"sqlite:///{disk}/sftd.db",
        "SFTD_LEASE_SECONDS": "4",
        "SFTD_REAP_SECONDS": "0.2",
        "SFTD_BALLAST_BYTES": str(BALLAST),
        "SFTD_DISK_RESERVE_BYTES": str(RESERVE),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "sftd_server.app"], env=environment, stdout=subprocess.PIPE
    )
    processes = [server]
    try:
        assert server.stdout
        url = server.stdout.readline().decode().split("listens on ")[1].split(";")[0]
        client = Client(url, (data / "admin.key").read_text().strip())
        settings = {
            "server_url": url,
            "data": str(data),
            "device": "cpu",
            "warm": False,
            "trainer_argv": [sys.executable, "-S", str(WORKER / "scripted_trainer.py"), str(script)],
        }
        with (tmp_path / "worker.log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(WORKER / "run_worker.py"), json.dumps(settings)],
                    env=clean,
                    stderr=log,
                )
            )
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"prompt": "a", "completion": "b"}\n')
        job_id = client.jobs.create(base_model="org/model", training_file=client.files.upload(rows).id).id
        until(lambda: len(list(client.jobs.metrics(job_id))) > 20, 20)

        fill(disk)
        spool = data / "jobs" / job_id / "logs/events.jsonl"
        until(lambda: '"step": 390' in spool.read_text(), 30)  # longer than a lease
        told = len(list(client.jobs.metrics(job_id)))
        assert told < 390, "the server took reports although the disk was full"
        (disk / "filler").unlink()
        job = client.jobs.wait(job_id, timeout_seconds=10)

        assert job.attempt == 1
        assert [point.step for point in client.jobs.metrics(job_id)] == list(range(1, 401))
        assert [found.step for found in client.jobs.checkpoints(job_id)] == [320, 360, 400]
        types = [event.type for event in client.jobs.events(job_id)]
        assert "checkpoint_corrupt" not in types
        assert "lease_expired" not in types
        server.terminate()
        assert server.wait(10) == 0
        assert is_whole(disk / "sftd.db")
    finally:
        for process in processes:
            process.kill()
            process.wait()


# ---------------------------------------------------------------- which requests wait


@pytest.mark.parametrize(
    ("method", "path", "waits"),
    [
        ("GET", "/jobs", False),
        ("POST", "/jobs", True),
        ("POST", "/jobs/job_1/cancel", False),
        ("POST", "/jobs/job_1/pause", False),
        ("POST", "/jobs/job_1/resume", True),
        ("DELETE", "/files/file_1", False),
        ("POST", "/files", True),
        ("POST", "/v1/files", True),
        ("POST", "/v1/uploads", True),
        ("POST", "/v1/uploads/upload_1/parts", True),
        ("POST", "/v1/uploads/upload_1/complete", True),
        ("POST", "/v1/uploads/upload_1/cancel", False),
        ("POST", "/keys", True),
        ("POST", "/storage/collect", False),
        ("POST", "/worker/register", False),
        ("POST", "/worker/claim", True),
        ("PUT", "/worker/blobs/00", True),
        ("POST", "/worker/jobs/job_1/heartbeat", False),
        ("POST", "/worker/jobs/job_1/metrics", True),
        ("POST", "/worker/jobs/job_1/logs", True),
        ("POST", "/worker/jobs/job_1/events", True),
        ("POST", "/worker/jobs/job_1/checkpoints", False),
        ("POST", "/worker/jobs/job_1/finish", False),
        ("POST", "/worker/jobs/job_1/release", False),
    ],
)
def test_what_waits_for_room(method: str, path: str, waits: bool) -> None:
    assert needs_room(method, path) is waits
