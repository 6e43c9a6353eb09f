"""One job, seen through both surfaces; what is posted, refused and listed at /v1."""

import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import update

from sftd_server.files.rowcount import count_lines
from sftd_server.tables import FileRow, JobRow

JOBS = "/v1/fine_tuning/jobs"


def posted(box, **fields: Any) -> dict[str, Any]:
    answer = post(box, **fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def post(box, **fields: Any):
    body = {"model": "org/model", "training_file": box.spec()["training_file"], **fields}
    return box.admin.post(JOBS, json={name: value for name, value in body.items() if value is not ...})


def mistakes(answer) -> dict[str, str]:
    assert answer.status_code == 400, answer.text
    return dict(line.split(": ", 1) for line in answer.json()["error"]["message"].split("\n"))


def set_file(box, file_id: str, **values: Any) -> None:
    change = update(FileRow).where(FileRow.id == file_id).values(**values)
    box.run(box.server.db.write(lambda session: session.exec(change).rowcount))


def hang_when_read(box, file_id: str) -> None:
    """A pipe in place of the content, into which nobody writes."""
    sha256 = box.admin.get(f"/files/{file_id}").json()["sha256"]
    path = box.server.folder.path / box.server.folder.blob_name(sha256)
    path.unlink()
    os.mkfifo(path)


def test_a_job_is_the_same_through_both_surfaces(box) -> None:
    theirs = posted(box, hyperparameters={"n_epochs": 2, "batch_size": 6, "learning_rate_multiplier": 0.5})
    ours = box.job(theirs["id"])

    assert (ours["spec"]["num_epochs"], ours["spec"]["learning_rate"]) == (2, 1e-4)
    assert (ours["spec"]["batch_size"], ours["spec"]["gradient_accumulation_steps"]) == (1, 6)
    assert theirs["spec"] == ours["spec"]
    other = box.submit(max_steps=4, metadata={"a": "b"}, seed=3)
    found = box.admin.get(f"{JOBS}/{other}").json()
    # Two rows, of which 8 a step are seen four times.
    assert found["hyperparameters"] == {"n_epochs": 16, "batch_size": 8, "learning_rate_multiplier": 0.1}
    assert (found["metadata"], found["seed"], found["queue_position"]) == ({"a": "b"}, 3, 2)


def test_what_is_auto_or_left_out_is_answered_as_a_number(box) -> None:
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    wanted = {"n_epochs": 25, "batch_size": 2, "learning_rate_multiplier": 1.0}

    assert posted(box)["hyperparameters"] == wanted
    assert posted(box, hyperparameters=auto)["hyperparameters"] == wanted
    supervised = {"type": "supervised", "supervised": {"hyperparameters": auto}}
    found = posted(box, method=supervised, validation_file=None, suffix=None, seed=None, integrations=None)
    assert found["method"] == {"type": "supervised", "supervised": {"hyperparameters": wanted}}


def test_fields_of_our_spec_stand_beside_openais(box) -> None:
    found = posted(box, method="full", max_steps=7, batch_size=2, learning_rate=1e-5, warmup_steps=1, gpus=2)

    spec = found["spec"]
    assert (spec["method"], spec["max_steps"], spec["num_epochs"]) == ("full", 7, None)
    assert (spec["gradient_accumulation_steps"], spec["warmup_ratio"]) == (8, None)
    assert found["hyperparameters"]["batch_size"] == 32
    assert found["hyperparameters"]["learning_rate_multiplier"] == 0.5


def test_all_mistakes_are_told_at_once_in_the_names_that_were_written(box, assert_error) -> None:
    answer = post(
        box,
        model="../x",
        training_file="file_nope",
        base_model="org/m",
        learnin_rate=1,
        suffix="x" * 65,
        hyperparameters={"n_epochs": 0, "n_epoch": 1, "learning_rate_multiplier": 10**6},
        lora={"rnak": 1},
        integrations=[{"type": "wandb", "wandb": {"projct": "p"}}],
        packing="yes",
    )

    found = mistakes(answer)
    error = assert_error(answer, 400, "invalid_spec")
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-should-retry"] == "false"
    assert set(found) == {
        "model", "training_file", "base_model", "learnin_rate", "suffix", "packing", "hyperparameters.n_epochs",
        "hyperparameters.n_epoch", "hyperparameters.learning_rate_multiplier", "lora.rnak",
        "integrations[0].wandb.project", "integrations[0].wandb.projct",
    }  # fmt: skip
    assert found["learnin_rate"] == "unknown field; did you mean learning_rate?"
    assert found["suffix"] == "must have 1 to 64 characters, not 65"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": ...}, "model"),
        ({"training_file": ...}, "training_file"),
        ({"hyperparameters": {"n_epochs": 1}, "max_steps": 5}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 4}, "batch_size": 4}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"batch_size": 3}, "gpus": 2}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"batch_size": 10**6}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"n_epochs": 10**18}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": [1]}, "hyperparameters"),
        (
            {"hyperparameters": {"learning_rate_multiplier": 1}, "learning_rate": 1e-4},
            "hyperparameters.learning_rate_multiplier",
        ),
        ({"method": {"type": "dpo", "dpo": {}}}, "method.type"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"method": {"supervised": {}}}, "method.type"),
        ({"method": {"type": "supervised", "supervised": {"x": 1}}}, "method.supervised.x"),
        ({"method": "qlra"}, "method"),
        ({"method": 3}, "method"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": -1}}}},
            "method.supervised.hyperparameters.n_epochs",
        ),
        ({"integrations": [{"type": "mlflow"}]}, "integrations[0].type"),
        ({"integrations": {}}, "integrations"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}], "wandb": {"project": "p"}}, "integrations"),
        ({"suffix": "a\nb"}, "suffix"),
        ({"suffix": 3}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"gpus": "two"}, "gpus"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"model": "job:job_x"}, "model"),
        ({"model": "ft:org/model:admin::job_nope"}, "model"),
        ({"model": 3}, "model"),
    ],
)  # fmt: skip
def test_a_mistake_names_its_field(shared_box, fields: dict[str, Any], param: str) -> None:
    answer = post(shared_box, **fields)

    assert list(mistakes(answer)) == [param]
    assert answer.json()["error"]["param"] == param


def test_hyperparameters_in_both_places_must_agree(box) -> None:
    def method(epochs: int) -> dict[str, Any]:
        return {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs}}}

    assert posted(box, hyperparameters={"n_epochs": 4}, method=method(4))["hyperparameters"]["n_epochs"] == 4
    differing = post(box, hyperparameters={"n_epochs": 4}, method=method(5))
    assert list(mistakes(differing)) == ["hyperparameters.n_epochs"]


def test_what_a_job_made_is_the_model_of_another(box) -> None:
    first = posted(box, suffix="v 1/2", keep_checkpoints=5)
    lease = box.claim()
    (box.server.folder.path / "jobs" / first["id"] / "results").mkdir(parents=True)
    (box.server.folder.path / "jobs" / first["id"] / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    lease.start()
    lease.checkpoint(3)
    lease.finish()
    name = box.admin.get(f"{JOBS}/{first['id']}").json()["fine_tuned_model"]
    assert name == f"ft:org/model:admin:v-1-2:{first['id']}"

    after = posted(box, model=name, suffix="v2")
    from_checkpoint = posted(box, model=f"{name}:ckpt-step-3")

    assert (after["model"], after["spec"]["base_model"]) == (name, f"job:{first['id']}")
    assert from_checkpoint["model"] == f"{name}:ckpt-step-3"
    assert from_checkpoint["spec"]["base_model"] == f"job:{first['id']}@3"
    wrong = post(box, model=name.replace("org/model", "org/other"))
    assert "there is no model 'ft:org/other" in mistakes(wrong)["model"]
    assert "has no checkpoint of step 4" in mistakes(post(box, model=f"{name}:ckpt-step-4"))["model"]
    box.admin.post(f"/jobs/{after['id']}/cancel")
    assert box.claim().job_id == from_checkpoint["id"]


def test_states_are_told_as_statuses(box) -> None:
    def status() -> str:
        return str(box.admin.get(f"{JOBS}/{job_id}").json()["status"])

    job_id = posted(box)["id"]
    assert status() == "queued"
    assert box.admin.post(f"{JOBS}/{job_id}/pause").json()["status"] == "paused"
    assert box.admin.post(f"{JOBS}/{job_id}/resume").json()["status"] == "queued"
    lease = box.claim()
    assert status() == "running"
    lease.start()
    assert box.admin.post(f"{JOBS}/{job_id}/pause").json()["state"] == "running"
    lease.post("heartbeat", started=True)
    assert (box.state(job_id), status()) == ("stopping", "running")
    lease.finish("paused")
    assert status() == "paused"


def test_a_job_whose_files_are_being_checked_says_so(box) -> None:
    job_id = posted(box)["id"]
    box.run(
        box.server.db.write(lambda session: session.exec(update(JobRow).values(checking_files=True)).rowcount)
    )

    assert box.admin.get(f"{JOBS}/{job_id}").json()["status"] == "validating_files"


@pytest.mark.parametrize(
    ("content", "more", "epochs"),
    [
        (b"\xef\xbb\xbf" + b'{"text": "a"}\n \r\n' * 9 + b'{"text": "a"}', {}, 10),
        (b" [" + b'{"text": "a"}, ' * 9 + b'{"text": "a"}]', {}, 3),
        (b'{"text": "a"}\n' * 10, {"bytes": 2**31}, 3),
    ],
    ids=["lines", "array", "large"],
)
def test_rows_that_no_check_has_counted_yet_are_counted_for_auto_where_that_is_cheap(
    box, content: bytes, more: dict[str, Any], epochs: int
) -> None:
    file = box.upload(content)
    set_file(box, file, num_rows=None, status="uploaded", **more)

    assert posted(box, training_file=file)["hyperparameters"]["n_epochs"] == epochs


def test_a_file_of_one_endless_line_is_counted_without_taking_its_size_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "zeros"
    with path.open("wb") as file:
        file.truncate(32 * 1024**2)

    tracemalloc.start()
    try:
        assert count_lines(path) == 1
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024**2
    finally:
        tracemalloc.stop()


def test_a_file_that_can_not_be_trained_on_is_not_read_when_a_job_is_posted(box) -> None:
    answer = box.admin.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("f", b"x")})
    other, wrong = answer.json()["id"], box.upload(b'{"text": "a"}')
    set_file(box, wrong, num_rows=None, status="error", status_details="line 1: no")
    hang_when_read(box, other)
    hang_when_read(box, wrong)

    assert "was uploaded for 'user_data'" in mistakes(post(box, training_file=other))["training_file"]
    assert "can not be trained on" in post(box, training_file=wrong).text


def test_a_call_that_made_its_job_before_reads_no_file_again(box) -> None:
    file = box.upload()
    body, once = {"model": "org/model", "training_file": file}, {"Idempotency-Key": "once"}
    first = box.admin.post(JOBS, json=body, headers=once).json()["id"]
    set_file(box, file, num_rows=None, status="uploaded")
    hang_when_read(box, file)

    assert box.admin.post(JOBS, json=body, headers=once).json()["id"] == first


def test_a_failure_says_what_went_wrong_and_who_can_mend_it(box) -> None:
    lease = box.running()
    lease.finish("failed", reason="bad_data", message="line 3")

    found = box.admin.get(f"{JOBS}/{lease.job_id}").json()

    assert found["error"].pop("remedy").startswith("Mend the named rows")
    assert found["error"] == {"code": "bad_data", "message": "line 3", "param": "training_file"}
    event = box.admin.get(f"{JOBS}/{lease.job_id}/events?limit=1").json()["data"][0]
    assert (event["level"], event["data"]["reason"]) == ("error", "bad_data")


def test_metadata_filters_are_anded_and_null_finds_those_without(box) -> None:
    both = posted(box, metadata={"a": "1", "b": "2"})["id"]
    one = posted(box, metadata={"a": "1"})["id"]
    none = posted(box)["id"]

    def found(query: str) -> list[str]:
        return [job["id"] for job in box.admin.get(f"{JOBS}?{query}").json()["data"]]

    assert found("") == [none, one, both]
    assert found("metadata[a]=1") == [one, both]
    assert found("metadata[a]=1&metadata[b]=2") == [both]
    assert found("metadata=null") == [none]
    assert found("metadata[a]=") == []


@pytest.mark.parametrize("path", [JOBS, "/jobs"])
def test_a_list_goes_on_after_a_job_that_was_deleted(box, path: str) -> None:
    ids = [box.submit() for _ in range(4)]
    first = box.admin.get(f"{path}?limit=2").json()
    assert [job["id"] for job in first["data"]] == ids[:1:-1]
    assert box.admin.delete(f"/jobs/{ids[2]}").status_code == 204
    box.submit()

    second = box.admin.get(f"{path}?limit=2&after={ids[2]}").json()

    assert [job["id"] for job in second["data"]] == ids[1::-1]
    assert (first["has_more"], second["has_more"]) == (True, False)
    assert box.admin.get(f"{path}?after=job_never").status_code == 404


def test_cursors_of_events_and_checkpoints_are_checked(shared_box, assert_error) -> None:
    job_id = shared_box.submit()
    for path, after in (("events", "ftevent-x"), ("events", "7"), ("checkpoints", "ftckpt-job_other-3")):
        answer = shared_box.admin.get(f"{JOBS}/{job_id}/{path}", params={"after": after})
        assert_error(answer, 404, "unknown_cursor")
    far = shared_box.admin.get(f"{JOBS}/{job_id}/events", params={"after": "ftevent-" + "9" * 19}).json()
    assert [event["data"]["type"] for event in far["data"]] == ["queued"]


def test_whatever_is_wrong_under_v1_is_said_as_openais_clients_know_it(make_box, assert_error) -> None:
    box = make_box(max_body_bytes=2000)

    def check(answer, status: int, code: str, kind: str, retry: str = "false") -> None:
        error = assert_error(answer, status, code)
        assert error["type"] == kind
        assert answer.headers["x-should-retry"] == retry

    kind = "invalid_request_error"
    check(box.admin.post(JOBS, content=b"{"), 400, "invalid_json", kind)
    check(box.admin.post(JOBS, content=b"[]"), 400, "invalid_spec", kind)
    check(box.admin.get(f"{JOBS}?limit=x"), 400, "invalid_request", kind)
    check(box.admin.get("/v1/nothing"), 404, "unknown_route", kind)
    check(box.admin.get("/v1/models/x%00"), 404, "unknown_route", kind)
    check(box.admin.post("/v1/models"), 405, "method_not_allowed", kind)
    check(box.admin.post(JOBS, content=b" " * 3000), 413, "too_large", kind)
    coded = {"content-encoding": "gzip"}
    check(box.admin.post(JOBS, content=b"{}", headers=coded), 415, "unsupported_encoding", kind)
    check(box.client(None).get(JOBS), 401, "missing_key", "authentication_error")
    check(box.worker.get(JOBS), 403, "not_for_workers", "permission_error")
    job_id = box.submit()
    box.admin.post(f"{JOBS}/{job_id}/cancel")
    check(box.admin.post(f"{JOBS}/{job_id}/pause"), 409, "job_finished", "conflict")
    box.server.db._closed = True  # as while it stops
    check(box.admin.post(f"{JOBS}/{job_id}/cancel"), 503, "stopping", "server_error", "true")
    box.server.db._closed = False
    assert box.admin.get("/jobs?limit=x").status_code == 422
    assert "x-should-retry" not in box.admin.get("/jobs/nope").headers
