"""A4, A12, A18, A19, A21, A24: what workers may do, and where secrets are not, with the real server, worker and trainer process."""

import hashlib
import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.worker.conftest import Box as WorkerBox

from sftd.protocol import Hello
from sftd_server.workers.claims import _token
from sftd_worker.process import secrets_of, trainer_environment
from sftd_worker.settings import WorkerSettings

SECRETS = {
    "HF_TOKEN": "hf_secret-of-the-tests-0123456789",
    "HUGGING_FACE_HUB_TOKEN": "hf_older-secret-of-the-tests",
    "WANDB_API_KEY": "wandb-secret-of-the-tests-0123456789",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-of-the-tests-0123456789",
    "SFTD_ADMIN_KEY": "",
    "MY_PASSWORD": "password-of-the-tests-0123456789",
    "https_proxy": "http://user:proxy-password-of-the-tests@127.0.0.1:9",
}
DANGEROUS = {
    "LD_PRELOAD": "", "LD_AUDIT": "", "PYTHONPATH": "/tmp/evil", "PYTHONSTARTUP": "/tmp/evil.py", "PYTHONINSPECT": "",
    "BASH_ENV": "/tmp/evil", "ENV": "/tmp/evil", "SFTD_DATABASE_URL": "postgresql://user:db-password@h/d",
    "AWS_ACCESS_KEY_ID": "AKIA", "DATABASE_URL": "postgresql://x", "SSH_AUTH_SOCK": "/tmp/x", "KUBECONFIG": "/tmp/x",
}  # fmt: skip


@pytest.fixture
def worker_box(tmp_path: Path) -> Iterator[WorkerBox]:
    """A server and workers in a folder whose name a shell would choke on."""
    folder = tmp_path / "x; touch pwned; $(touch pwned) `touch pwned` 'q\" &\n%s"
    folder.mkdir()
    box = WorkerBox(folder)
    yield box
    for process in box.processes:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- A4, A12, A24


@pytest.mark.parametrize("warm", [False, True])
def test_a4_a12_a24_no_secret_gets_anywhere_and_odd_paths_do_no_harm(
    worker_box: WorkerBox, warm: bool
) -> None:
    box = worker_box
    spoken = " ".join(value.rpartition("@")[0].rpartition(":")[2] or value for value in SECRETS.values())
    admin_key = (box.data / "admin.key").read_text().strip()
    worker_key = (box.data / "worker.key").read_text().strip()
    box.start_worker("w1", env={**SECRETS, **DANGEROUS}, warm=warm)
    job_id = box.post(steps=40, step_seconds=0.1, log=f"I say {spoken}", checkpoint_every=20)
    box.until(lambda: box.steps(job_id))
    pid = box.trainer_pids(job_id)[0]
    seen = Path(f"/proc/{pid}/environ").read_bytes()
    box.until(lambda: box.state(job_id) == "succeeded", 60)
    environment = json.loads((box.job_folder(job_id) / "environment.json").read_text())

    # What the trainer had: the hub's token, which it may need, and nothing else.
    assert environment["HF_TOKEN"] == SECRETS["HF_TOKEN"]
    assert {name for name in environment if name.startswith("SFTD_")} == set()
    for name in (*DANGEROUS, "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        assert name not in environment, name
        assert f"{name}=".encode() not in b"\0" + seen, name
    assert (SECRETS["HF_TOKEN"].encode() in seen) is not warm  # forked off a parent that never had it

    # Where nothing may be: every file, every answer, every log.
    (box.job_folder(job_id) / "environment.json").unlink()
    (box.job_folder(job_id) / "logs" / "trainer_output.txt").unlink(
        missing_ok=True
    )  # what it printed, unshipped
    token = lease_token(box.data, job_id)
    secret = lease_secret(box.data)
    hidden = [admin_key, worker_key, token, secret]
    told = [
        *(value for value in SECRETS.values() if value and "@" not in value),
        "proxy-password-of-the-tests",
    ]
    own = {"admin.key", "worker.key", "script.json"}  # the last is the test's own
    spool = box.job_folder(job_id) / "logs" / "events.jsonl"  # the trainer's own words, in its own folder
    for path in (path for path in box.folder.rglob("*") if path.is_file() and path.name not in own):
        content = path.read_bytes()
        for hidden_one in [*hidden, *([] if path == spool else told)]:
            kept = hidden_one == secret and path.name.startswith(
                "sftd.db"
            )  # where it lives: see docs/security.md
            assert kept or hidden_one.encode() not in content, (path, hidden_one)
    for path in (f"/jobs/{job_id}", "/jobs", f"/jobs/{job_id}/logs", f"/jobs/{job_id}/events", "/workers", "/keys", "/metrics",
                 "/openapi.json", f"/jobs/{job_id}/attempts"):  # fmt: skip
        try:
            text = box.client._transport.request("GET", path).content.decode()
        except Exception as error:  # a route that is not there says so, and nothing else
            text = str(error)
        for hidden_one in hidden + told:
            assert hidden_one not in text, (path, hidden_one)
    assert "[secret]" in "".join(line.text for line in box.client.jobs.logs(job_id))
    # A12: nothing in the folder's name was run.
    assert [
        path
        for root in (box.folder, Path.cwd())
        for path in root.glob("**/pwned")
        if "tests" not in path.parts
    ] == []


def lease_secret(data: Path) -> str:
    with sqlite3.connect(data / "sftd.db") as db:
        return str(db.execute("SELECT value FROM fact WHERE name = 'lease_secret'").fetchone()[0])


def lease_token(data: Path, job_id: str) -> str:
    """The token of the job's first attempt, as the server derives it."""
    with sqlite3.connect(data / "sftd.db") as db:
        query = (
            "SELECT attempt.request_id, attempt.token_sha256 FROM attempt JOIN job ON job.number = attempt.job"
            " WHERE job.id = ?"
        )
        request_id, digest = db.execute(query, (job_id,)).fetchone()
    token = _token(lease_secret(data), job_id, 1, request_id)
    assert hashlib.sha256(token.encode()).hexdigest() == digest
    return token


def test_a4_no_key_in_an_address_is_taken_or_told(shared_box, caplog: pytest.LogCaptureFixture) -> None:
    key = "sftd-admin-key-of-the-tests"
    for query in (f"key={key}", f"token={key}", f"access_token={key}", f"api_key={key}"):
        answer = shared_box.client(None).get(f"/jobs?{query}")
        assert answer.status_code == 401
        assert key not in answer.text
    error = shared_box.admin.get(f"/{key}")
    assert error.status_code == 404
    assert key not in caplog.text


def test_a4_errors_repeat_no_header(shared_box) -> None:
    for name in ("authorization", "x-lease-token", "cookie"):
        for path in ("/jobs", "/worker/jobs/job_x/heartbeat", "/docs"):
            answer = shared_box.client(None).post(path, headers={name: "Bearer s3cret-s3cret"}, json={"a": 1})
            assert "s3cret" not in answer.text + str(answer.headers)


def test_a12_the_trainers_environment_comes_from_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {**os.environ, **DANGEROUS, **SECRETS, "HF_ENDPOINT": "http://hub.team.example", "FOO": "x"}

    made = trainer_environment(given, cuda_visible_devices="", offline=False)

    assert not set(DANGEROUS) & set(made)
    assert "FOO" not in made
    assert not [name for name in made if name.startswith(("SFTD_", "AWS_"))]
    assert not set(SECRETS) - {"https_proxy"} & set(made)
    # HF_ENDPOINT is the box's owner's to set, in the worker's environment; a job has no way to it (see the test of specs).
    assert made["HF_ENDPOINT"] == "http://hub.team.example"
    with_hub = trainer_environment(given, cuda_visible_devices="", offline=False, secrets=("HF_",))
    assert {name for name in SECRETS if name in with_hub} == {"HF_TOKEN", "https_proxy"}


def test_a24_secrets_are_known_by_their_names_and_in_a_proxys_address() -> None:
    found = secrets_of(SECRETS)

    assert {
        SECRETS["HF_TOKEN"],
        SECRETS["WANDB_API_KEY"],
        SECRETS["MY_PASSWORD"],
        "proxy-password-of-the-tests",
    } <= set(found)
    assert found == sorted(found, key=len, reverse=True)


def test_a24_files_of_secrets_are_for_their_owner_only(worker_box: WorkerBox) -> None:
    for name in ("admin.key", "worker.key", "installation.id", "sftd.db"):
        assert (worker_box.data / name).stat().st_mode & 0o077 == 0, name
    for path in (worker_box.data, *(path for path in worker_box.data.rglob("*") if path.is_dir())):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a24_a_written_out_setting_shows_no_key() -> None:
    settings = WorkerSettings(data=Path("/tmp"), key="worker-key-of-the-tests")

    assert "worker-key-of-the-tests" not in repr(settings) + str(settings) + settings.model_dump_json()


def test_a24_a_spec_has_no_place_for_a_secret(shared_box, assert_error) -> None:
    for fields in (
        {"wandb": {"project": "p", "api_key": "x"}},
        {"hf_token": "x"},
        {"secrets": {}},
        {"token": "x"},
    ):
        assert_error(shared_box.admin.post("/jobs", json=shared_box.spec(**fields)), 422, "invalid_spec")


# ---------------------------------------------------------------- A18


def test_a18_replays(box, assert_error) -> None:
    old = box.running()
    assert old.metrics(0, (1, {"loss": 1.0})).status_code == 200
    assert old.checkpoint(10).status_code == 200
    assert_error(old.checkpoint(5), 409, "checkpoint_backwards")
    assert_error(old.checkpoint(10, manifest_sha256="cd" * 32), 409, "checkpoint_backwards")

    # The same number with another content is no repetition; of an older number nobody knows. Nothing of either is kept.
    assert_error(old.metrics(0, (1, {"loss": 666.0})), 409, "batch_differs")
    again = old.metrics(0, (1, {"loss": 1.0}))
    assert (again.status_code, again.json()) == (200, {"next_seq": 1})
    assert old.metrics(1, (2, {"loss": 1.0})).status_code == 200
    again = old.metrics(0, (1, {"loss": 666.0}))
    assert (again.status_code, again.json()) == (200, {"next_seq": 2})
    assert_error(old.metrics(5, (6, {"loss": 1.0})), 416, "sequence_gap")
    assert_error(old.metrics(1, (2, {"loss": 666.0}), (3, {"loss": 666.0})), 416, "sequence_gap")

    box.expire()
    new = box.claim("w2")
    new.start()
    assert new.attempt == 2
    for answer in (
        old.metrics(2, (3, {"loss": 666.0})), old.post("logs", seq=0, lines=["stale"]), old.checkpoint(11), old.finish(),
        old.post("heartbeat", started=True), old.post("release", message="x"), old.event(0, "notice"),
    ):  # fmt: skip
        assert_error(answer, 409, "stale_lease")
    forged = box.worker.post(
        f"/worker/jobs/{new.job_id}/finish",
        json={"attempt": 2, "state": "succeeded"},
        headers={"X-Lease-Token": old.token},
    )
    assert_error(forged, 409, "stale_lease")

    assert new.finish("succeeded").status_code == 200
    assert new.finish("succeeded").status_code == 200  # the same word again
    assert new.finish("failed", reason="trainer_error").status_code == 409
    assert new.metrics(0, (11, {"loss": 1.0})).status_code == 409
    assert box.state(new.job_id) == "succeeded"
    values = [point["loss"] for point in box.admin.get(f"/jobs/{new.job_id}/metrics").json()["data"]]
    assert 666.0 not in values
    assert box.events(new.job_id).count("succeeded") == 1


def test_a18_a_claim_sent_again_later_brings_no_second_lease(box, assert_error) -> None:
    box.submit()
    first = box.try_claim(request_id="r-once")
    assert box.try_claim(request_id="r-once").json()["token"] == first.json()["token"]
    token, job_id = first.json()["token"], first.json()["job_id"]
    body = {"attempt": 1, "started": True}
    box.worker.post(f"/worker/jobs/{job_id}/heartbeat", json=body, headers={"X-Lease-Token": token})

    assert_error(box.try_claim(request_id="r-once"), 409, "claim_over")
    other = box.try_claim(
        "w2", request_id="r-once"
    )  # another worker's request of the same name is another request
    assert other.status_code == 204


# ---------------------------------------------------------------- A19


def test_a19_each_claim_is_on_record_with_its_worker_and_key(box) -> None:
    box.submit()
    assert box.register().status_code == 200
    client = box.key("gpu-box-2", role="worker")
    who = {"worker_id": "w1", "boot_id": "b1", "request_id": "r", "gpus": 1, "wait_seconds": 0}
    found = client.post("/worker/claim", json=who).json()

    events = box.admin.get(f"/jobs/{found['job_id']}/events").json()["data"]
    event = next(e for e in events if e["type"] == "claimed")
    assert event["data"] == {"worker_id": "w1", "key": "gpu-box-2"}
    assert event["attempt"] == found["attempt"]


def test_a19_a_worker_of_its_own_key_is_shut_out_by_deleting_it(box, assert_error) -> None:
    made = box.admin.post("/keys", json={"name": "gpu-box-2", "role": "worker"}).json()
    client = box.client(made["secret"])
    claim = {"worker_id": "w9", "boot_id": "b", "request_id": "r", "gpus": 1, "wait_seconds": 0}
    hello = {"worker_id": "w9", "boot_id": "b", "gpus": 1, "device": "cuda"}
    assert client.post("/worker/register", json=hello).status_code == 200
    assert client.post("/worker/claim", json=claim).status_code == 204

    assert box.admin.delete(f"/keys/{made['id']}").status_code == 204

    assert_error(client.post("/worker/claim", json=claim), 401, "invalid_key")
    assert box.try_claim().status_code == 204  # the others work on


def test_a19_a_workers_key_reads_and_changes_nothing_of_users(box, every_route) -> None:
    job_id = box.submit()
    for method, path in every_route(box):
        if not path.startswith("/worker/") and path != "/healthz":
            there = path.replace("{job_id}", job_id)
            assert box.worker.request(method, there).status_code == 403, (method, path)


@pytest.mark.parametrize(
    "hello",
    [{"labels": {f"l{i}": "x" for i in range(65)}}, {"labels": {"x" * 513: "y"}}, {"labels": {"x": "y" * 513}},
     {"versions": {f"v{i}": "x" for i in range(65)}}, {"gpu_names": ["x" * 513]}, {"gpu_names": ["x"] * 1025}, {"gpus": 10**6},
     {"gpus": 0}, {"worker_id": "../x"}, {"worker_id": "x" * 129}, {"worker_id": "a\n"}, {"boot_id": ""}, {"extra": 1}],
    ids=lambda hello: "-".join(hello),
)  # fmt: skip
def test_a19_what_a_worker_says_of_itself_is_bounded(shared_box, assert_error, hello: dict[str, Any]) -> None:
    whole = {"worker_id": "w1", "boot_id": "b1", "gpus": 1, "device": "cpu", **hello}

    assert_error(shared_box.worker.post("/worker/register", json=whole), 422, "invalid_request")
    assert Hello(worker_id="w1", boot_id="b1", gpus=1, device="cpu").labels == {}


def test_a19_a_failure_is_told_within_bounds(shared_box) -> None:
    lease = shared_box.running()

    assert lease.finish("failed", log_tail=["x" * 100_000]).status_code == 422
    assert lease.finish("failed", log_tail=["x"] * 201).status_code == 422
    assert lease.finish("failed", message="x" * 100_000).status_code == 422
    assert lease.finish("failed", message="x", log_tail=["x"]).status_code == 200


# ---------------------------------------------------------------- A21


def test_a21_a_file_that_was_swapped_after_the_post_is_not_trained_on(worker_box: WorkerBox) -> None:
    box = worker_box
    job_id = box.post(steps=1)
    blob = next(path for path in (box.data / "blobs" / "sha256").rglob("*") if path.is_file())
    content = blob.read_bytes()
    blob.write_bytes(content.replace(b'"b"', b'"X"'))  # as long as it was
    assert len(blob.read_bytes()) == len(content)

    box.start_worker("w1")

    box.until(lambda: box.state(job_id) == "failed")
    failure = box.client.jobs.retrieve(job_id).failure
    assert failure
    assert "is not what was uploaded" in failure.message
    assert box.trainer_pids(job_id) == []


def test_a21_a_swapped_link_or_folder_leads_nowhere(worker_box: WorkerBox) -> None:
    box = worker_box
    job_id = box.post(steps=1)
    blob = next(path for path in (box.data / "blobs" / "sha256").rglob("*") if path.is_file())
    outside = box.folder / "outside"
    shutil.copy(blob, outside)
    blob.unlink()
    blob.symlink_to(outside)  # the very content, but not the place

    box.start_worker("w1")

    box.until(lambda: box.state(job_id) == "failed")
    assert box.trainer_pids(job_id) == []


def test_a21_a_swapped_checkpoint_is_struck_and_an_older_one_taken(worker_box: WorkerBox) -> None:
    box = worker_box
    worker = box.start_worker("w1")
    job_id = box.post(steps=60, step_seconds=0.1, checkpoint_every=10)
    box.until(lambda: len(list(box.client.jobs.checkpoints(job_id))) >= 2, 60)
    worker.kill()
    worker.wait()
    checkpoints = sorted(
        (box.job_folder(job_id) / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])
    )
    recorded = {c.step for c in box.client.jobs.checkpoints(job_id)}
    newest = next(path for path in reversed(checkpoints) if int(path.name.split("-")[1]) in recorded)
    # Swapped whole: weights, and a manifest that fits them.
    content = (newest / "adapter.safetensors").read_bytes()[:-1] + b"!"
    (newest / "adapter.safetensors").write_bytes(content)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["adapter.safetensors"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (newest / "manifest.json").write_text(json.dumps(manifest))

    box.start_worker("w1")

    box.until(lambda: box.state(job_id) == "succeeded", 90)
    events = [event.type for event in box.client.jobs.events(job_id)]
    assert "checkpoint_corrupt" in events
    assert box.steps(job_id) == list(range(1, 61))


def test_a21_a_swapped_result_is_not_begun_from(worker_box: WorkerBox) -> None:
    box = worker_box
    box.start_worker("w1")
    first = box.post(steps=1)
    box.until(lambda: box.state(first) == "succeeded")
    result = box.job_folder(first) / "results" / "model.txt"
    result.write_bytes(result.read_bytes()[:-1] + b"!")

    training_file = box.client.jobs.retrieve(first).spec.training_file
    second = box.client.jobs.create(base_model=f"job:{first}", training_file=training_file).id

    box.until(lambda: box.state(second) == "failed")
    failure = box.client.jobs.retrieve(second).failure
    assert failure
    assert f"is not what job {first} made" in failure.message
    assert box.trainer_pids(second) == []


def test_a21_a_model_that_was_swapped_between_attempts_is_not_gone_on_with(worker_box: WorkerBox) -> None:
    box = worker_box
    model = box.data / "models" / "org" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    worker = box.start_worker("w1")
    job_id = box.post(steps=1000, step_seconds=0.1, checkpoint_every=5)
    box.until(lambda: len(list(box.client.jobs.checkpoints(job_id))) >= 1)
    num_trainers = len(box.trainer_pids(job_id))
    (model / "model.safetensors").write_bytes(b"Weights")
    worker.kill()
    worker.wait()

    box.start_worker("w1")

    box.until(lambda: box.state(job_id) == "failed")
    failure = box.client.jobs.retrieve(job_id).failure
    assert failure
    assert "is not the model that this job began with" in failure.message
    assert len(box.trainer_pids(job_id)) == num_trainers
    (model / "model.safetensors").write_bytes(b"weights")  # put back: its checkpoints can be gone on from
    again = box.client.jobs.retry(job_id).id
    box.until(lambda: box.steps(again)[:1] > [1])
    box.client.jobs.cancel(again)


# ---------------------------------------------------------------- A25


def test_a25_there_are_no_webhooks_yet(shared_box, repository: Path) -> None:
    """When there are, they need a signature with a time in it, bounded retries, and the rules of A13."""
    assert not [path for path in shared_box.app.openapi()["paths"] if "hook" in path]
    assert "There are no webhooks" in (repository / "docs" / "security.md").read_text()
    assert sys.version_info >= (3, 11)
