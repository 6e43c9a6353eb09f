"""Models: what there is, what may be deleted, and what that means for jobs and downloads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sftd_server.auth import Caller
from sftd_server.jobs import removal

ADMIN = Caller("key_admin", "admin", "admin")
JOBS, MODELS = "/v1/fine_tuning/jobs", "/v1/models"
SHA = "ab" * 32


def made(box, client=None, **fields: Any) -> tuple[str, str]:
    """(id of a job that has succeeded, name of its model)."""
    client = client or box.admin
    body = {"model": "org/model", "training_file": box.spec()["training_file"], **fields}
    job_id = str(client.post(JOBS, json=body).json()["id"])
    lease = box.claim()
    results = results_of(box, job_id)
    results.mkdir(parents=True)
    (results / "adapter.safetensors").write_bytes(b"x")
    lease.start()
    lease.finish(files={"adapter.safetensors": {"bytes": 1, "sha256": SHA}})
    return job_id, str(box.admin.get(f"{JOBS}/{job_id}").json()["fine_tuned_model"])


def results_of(box, job_id: str) -> Path:
    return Path(box.server.folder.path / "jobs" / job_id / "results")


def test_bases_in_folders_bases_of_jobs_and_results_are_listed(make_box, tmp_path: Path) -> None:
    roots = tmp_path / "roots"
    for name in ("tiny", "org/small", ".hidden/x", "org/.git"):
        (roots / name).mkdir(parents=True)
        (roots / name / "config.json").write_text("{}")
    box = make_box(model_roots=(roots, tmp_path / "nowhere"))
    _, name = made(box)

    found = box.admin.get(MODELS).json()["data"]

    assert [model["id"] for model in found] == [name, "org/model", "org/small", "tiny"]
    for model in found:
        for path in (model["id"], model["id"].replace("/", "%2F")):
            assert box.admin.get(f"{MODELS}/{path}").json() == model
    assert box.admin.get(f"{MODELS}/{name}x").status_code == 404


def test_a_deleted_model_is_gone_and_its_job_stays(box, assert_error) -> None:
    job_id, name = made(box)

    assert box.admin.delete(f"{MODELS}/{name}").json() == {"id": name, "object": "model", "deleted": True}

    assert not results_of(box, job_id).exists()
    job = box.admin.get(f"{JOBS}/{job_id}").json()
    assert (job["status"], job["fine_tuned_model"]) == ("succeeded", None)
    assert_error(box.admin.get(f"/jobs/{job_id}/archive"), 404, "result_deleted")
    file = f"/jobs/{job_id}/result/files/adapter.safetensors"
    assert_error(box.admin.get(file), 404, "result_deleted")
    assert_error(box.admin.get(f"{MODELS}/{name}"), 404, "unknown_model")
    assert_error(box.admin.delete(f"{MODELS}/{name}"), 404, "unknown_model")
    assert box.events(job_id)[-1] == "result_deleted"
    answer = box.admin.post("/jobs", json=box.spec(base_model=f"job:{job_id}"))
    assert "has been deleted" in assert_error(answer, 422, "invalid_spec")["message"]


def test_the_audit_log_finds_the_deletion_of_a_model_by_its_job(box) -> None:
    job_id, name = made(box, client=box.key("ci"), suffix="tides")

    box.admin.delete(f"{MODELS}/{name}")

    entry = box.admin.get("/audit", params={"target": job_id}).json()["data"][0]
    assert entry["action"] == "model.delete"
    assert entry["details"] == {"model": name, "owner": "ci"}


def test_only_its_owner_and_admins_may_delete_a_model(box, assert_error) -> None:
    owner = box.key("ann")
    _, name = made(box, owner)

    assert_error(box.key("bob").delete(f"{MODELS}/{name}"), 403, "not_owner")
    assert owner.delete(f"{MODELS}/{name}").status_code == 200


def test_a_model_is_kept_while_a_job_that_is_not_over_needs_it(box, assert_error) -> None:
    job_id, name = made(box)
    body = {"model": name, "training_file": box.spec()["training_file"]}
    other = box.admin.post(JOBS, json=body).json()["id"]

    answer = box.admin.delete(f"{MODELS}/{name}")

    assert other in assert_error(answer, 409, "model_needed")["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert results_of(box, job_id).exists()
    box.admin.post(f"{JOBS}/{other}/cancel")
    assert box.admin.delete(f"{MODELS}/{name}").status_code == 200


@pytest.mark.sqlite  # one writer: what is posted waits behind the deletion
def test_a_model_that_is_deleted_while_a_job_is_posted_on_it_is_missed(box, assert_error) -> None:
    job_id, name = made(box)
    body = {"model": name, "training_file": box.spec()["training_file"]}

    def delete(session) -> None:
        removal.remove_result(session, job_id, ADMIN, box.clock.now())

    with ThreadPoolExecutor(1) as pool:
        with box.in_open_write(delete):
            posting = pool.submit(box.admin.post, JOBS, json=body)
            while not box.server.db.num_waiting and not posting.done():
                pass
        answer = posting.result()

    error = assert_error(answer, 400, "invalid_spec")
    assert error["param"] == "model"
    assert error["message"].startswith("model: the model that")


@pytest.mark.parametrize("name", ["org/model", "ft:org/model:admin::{job_id}:ckpt-step-3"])
def test_bases_and_checkpoints_can_not_be_deleted(box, assert_error, name: str) -> None:
    job_id, _ = made(box)

    answer = box.admin.delete(f"{MODELS}/{name.format(job_id=job_id)}")

    assert assert_error(answer, 400, answer.json()["error"]["code"])["param"] == "model"


def test_a_deletion_that_a_crash_cut_short_is_finished_at_the_next_start(make_box) -> None:
    box = make_box()
    job_id, name = made(box)
    box.admin.delete(f"{MODELS}/{name}")
    results_of(box, job_id).mkdir()  # as if it had died before
    box.stop()

    again = make_box()

    again.admin.get(f"/jobs/{job_id}")
    for _ in range(500):
        if not results_of(again, job_id).exists():
            return
        again.run(again.server.db.read(lambda session: None))
    raise AssertionError("it is still there")
