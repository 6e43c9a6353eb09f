"""Posting jobs: every mistake at once, references checked, idempotent."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


def mistakes(answer) -> dict[str, str]:
    lines = answer.json()["error"]["message"].split("\n")
    return dict(line.split(": ", 1) for line in lines)


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return path


def test_a_job_is_queued_with_its_files_pinned(box) -> None:
    job_id = box.submit(metadata={"team": "q"}, name="first")

    job = box.job(job_id)
    assert (job["state"], job["queue_position"], job["owner"]) == ("queued", 1, "admin")
    lease = box.claim()
    assert lease.answer["training_file"]["sha256"] in lease.answer["training_file"]["path"]


def test_all_mistakes_are_told_at_once_in_the_users_words(box, assert_error) -> None:
    spec = {
        "base_model": "org/m",
        "learnin_rate": 1,
        "training_file": "file_x",
        "lora": {"rnak": 8},
        "max_steps": 0,
    }

    answer = box.admin.post("/jobs", json=spec)

    assert_error(answer, 422, "invalid_spec")
    found = mistakes(answer)
    assert found["learnin_rate"] == "unknown field; did you mean learning_rate?"
    assert found["lora.rnak"] == "unknown field; did you mean rank?"
    assert "there is no file 'file_x'" in found["training_file"]
    assert found["max_steps"] == "must be greater than or equal to 1, not 0"
    assert answer.json()["error"]["param"] == next(iter(found))


def test_missing_fields_and_conflicting_fields_are_named(box) -> None:
    answer = box.admin.post("/jobs", json={"max_steps": 5, "num_epochs": 2})

    assert mistakes(answer) == {
        "base_model": "is required; give it",
        "training_file": "is required; give it",
        "num_epochs": "stands beside max_steps; give one of the two",
    }


@pytest.mark.parametrize("body", ["[]", "3", '"x"', "null"])
def test_a_body_that_is_no_object_is_refused(box, assert_error, body: str) -> None:
    assert_error(box.admin.post("/jobs", content=body), 422, "invalid_spec")


def test_the_same_idempotency_key_brings_the_same_job(box, assert_error) -> None:
    spec, headers = box.spec(name="once"), {"Idempotency-Key": "k1"}
    first = box.admin.post("/jobs", json=spec, headers=headers).json()["id"]

    reordered = dict(reversed(spec.items()))
    assert box.admin.post("/jobs", json=reordered, headers=headers).json()["id"] == first
    other = box.admin.post("/jobs", json={**spec, "name": "other"}, headers=headers)
    error = assert_error(other, 422, "idempotency_key_reused")
    assert first in error["message"]
    assert box.key("ci").post("/jobs", json=spec, headers=headers).json()["id"] != first


def test_twenty_parallel_posts_with_one_key_make_one_job(box) -> None:
    spec = box.spec()

    def post(_: int) -> str:
        return str(box.admin.post("/jobs", json=spec, headers={"Idempotency-Key": "same"}).json()["id"])

    with ThreadPoolExecutor(20) as pool:
        ids = set(pool.map(post, range(20)))

    assert len(ids) == 1
    assert len(box.admin.get("/jobs").json()["data"]) == 1


def test_a_local_model_must_lie_under_an_allowed_root_with_safetensors(box, tmp_path: Path) -> None:
    models = box.server.folder.path / "models"
    good = model_folder(models / "tiny")
    outside = model_folder(tmp_path / "outside")
    sibling = model_folder(models.parent / "models_evil" / "tiny")
    (models / "link").symlink_to(outside)
    pickled = model_folder(models / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (models / "empty").mkdir()

    def message(base_model: str) -> str:
        answer = box.admin.post("/jobs", json=box.spec(base_model=base_model))
        return "" if answer.status_code == 200 else mistakes(answer)["base_model"]

    assert message(str(good)) == message("tiny") == ""
    for path in (outside, sibling, models / "link", models, "/etc"):
        assert message(str(path)).startswith("is not under an allowed root")
    assert message("link").startswith("is not under an allowed root")
    assert "no config.json" in message(str(models / "empty"))
    assert "no .safetensors" in message(str(pickled))
    assert "'..'" in message(f"{models}/../../etc")


def test_a_job_reference_must_exist_and_be_done(box) -> None:
    lease = box.running(method="full")

    def message(base_model: str, **fields) -> dict[str, str]:
        answer = box.admin.post("/jobs", json=box.spec(base_model=base_model, **fields))
        return {} if answer.status_code == 200 else mistakes(answer)

    assert "there is no job" in message("job:job_nope")["base_model"]
    assert "is running" in message(f"job:{lease.job_id}")["base_model"]
    assert "no checkpoint of step 7" in message(f"job:{lease.job_id}@7")["base_model"]
    lease.checkpoint(7)
    assert "no files at" in message(f"job:{lease.job_id}@7")["base_model"]
    (box.server.folder.path / "jobs" / lease.job_id / "checkpoints" / "checkpoint-7").mkdir(parents=True)
    assert message(f"job:{lease.job_id}@7") == {}
    lease.checkpoint(7, corrupt=True)
    assert "no checkpoint of step 7" in message(f"job:{lease.job_id}@7")["base_model"]


def test_an_adapter_is_continued_with_the_same_lora_only(box) -> None:
    lease = box.running(method="lora", lora={"rank": 4})
    lease.finish()
    (box.server.folder.path / "jobs" / lease.job_id / "results").mkdir(parents=True)
    reference = f"job:{lease.job_id}"

    full = box.admin.post("/jobs", json=box.spec(base_model=reference, method="full"))
    other = box.admin.post("/jobs", json=box.spec(base_model=reference))
    box.submit(base_model=reference, method="qlora", lora={"rank": 4})

    assert "can not train the adapter" in mistakes(full)["method"]
    assert '"rank":4' in mistakes(other)["lora"]
    assert box.claim().answer["base"] == {
        "path": f"jobs/{lease.job_id}/results",
        "is_adapter": True,
        "base_model": "org/model",
    }


def test_listing_goes_by_cursor_state_owner_and_metadata(box) -> None:
    ids = [box.submit(metadata={"team": "a" if i % 2 else "b", 'we"ird.$key': "x"}) for i in range(5)]
    box.admin.post(f"/jobs/{ids[0]}/cancel")

    def listed(**params) -> list[str]:
        return [job["id"] for job in box.admin.get("/jobs", params=params).json()["data"]]

    first = box.admin.get("/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in first["data"]] == ids[:2:-1]
    assert (first["has_more"], first["next_after"]) == (True, ids[3])
    assert listed(after=ids[3]) == ids[2::-1]
    assert listed(state="cancelled") == [ids[0]]
    assert len(listed(state=["cancelled", "queued"])) == 5
    assert listed(**{"metadata[team]": "a"}) == [ids[3], ids[1]]
    assert listed(**{"metadata[team]": "a", 'metadata[we"ird.$key]': "y"}) == []
    assert listed(owner="nobody") == []


def test_the_queue_goes_by_priority_then_age(box) -> None:
    low, high, low_too = box.submit(), box.submit(priority=5), box.submit()

    assert [box.job(id)["queue_position"] for id in (high, low, low_too)] == [1, 2, 3]
    assert [box.claim().job_id for _ in range(3)] == [high, low, low_too]


def test_a_spec_in_any_content_type_is_read_as_json(box) -> None:
    body = json.dumps(box.spec())

    answer = box.admin.post(
        "/jobs", content=body, headers={"content-type": "application/x-www-form-urlencoded"}
    )

    assert answer.status_code == 200
