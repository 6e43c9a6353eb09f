"""What a trainer is allowed to read."""

import hashlib
import json
from pathlib import Path

import pytest

from sftd.protocol import BaseRef, CheckpointRef, InputFile, Lease, TrainerJob
from sftd.schemas import FailureReason
from sftd.spec import JobSpec
from sftd_worker.files import Prepared, PrepareFailed, prepare, write_job
from sftd_worker.settings import WorkerSettings

ROWS = b'{"prompt": "a", "completion": "b"}\n'


def lease(data: Path, *, path: str = "blobs/rows", base: BaseRef | None = None, **spec: object) -> Lease:
    (data / "blobs").mkdir(exist_ok=True)
    (data / "blobs/rows").write_bytes(ROWS)
    file = InputFile(
        file_id="file_1",
        filename="rows.jsonl",
        sha256=hashlib.sha256(ROWS).hexdigest(),
        bytes=len(ROWS),
        path=path,
    )
    return Lease(
        job_id="job_1",
        attempt=1,
        token="t",
        lease_seconds=30,
        spec=JobSpec.model_validate({"base_model": "org/model", "training_file": "file_1", **spec}),
        folder="jobs/job_1",
        training_file=file,
        validation_file=None,
        base=base,
        checkpoints=[],
        next_seq={},
    )


def prepared(data: Path, found: Lease, **settings: object) -> Prepared:
    return prepare(found, WorkerSettings(data=data, **settings), check=lambda: None)  # type: ignore[arg-type]  # test


def test_the_job_file_holds_absolute_paths(data: Path) -> None:
    job = prepared(data, lease(data)).job

    write_job(job)

    assert TrainerJob.model_validate_json((data / "jobs/job_1/job.json").read_text()) == job
    assert (job.model_path, job.training_path) == ("org/model", str(data / "blobs/rows"))
    assert job.output_dir == str(data / "jobs/job_1")


def test_a_model_folder_under_a_root_stands_for_a_hub_id(data: Path) -> None:
    (data / "models/org/model").mkdir(parents=True)

    assert prepared(data, lease(data)).job.model_path == str(data / "models/org/model")


def test_an_absolute_model_must_lie_under_a_root(data: Path, tmp_path: Path) -> None:
    outside = tmp_path / "models_evil"
    outside.mkdir()
    (data / "models").mkdir()
    (data / "models/link").symlink_to(outside)

    for name in (str(outside), str(data / "models/link"), str(data / "models_evil")):
        with pytest.raises(PrepareFailed) as failed:
            prepared(data, lease(data, base_model=name))
        assert failed.value.reason is FailureReason.MODEL_NOT_FOUND


def test_another_jobs_adapter_is_continued_on_its_base(data: Path) -> None:
    (data / "jobs/job_0/results").mkdir(parents=True)
    base = BaseRef(path="jobs/job_0/results", is_adapter=True, base_model="org/model")

    job = prepared(data, lease(data, base_model="job:job_0", base=base)).job

    assert (job.model_path, job.adapter_path) == ("org/model", str(data / "jobs/job_0/results"))


def test_another_jobs_full_model_is_the_model(data: Path) -> None:
    (data / "jobs/job_0/results").mkdir(parents=True)
    base = BaseRef(path="jobs/job_0/results", is_adapter=False, base_model="jobs/job_0/results")

    job = prepared(data, lease(data, base_model="job:job_0", base=base)).job

    assert (job.model_path, job.adapter_path) == (str(data / "jobs/job_0/results"), None)


def test_a_path_out_of_the_data_folder_is_refused(data: Path) -> None:
    with pytest.raises(PrepareFailed, match="outside the data folder"):
        prepared(data, lease(data, path="../secret"))


def test_the_wandb_run_is_the_same_in_every_attempt(data: Path) -> None:
    assert prepared(data, lease(data, wandb={"project": "p"})).job.wandb_run_id == "job_1"
    assert prepared(data, lease(data)).job.wandb_run_id is None


def seeded(data: Path, *steps: int) -> list[CheckpointRef]:
    """Checkpoints of another job, newest first."""
    refs = []
    for step in steps:
        folder = data / f"jobs/job_0/checkpoints/checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"w")
        file = {"bytes": 1, "sha256": hashlib.sha256(b"w").hexdigest()}
        manifest = json.dumps({"step": step, "files": {"weights": file}}).encode()
        (folder / "manifest.json").write_bytes(manifest)
        sha256 = hashlib.sha256(manifest).hexdigest()
        refs.append(CheckpointRef(step=step, name=folder.name, manifest_sha256=sha256, folder="jobs/job_0"))
    return refs


def test_a_retried_job_goes_on_from_the_checkpoint_of_the_other_one(data: Path) -> None:
    found = lease(data).model_copy(update={"checkpoints": seeded(data, 20, 10)})

    assert prepared(data, found).job.resume_from == str(data / "jobs/job_0/checkpoints/checkpoint-20")


def test_a_damaged_checkpoint_of_the_other_job_gives_way_to_an_older_one(data: Path) -> None:
    found = lease(data).model_copy(update={"checkpoints": seeded(data, 20, 10)})
    (data / "jobs/job_0/checkpoints/checkpoint-20/weights").write_bytes(b"x")

    ready = prepared(data, found)

    assert ready.job.resume_from == str(data / "jobs/job_0/checkpoints/checkpoint-10")
    assert [(report.name, report.corrupt) for report in ready.corrupt] == [("checkpoint-20", True)]


def test_a_checkpoint_outside_the_data_folder_is_refused(data: Path) -> None:
    refs = [ref.model_copy(update={"folder": "../job_0"}) for ref in seeded(data, 10)]

    with pytest.raises(PrepareFailed, match="outside the data folder"):
        prepared(data, lease(data).model_copy(update={"checkpoints": refs}))
