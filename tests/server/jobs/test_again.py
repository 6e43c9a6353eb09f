"""Retry and clone: new jobs made from old ones."""

import pytest


def post(box, job_id: str, verb: str, body: object = None, **headers: str):
    return box.admin.post(f"/jobs/{job_id}/{verb}", json=body, headers=headers)


def ended(box, state: str = "failed", steps=(10, 20), **fields):
    """A job that is over, with checkpoints of these steps."""
    lease = box.running(**fields)
    for step in steps:
        lease.checkpoint(step)
    if state == "cancelled":
        box.admin.post(f"/jobs/{lease.job_id}/cancel")
    lease.finish(state)
    assert box.state(lease.job_id) == state
    return lease


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_retry_goes_on_from_the_newest_checkpoint_of_the_old_job(box, state: str) -> None:
    old = ended(box, state, name="first", metadata={"team": "q"})

    job = post(box, old.job_id, "retry").json()

    assert (job["state"], job["retry_of"], job["name"]) == ("queued", old.job_id, "first")
    assert job["spec"] == box.job(old.job_id)["spec"]
    refs = box.claim(protocol=2).answer["checkpoints"]
    assert [(r["step"], r["folder"]) for r in refs] == [
        (20, f"jobs/{old.job_id}"),
        (10, f"jobs/{old.job_id}"),
    ]


def test_a_retry_from_a_step_or_from_scratch(box, assert_error) -> None:
    old = ended(box)

    post(box, old.job_id, "retry", {"step": 10})
    assert [r["step"] for r in box.claim(protocol=2).answer["checkpoints"]] == [10]
    post(box, old.job_id, "retry", {"from": "scratch"})
    assert box.claim(protocol=2).answer["checkpoints"] == []
    assert_error(post(box, old.job_id, "retry", {"step": 15}), 404, "unknown_checkpoint")
    error = assert_error(post(box, old.job_id, "retry", {"from": "there"}), 422, "invalid_request")
    assert error["param"] == "from"


def test_without_a_checkpoint_a_retry_begins_from_scratch_and_says_so(box) -> None:
    old = ended(box, steps=())

    job = post(box, old.job_id, "retry").json()

    events = box.admin.get(f"/jobs/{job['id']}/events").json()["data"]
    assert "from scratch, as it has no checkpoint" in events[0]["message"]
    assert box.claim(protocol=2).answer["checkpoints"] == []


def test_a_job_that_is_not_over_is_not_retried(box, assert_error) -> None:
    lease = box.running()

    assert "Cancel it first" in assert_error(post(box, lease.job_id, "retry"), 409, "wrong_state")["message"]


def test_a_job_that_succeeded_is_retried_from_scratch_or_a_step_only(box, assert_error) -> None:
    old = ended(box, "succeeded")

    assert_error(post(box, old.job_id, "retry"), 409, "wrong_state")
    assert post(box, old.job_id, "retry", {"from": "scratch"}).status_code == 200
    assert post(box, old.job_id, "retry", {"step": 10}).status_code == 200


def test_a_retry_that_has_checkpoints_of_its_own_goes_on_from_those(box) -> None:
    old = ended(box)
    post(box, old.job_id, "retry")
    lease = box.claim(protocol=2)
    lease.start()
    lease.checkpoint(30)
    lease.post("release", message="stopping")

    refs = box.claim(protocol=2).answer["checkpoints"]

    assert [(r["step"], r["folder"]) for r in refs] == [(30, None)]


def test_a_retry_of_a_retry_without_checkpoints_goes_on_from_the_first_job(box) -> None:
    old = ended(box)
    again = post(box, old.job_id, "retry").json()["id"]
    box.admin.post(f"/jobs/{again}/cancel")

    assert post(box, again, "retry").json()["retry_of"] == again
    refs = box.claim(protocol=2).answer["checkpoints"]
    assert refs[0]["folder"] == f"jobs/{old.job_id}"


def test_the_retries_of_a_pipeline_build_on_each_other(box) -> None:
    first = box.running(lora={"rank": 4})
    second = box.submit(base_model=f"job:{first.job_id}", after=[first.job_id], lora={"rank": 4})
    third = box.submit(base_model=f"job:{second}", after=[second], lora={"rank": 4})
    first.checkpoint(10)
    first.finish("failed")

    again = [post(box, job_id, "retry").json() for job_id in (first.job_id, second, third)]
    copy = post(box, third, "clone", {}).json()

    assert [job["after"] for job in again] == [[], [again[0]["id"]], [again[1]["id"]]]
    assert [job["spec"]["base_model"] for job in again] == [
        "org/model",
        f"job:{again[0]['id']}",
        f"job:{again[1]['id']}",
    ]
    assert (copy["after"], copy["spec"]["base_model"]) == ([again[1]["id"]], f"job:{again[1]['id']}")
    bases = []
    for _ in again:
        lease = box.claim(protocol=2)
        bases.append(lease.answer["base"] and lease.answer["base"]["path"])
        lease.start()
        lease.finish()
    assert bases == [None, *(f"jobs/{job['id']}/results" for job in again[:2])]


def test_a_damaged_seed_is_struck_from_the_job_that_wrote_it(box) -> None:
    old = ended(box)
    post(box, old.job_id, "retry")
    lease = box.claim(protocol=2)
    lease.start()

    lease.checkpoint(20, corrupt=True)

    left = box.admin.get(f"/jobs/{old.job_id}/checkpoints").json()["data"]
    assert [checkpoint["step"] for checkpoint in left] == [10]
    lease.post("release", message="stopping")
    assert [r["step"] for r in box.claim(protocol=2).answer["checkpoints"]] == [10]


@pytest.mark.sqlite  # on PostgreSQL it is given no jobs at all
def test_a_worker_of_the_earlier_version_is_not_given_a_job_with_a_seed(box) -> None:
    old = ended(box)
    post(box, old.job_id, "retry")

    assert box.try_claim(protocol=1).status_code == 204
    assert box.try_claim(protocol=2).status_code == 200


@pytest.mark.parametrize("verb", ["retry", "clone"])
def test_the_same_call_makes_one_job(box, assert_error, verb: str) -> None:
    old = ended(box)
    headers = {"Idempotency-Key": "k"}

    first, second = (post(box, old.job_id, verb, {}, **headers).json()["id"] for _ in range(2))

    assert first == second
    other = post(box, ended(box).job_id, verb, {}, **headers)
    assert_error(other, 422, "idempotency_key_reused")


@pytest.mark.parametrize("verb", ["retry", "clone"])
def test_the_model_of_a_retry_or_a_clone_keeps_the_suffix_of_its_name(box, verb: str) -> None:
    body = {"model": "org/model", "training_file": box.upload(), "suffix": "tides"}
    old = box.admin.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    box.admin.post(f"/jobs/{old}/cancel")

    again = post(box, old, verb, {}).json()["id"]

    assert box.admin.get(f"/v1/fine_tuning/jobs/{again}").json()["suffix"] == "tides"


def test_a_clone_changes_what_it_is_told_to(box) -> None:
    old = box.submit(learning_rate=1e-3, metadata={"a": "b"}, lora={"rank": 4})

    job = post(box, old, "clone", {"learning_rate": 1e-4, "warmup_ratio": 0.1, "num_epochs": 2}).json()

    assert (job["clone_of"], job["retry_of"], job["metadata"]) == (old, None, {"a": "b"})
    spec = job["spec"]
    assert (spec["learning_rate"], spec["lora"]["rank"]) == (1e-4, 4)
    assert (spec["warmup_steps"], spec["warmup_ratio"]) == (None, 0.1)
    assert (spec["max_steps"], spec["num_epochs"]) == (None, 2)
    assert post(box, old, "clone", {"lora": None}).json()["spec"]["lora"]["rank"] == 16


def test_a_clone_is_checked_like_a_new_job(box, assert_error) -> None:
    old = box.submit()

    error = assert_error(post(box, old, "clone", {"learnin_rate": 1, "max_steps": 0}), 422, "invalid_spec")

    assert "did you mean learning_rate?" in error["message"]
    assert "max_steps: must be" in error["message"]


def test_anybody_may_copy_a_job_and_owns_the_copy(box) -> None:
    old = ended(box)
    ann = box.key("ann")

    assert ann.post(f"/jobs/{old.job_id}/retry").json()["owner"] == "ann"
    assert ann.post(f"/jobs/{old.job_id}/clone", json={}).json()["owner"] == "ann"


def test_the_file_of_a_retried_job_may_be_gone(box, assert_error) -> None:
    file_id = box.upload()
    old = ended(box, training_file=file_id)
    box.admin.delete(f"/files/{file_id}")

    assert "training_file" in assert_error(post(box, old.job_id, "retry"), 422, "invalid_spec")["message"]
