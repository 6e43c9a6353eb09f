"""A worker with a data folder of its own and the real server: fetched, sent, resumed elsewhere, whoever is killed."""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sftd._transport import Transport
from sftd.protocol import InputFile, Lease
from sftd.schemas import FailureReason
from sftd.spec import JobSpec
from sftd_worker.files import PrepareFailed
from sftd_worker.lease import LeaseKeeper
from sftd_worker.outbox import Outbox
from sftd_worker.transfer import ThroughServer

if TYPE_CHECKING:
    from conftest import Box

LARGE_BYTES = 256 * 1024 * 1024  # 32 pieces: long enough to be killed in between


@pytest.fixture
def server_settings() -> dict[str, str]:
    return {"SFTD_KEEP_CHECKPOINTS": "1000"}  # what is removed, and when, is tested elsewhere


def part_of(box: "Box", job_id: str) -> Path | None:
    """An unfinished upload."""
    return next((box.data / "uploads" / job_id).glob("*.part"), None)


def part_bytes(box: "Box", job_id: str) -> int:
    part = part_of(box, job_id)
    with contextlib.suppress(FileNotFoundError):  # it has just become whole
        return part.stat().st_size if part else 0
    return 0


def check_checkpoint(box: "Box", job_id: str, step: int) -> None:
    """The checkpoint of a step lies whole on the server, every file as its manifest says."""
    folder = box.job_folder(job_id) / "checkpoints" / f"checkpoint-{step}"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == step
    for name, file in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])


def test_a_job_runs_without_the_servers_folder_and_its_downloads_are_right(
    box: "Box", tmp_path: Path
) -> None:
    job_id = box.post(steps=60, step_seconds=0.02, checkpoint_every=10)
    box.start_own_worker("one")

    job = box.client.jobs.wait(job_id, timeout_seconds=30)

    assert (job.state, job.attempt) == ("succeeded", 1)
    assert box.steps(job_id) == list(range(1, 61))
    assert [found.step for found in box.client.jobs.checkpoints(job_id)] == [10, 20, 30, 40, 50, 60]
    for step in (10, 60):
        check_checkpoint(box, job_id, step)
    written = box.client.jobs.download(job_id, tmp_path / "out")
    assert [path.read_text() for path in written if path.name == "model.txt"] == ["trained"]
    assert not (box.data / "jobs" / job_id / "logs").exists()  # nothing came by the folder
    here = tmp_path / "one" / "jobs" / job_id / "checkpoints"
    assert sorted(path.name for path in here.iterdir()) == ["checkpoint-50", "checkpoint-60"]


def test_the_server_is_killed_in_the_middle_of_an_upload(box: "Box") -> None:
    """The next server goes on with the same part: what had come is not sent again."""
    job_id = box.post(steps=20, step_seconds=0.02, checkpoint_every=20, checkpoint_bytes=LARGE_BYTES)
    box.start_own_worker("one")
    box.until(lambda: 0 < part_bytes(box, job_id) < LARGE_BYTES, 20)
    box.server.kill()
    box.server.wait()
    had = part_bytes(box, job_id)
    assert 0 < had < LARGE_BYTES
    box.start_server()
    assert part_bytes(box, job_id) == had
    found = part_of(box, job_id)
    assert found
    part = found.stat().st_ino

    job = box.client.jobs.wait(job_id, timeout_seconds=40)
    assert (job.state, job.attempt) == ("succeeded", 1)
    check_checkpoint(box, job_id, 20)
    weights = box.data / "jobs" / job_id / "checkpoints/checkpoint-20/adapter.safetensors"
    assert weights.stat().st_ino == part


def test_a_killed_workers_job_goes_on_on_another_machine(box: "Box") -> None:
    job_id = box.post(steps=100, step_seconds=0.02, checkpoint_every=10)
    first = box.start_own_worker("one")
    box.until(lambda: list(box.client.jobs.checkpoints(job_id)))

    first.kill()
    box.start_own_worker("two")
    job = box.client.jobs.wait(job_id, timeout_seconds=40)

    assert job.attempt == 2
    assert box.steps(job_id) == list(range(1, 101))
    resumed = json.loads((box.folder / "two" / "jobs" / job_id / "job.json").read_text())["resume_from"]
    assert resumed.startswith(str(box.folder / "two"))
    check_checkpoint(box, job_id, 100)


def test_a_paused_job_is_on_record_and_goes_on_elsewhere(box: "Box") -> None:
    job_id = box.post(steps=200, step_seconds=0.02)
    first = box.start_own_worker("one")
    box.until(lambda: len(box.steps(job_id)) > 5)
    box.client.jobs.pause(job_id)
    box.until(lambda: box.client.jobs.retrieve(job_id).state == "paused")
    assert len(list(box.client.jobs.checkpoints(job_id))) == 1
    first.terminate()
    assert first.wait(10) == 0

    box.start_own_worker("two")
    box.client.jobs.resume(job_id)
    box.client.jobs.wait(job_id, timeout_seconds=30)
    assert box.steps(job_id) == list(range(1, 201))


def test_a_cancel_gives_up_what_is_being_sent(box: "Box") -> None:
    script = {"checkpoint_every": 5, "checkpoint_bytes": LARGE_BYTES}
    job_id = box.post(steps=10**6, step_seconds=0.02, **script)
    box.start_own_worker("one")
    box.until(lambda: part_bytes(box, job_id) > 0, 20)

    asked_at = time.monotonic()
    box.client.jobs.cancel(job_id)
    box.until(lambda: box.client.jobs.retrieve(job_id).state == "cancelled", 8)
    assert time.monotonic() - asked_at < 8


def test_a_folder_that_belongs_to_a_server_is_refused_as_ones_own(box: "Box") -> None:
    worker = box.start_own_worker("one", data=str(box.data))

    assert worker.wait(15) == 1
    assert "leave --own-data away" in (box.folder / "one.log").read_text()


def test_an_empty_folder_without_the_flag_is_refused_and_the_flag_is_named(box: "Box") -> None:
    worker = box.start_own_worker("one", own_data=False)

    assert worker.wait(15) == 1
    assert "--own-data" in (box.folder / "one.log").read_text()


# ---------------------------------------------------------------- what a fetch goes through


class Source:
    """A server of one file that breaks off, lies, or answers with errors: one entry of `acts` a call, then as it should."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.acts: list[str] = []
        self.starts: list[int] = []
        source = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                source.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        start = int((handler.headers["Range"] or "bytes=0-")[6:-1])
        self.starts.append(start)
        act = self.acts.pop(0) if self.acts else ""
        if act.isdigit():
            error = {"message": "x", "type": "x", "param": None, "code": {"404": "file_gone"}.get(act, "x")}
            body = json.dumps({"error": error}).encode()
            handler.send_response(int(act))
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)
            return
        content = self.content if act != "lie" else self.content[::-1]
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        rest = content[start:]
        handler.wfile.write(rest[: len(rest) // 2] if act == "break" else rest)
        handler.close_connection = True


ROWS = b"".join(b'{"text": "row %d"}\n' % number for number in range(100_000))
SHA = hashlib.sha256(ROWS).hexdigest()
FILE = InputFile(file_id="file_1", filename="rows.jsonl", sha256=SHA, bytes=len(ROWS), path=f"blobs/{SHA}")


@pytest.fixture
def source() -> Iterator[Source]:
    source = Source(ROWS)
    yield source
    source.http.shutdown()
    source.http.server_close()


@pytest.fixture
def transfer(source: Source, tmp_path: Path) -> ThroughServer:
    lease = Lease(
        job_id="job_1",
        attempt=1,
        token="t",
        lease_seconds=60,
        spec=JobSpec.model_validate({"base_model": "org/model", "training_file": "file_1"}),
        folder="jobs/job_1",
        training_file=FILE,
        validation_file=None,
        base=None,
        checkpoints=[],
        next_seq={},
    )
    transport = Transport(f"http://127.0.0.1:{source.http.server_port}", "key")
    keeper = LeaseKeeper(lease, transport, wait_seconds=1, on_news=lambda: None)
    return ThroughServer(tmp_path, transport, Outbox(transport, keeper), keeper)


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_fetch_that_breaks_off_goes_on_where_it_was(
    transfer: ThroughServer, source: Source, tmp_path: Path
) -> None:
    source.acts = ["break", "503", "break"]

    transfer.bring_input(FILE, lambda: None)

    assert (tmp_path / FILE.path).read_bytes() == ROWS
    assert files_below(tmp_path) == [FILE.path]
    half = len(ROWS) // 2
    assert source.starts == [0, half, half, half + (len(ROWS) - half) // 2]


def test_a_fetch_goes_on_after_the_worker_was_killed(
    transfer: ThroughServer, source: Source, tmp_path: Path
) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / f".part-{SHA}").write_bytes(ROWS[:1000])

    transfer.bring_input(FILE, lambda: None)
    assert (tmp_path / FILE.path).read_bytes() == ROWS
    transfer.bring_input(FILE, lambda: None)
    assert source.starts == [1000]  # what is there and right is not fetched again


def test_wrong_bytes_are_fetched_again_and_refused_in_the_end(
    transfer: ThroughServer, source: Source, tmp_path: Path
) -> None:
    source.acts = ["lie"]
    transfer.bring_input(FILE, lambda: None)
    assert (tmp_path / FILE.path).read_bytes() == ROWS
    (tmp_path / FILE.path).unlink()

    source.acts = ["lie"] * 5
    with pytest.raises(
        PrepareFailed, match=r"rows.jsonl cannot be fetched from the server.* other bytes"
    ) as failed:
        transfer.bring_input(FILE, lambda: None)
    assert failed.value.reason is FailureReason.WORKER_ERROR
    assert files_below(tmp_path) == []


def test_a_part_that_is_too_long_is_begun_anew(
    transfer: ThroughServer, source: Source, tmp_path: Path
) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / f".part-{SHA}").write_bytes(ROWS + b"more")
    source.acts = ["416"]

    transfer.bring_input(FILE, lambda: None)
    assert (tmp_path / FILE.path).read_bytes() == ROWS


def test_a_file_that_the_server_has_lost_fails_the_attempt_with_its_name(
    transfer: ThroughServer, source: Source
) -> None:
    source.acts = ["404"]

    with pytest.raises(PrepareFailed, match=r"rows.jsonl cannot be fetched from the server: x"):
        transfer.bring_input(FILE, lambda: None)


def test_a_fetch_ends_when_the_attempt_does(transfer: ThroughServer, source: Source) -> None:
    class Interrupted(Exception):
        pass

    def check() -> None:
        if source.starts:
            raise Interrupted

    with pytest.raises(Interrupted):
        transfer.bring_input(FILE, check)


def test_nothing_is_fetched_outside_the_data_folder(transfer: ThroughServer, source: Source) -> None:
    with pytest.raises(PrepareFailed, match="outside the data folder"):
        transfer.bring_input(FILE.model_copy(update={"path": "../evil"}), lambda: None)
    assert source.starts == []
