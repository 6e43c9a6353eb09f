"""The copy in S3 with a real server and real workers: killed while it is made, and what is resumed and downloaded from it."""

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.s3 import new_bucket, s3_server

if TYPE_CHECKING:
    from conftest import Box

LARGE_BYTES = 400 * 1024 * 1024  # 25 parts: long enough to be killed in between


class Bucket:
    def __init__(self, endpoint: str) -> None:
        self.s3, self.name = new_bucket(endpoint)
        self.environment = {
            "SFTD_ARTIFACTS_URL": f"s3://{self.name}/sftd",
            "SFTD_MIRROR_SECONDS": "0.2",
            "SFTD_KEEP_CHECKPOINTS": "1000",  # what is removed, and when, is tested elsewhere
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }

    def names(self) -> list[str]:
        listed = self.s3.list_objects_v2(Bucket=self.name).get("Contents", [])
        return [entry["Key"].removeprefix("sftd/") for entry in listed]

    def num_under_way(self) -> int:
        return len(self.s3.list_multipart_uploads(Bucket=self.name).get("Uploads", []))

    def sha_of(self, sha256: str) -> str:
        digest = hashlib.sha256()
        body = self.s3.get_object(Bucket=self.name, Key=f"sftd/blobs/sha256/{sha256[:2]}/{sha256}")["Body"]
        for piece in body.iter_chunks(1 << 20):
            digest.update(piece)
        return digest.hexdigest()


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(moto: str) -> Bucket:
    return Bucket(moto)


@pytest.fixture
def server_settings(bucket: Bucket) -> dict[str, str]:
    return bucket.environment


def paused_with_checkpoints(box: "Box", bucket: Bucket, worker: Any) -> tuple[str, list[str]]:
    """A job that has been put aside, and all of its checkpoints in the store; its worker has stopped."""
    job_id = box.post(steps=120, step_seconds=0.02, checkpoint_every=20)
    process = worker()
    box.until(lambda: len(list(box.client.jobs.checkpoints(job_id))) >= 2)
    box.client.jobs.pause(job_id)
    box.until(lambda: box.client.jobs.retrieve(job_id).state == "paused")
    process.terminate()
    assert process.wait(15) == 0
    names = [f"checkpoint-{found.step}" for found in box.client.jobs.checkpoints(job_id)]
    wanted = {f"manifests/{job_id}/{name}.json" for name in names}
    box.until(lambda: wanted <= set(bucket.names()))
    return job_id, names


def test_a_server_killed_while_it_sends_a_large_file_sends_it_again(box: "Box", bucket: Bucket) -> None:
    job_id = box.post(steps=5, checkpoint_every=5, checkpoint_bytes=LARGE_BYTES)
    box.start_worker("one")
    box.until(bucket.num_under_way, 60)
    box.server.kill()
    box.server.wait()
    assert bucket.num_under_way() == 1
    (checkpoint,) = _rows(box, "SELECT files FROM checkpoint")
    sha256 = json.loads(checkpoint[0])["adapter.safetensors"]["sha256"]
    assert not any(sha256 in name for name in bucket.names())

    box.start_server()
    box.until(lambda: f"manifests/{job_id}/checkpoint-5.json" in bucket.names(), 90)
    assert bucket.sha_of(sha256) == sha256
    box.until(lambda: _rows(box, "SELECT mirrored_at FROM checkpoint")[0][0])
    assert box.client.jobs.wait(job_id, timeout_seconds=20).state == "succeeded"


def test_a_job_is_resumed_from_the_store_on_a_box_whose_folder_was_lost(box: "Box", bucket: Bucket) -> None:
    job_id, names = paused_with_checkpoints(box, bucket, lambda: box.start_worker("one"))
    shutil.rmtree(box.data / "jobs" / job_id)
    shutil.rmtree(box.data / "blobs")
    (box.data / "blobs" / "sha256").mkdir(parents=True)

    box.client.jobs.resume(job_id)
    box.start_worker("two")
    job = box.client.jobs.wait(job_id, timeout_seconds=40)

    assert job.state == "succeeded"
    assert box.steps(job_id) == list(range(1, 121))
    resumed = json.loads((box.data / "jobs" / job_id / "job.json").read_text())["resume_from"]
    assert Path(resumed).name == names[-1]
    assert "checkpoint_corrupt" not in [event.type for event in box.client.jobs.events(job_id)]


def test_a_worker_of_its_own_folder_resumes_from_the_store(box: "Box", bucket: Bucket) -> None:
    job_id, names = paused_with_checkpoints(box, bucket, lambda: box.start_own_worker("one"))
    shutil.rmtree(box.data / "jobs" / job_id)

    box.client.jobs.resume(job_id)
    box.start_own_worker("two")
    box.client.jobs.wait(job_id, timeout_seconds=40)

    assert box.steps(job_id) == list(range(1, 121))
    resumed = json.loads((box.folder / "two" / "jobs" / job_id / "job.json").read_text())["resume_from"]
    assert Path(resumed).name == names[-1]


def test_a_checkpoint_is_downloaded_from_the_store(box: "Box", bucket: Bucket, tmp_path: Path) -> None:
    job_id, _ = paused_with_checkpoints(box, bucket, lambda: box.start_own_worker("one"))
    shutil.rmtree(box.data / "jobs" / job_id)

    written = box.client.jobs.download_checkpoint(job_id, tmp_path / "out", step=20)
    assert [path.read_text() for path in written] == ["weights of step 20"]


def _rows(box: "Box", query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(f"file:{box.data / 'sftd.db'}?mode=ro", uri=True) as connection:
        return connection.execute(query).fetchall()
