"""The whole way of a job, through real processes: upload, submit, follow, cancel another, download, load with peft."""

import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from tests.e2e.conftest import ADMIN_KEY, Q_BASICS, ROOT, Service
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftd.errors import JobFailed


def curl(service: Service, *arguments: str) -> Any:
    done = subprocess.run(
        ["curl", "-sS", "-H", f"Authorization: Bearer {ADMIN_KEY}", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def finished(service: Service) -> dict[str, Any]:
    """A job posted by curl, followed by server-sent events to its end."""
    file = curl(service, "-F", f"file=@{Q_BASICS}", f"{service.url}/files")
    assert file["status"] == "processed"
    assert file["num_rows"] == 256
    spec = {**service.spec(), "training_file": file["id"], "name": "whole way", "metadata": {"team": "q"}}
    job = curl(service, "-H", "Content-Type: application/json", "-d", json.dumps(spec), f"{service.url}/jobs")
    assert job["state"] == "queued"
    events = read_stream(service, f"/jobs/{job['id']}/events")
    done = curl(service, f"{service.url}/jobs/{job['id']}")
    done["streamed"] = events
    assert done["state"] == "succeeded", done["failure"]
    return done


def read_stream(service: Service, path: str, **headers: str) -> list[dict[str, Any]]:
    """Server-sent events until the server ends the stream: [{id, event, data}]."""
    found: list[dict[str, Any]] = []
    block: dict[str, Any] = {}
    accept = {"Accept": "text/event-stream", "Authorization": f"Bearer {ADMIN_KEY}", **headers}
    with httpx.stream("GET", service.url + path, headers=accept, timeout=120) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if not line:
                if "data" in block:
                    found.append(block)
                block = {}
            elif not line.startswith(":"):
                name, _, value = line.partition(": ")
                block[name] = json.loads(value) if name == "data" else value
    return found


def test_events_tell_the_story_in_order(finished: dict[str, Any]) -> None:
    kinds = [event["event"] for event in finished["streamed"]]

    assert kinds[:3] == ["queued", "claimed", "running"]
    assert kinds[-1] == "end"
    assert kinds[-2] == "succeeded"
    assert kinds.count("checkpoint") == 2
    assert kinds.count("evaluation") == 3


def test_a_stream_resumes_after_the_last_event_that_was_seen(
    finished: dict[str, Any], service: Service
) -> None:
    seen = finished["streamed"][2]["id"]

    rest = read_stream(service, f"/jobs/{finished['id']}/events", **{"Last-Event-ID": seen})

    assert [e["data"] for e in rest[:-1]] == [e["data"] for e in finished["streamed"][3:-1]]


def test_the_job_shows_its_numbers(finished: dict[str, Any]) -> None:
    assert (finished["step"], finished["total_steps"], finished["progress"]) == (6, 6, 1.0)
    assert finished["loss"] > 0
    assert finished["tokens_seen"] > 1000
    assert finished["tokens_per_second"] > 0
    assert finished["eval_loss"] > 0
    assert finished["queue_position"] is None
    assert finished["attempt"] == 1


def test_metrics_come_step_by_step_with_cursors(finished: dict[str, Any], service: Service) -> None:
    path = f"{service.url}/jobs/{finished['id']}/metrics"

    whole = curl(service, path)
    first = curl(service, f"{path}?limit=3")
    rest = curl(service, f"{path}?after={first['next_after']}")

    assert [point["step"] for point in whole["data"]] == [0, 1, 2, 3, 4, 5, 6]
    assert whole["data"][0]["eval_loss"] > 0
    assert set(whole["data"][1]) >= {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
    }
    assert first["has_more"] is True
    assert first["data"] + rest["data"] == whole["data"]


def test_logs_have_cursors_and_stream(finished: dict[str, Any], service: Service) -> None:
    path = f"/jobs/{finished['id']}/logs"

    lines = curl(service, f"{service.url}{path}?limit=2")
    more = curl(service, f"{service.url}{path}?after={lines['next_after']}&limit=1000")
    streamed = read_stream(service, path)

    texts = [line["text"] for line in lines["data"] + more["data"]]
    assert [e["data"]["text"] for e in streamed[:-1]] == texts
    assert any("first row, ⟦what is learned⟧" in text for text in texts)
    assert texts == [
        line.split(" ", 2)[2]
        for line in (Path(finished["folder"]) / "logs" / "training_log.txt").read_text().splitlines()
    ]


def test_evaluations_begin_before_the_first_step(finished: dict[str, Any], service: Service) -> None:
    found = curl(service, f"{service.url}/jobs/{finished['id']}/evaluations")["data"]

    assert [e["step"] for e in found] == [0, 3, 6]
    assert found[-1]["eval_loss"] < found[0]["eval_loss"]


def test_checkpoint_files_download_one_by_one(finished: dict[str, Any], service: Service) -> None:
    checkpoints = curl(service, f"{service.url}/jobs/{finished['id']}/checkpoints")["data"]
    assert sorted(c["step"] for c in checkpoints) == [3, 6]
    for name, file in checkpoints[0]["files"].items():
        answer = service.call(
            "GET", f"/jobs/{finished['id']}/checkpoints/{checkpoints[0]['step']}/files/{name}"
        )
        assert answer.status_code == 200
        assert len(answer.content) == file["bytes"]

    missing = service.call("GET", f"/jobs/{finished['id']}/checkpoints/3/files/..%2F..%2Fjob.json")
    assert missing.status_code == 404


def test_the_archive_loads_with_peft(finished: dict[str, Any], service: Service, tmp_path: Path) -> None:
    archive = service.call("GET", f"/jobs/{finished['id']}/archive")
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / finished["id"]

    base = AutoModelForCausalLM.from_pretrained(service.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "til 3"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        before = base(**chat).logits.clone()
        after = PeftModel.from_pretrained(base, folder).eval()(**chat).logits

    assert not torch.allclose(before, after, atol=1e-3)


def test_a_running_job_is_cancelled_within_five_seconds_and_keeps_its_checkpoint(service: Service) -> None:
    client = service.client
    job = client.jobs.create(spec=service.spec(max_steps=1_000_000, save_steps=20, eval_steps=10**6))
    service.wait(lambda: list(client.jobs.checkpoints(job.id)), "a checkpoint")

    started = time.monotonic()
    curl(service, "-X", "POST", f"{service.url}/jobs/{job.id}/cancel")
    service.wait(lambda: client.jobs.retrieve(job.id).state == "cancelled", "the end")

    assert time.monotonic() - started < 5
    kept = next(iter(client.jobs.checkpoints(job.id)))
    assert (
        service.call(
            "GET", f"/jobs/{job.id}/checkpoints/{kept.step}/files/adapter_model.safetensors"
        ).status_code
        == 200
    )
    again = service.call("POST", f"/jobs/{job.id}/cancel")
    assert again.status_code in (200, 409)


def test_a_queued_job_waits_its_turn_and_can_be_cancelled_there(service: Service) -> None:
    client = service.client
    first = client.jobs.create(spec=service.spec(max_steps=1_000_000, save_steps=10**6, eval_steps=10**6))
    service.wait(lambda: client.jobs.retrieve(first.id).state == "running", "the first to run")
    second = client.jobs.create(spec=service.spec())
    third = client.jobs.create(spec=service.spec(priority=5))

    assert client.jobs.retrieve(third.id).queue_position == 1
    assert client.jobs.retrieve(second.id).queue_position == 2
    for job in (second, third, first):
        client.jobs.cancel(job.id)
    service.wait(lambda: client.jobs.retrieve(first.id).state == "cancelled", "the first to end")
    assert client.jobs.retrieve(second.id).state == "cancelled"


def test_a_paused_job_gives_the_same_result_as_one_that_was_not(service: Service) -> None:
    client = service.client
    spec = service.spec(max_steps=120, save_steps=10**6, eval_steps=40, lora={"rank": 4, "dropout": 0.2})
    whole = client.jobs.create(spec=spec)
    client.jobs.wait(whole.id, timeout_seconds=180)
    job = client.jobs.create(spec=spec)
    service.wait(lambda: client.jobs.retrieve(job.id).step >= 20, "some steps")
    client.jobs.pause(job.id)
    service.wait(lambda: client.jobs.retrieve(job.id).state == "paused", "the pause")
    paused_at = client.jobs.retrieve(job.id).step
    client.jobs.resume(job.id)
    done = client.jobs.wait(job.id, timeout_seconds=180)

    assert 20 <= paused_at < 120
    assert done.attempt == 2
    one, two = [[p.model_dump() for p in client.jobs.metrics(j.id)] for j in (whole, job)]
    for left, right in zip(one, two, strict=True):
        for name in ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "tokens_seen"):
            assert left.get(name) == right.get(name), (left["step"], name)


def test_a_trainer_that_is_killed_fails_its_job_with_reason_and_log_and_the_next_job_runs(
    service: Service,
) -> None:
    client = service.client
    job = client.jobs.create(spec=service.spec(max_steps=1_000_000, eval_steps=10**6))
    following = client.jobs.create(spec=service.spec(max_steps=2))
    service.wait(lambda: client.jobs.retrieve(job.id).step >= 2, "some steps")

    os.kill(trainer_pid(job.id), signal.SIGKILL)

    with pytest.raises(JobFailed):
        client.jobs.wait(job.id, timeout_seconds=60)
    failure = client.jobs.retrieve(job.id).failure
    assert failure is not None
    assert failure.reason == "trainer_died"
    assert "signal 9" in failure.message
    assert any("loss" in line for line in failure.log_tail)
    assert client.jobs.wait(following.id, timeout_seconds=120).state == "succeeded"


def trainer_pid(job_id: str) -> int:
    return find_process(
        lambda pid, words: "sftd_worker.trainer" in words and any(w.endswith(job_id) for w in words)
    )


def worker_pid(service: Service) -> int:
    """The worker that this `sftd up` started."""
    assert service.process is not None
    parent = f"PPid:\t{service.process.pid}\n"
    return find_process(
        lambda pid, words: "sftd_worker.agent" in words and parent in Path(f"/proc/{pid}/status").read_text()
    )


def find_process(wanted: Callable[[str, list[str]], bool]) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted(entry.name, (entry / "cmdline").read_text().split("\0")):
                    return int(entry.name)
            except OSError:
                continue
    raise AssertionError("no such process runs")


def test_data_that_a_template_cannot_show_fails_before_the_first_step(
    service: Service, tmp_path: Path
) -> None:
    client = service.client
    job = client.jobs.create(spec=service.spec(max_seq_length=16))

    with pytest.raises(JobFailed):
        client.jobs.wait(job.id, timeout_seconds=60)

    failed = client.jobs.retrieve(job.id)
    assert failed.failure is not None
    assert failed.failure.reason == "bad_data"
    assert "q_basics.jsonl: line 1, row: has" in failed.failure.message
    assert failed.step == 0


def test_a_job_can_start_from_another_jobs_result(finished: dict[str, Any], service: Service) -> None:
    client = service.client

    further = client.jobs.create(spec=service.spec(base_model=f"job:{finished['id']}", max_steps=2))
    client.jobs.wait(further.id, timeout_seconds=120)

    first = next(point for point in client.jobs.metrics(further.id) if point.step == 0)
    assert first.model_dump()["eval_loss"] == pytest.approx(finished["eval_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "change", [{"method": "full", "learning_rate": 1e-3}, {"method": "qlora"}, {"gpus": 1}]
)
def test_every_method_runs_through_the_service(change: dict[str, Any], service: Service) -> None:
    client = service.client
    job = client.jobs.create(spec=service.spec(max_steps=2, **change))

    assert client.jobs.wait(job.id, timeout_seconds=120).state == "succeeded"


def test_no_key_stands_in_any_log(finished: dict[str, Any], service: Service) -> None:
    worker_key = (service.data / "worker.key").read_text().strip()
    texts = [
        path.read_text(errors="replace")
        for path in service.data.rglob("*")
        if path.suffix in (".log", ".txt", ".jsonl", ".json", ".yaml")
    ]

    assert not any(ADMIN_KEY in text or worker_key in text for text in texts)


def test_ctrl_c_stops_cleanly_and_the_job_goes_on_at_the_next_start(
    new_service: Callable[..., Service],
) -> None:
    service = new_service()
    client = service.client
    job = client.jobs.create(spec=service.spec(max_steps=150, save_steps=10**6, eval_steps=50))
    service.wait(lambda: client.jobs.retrieve(job.id).step >= 10, "some steps")

    assert service.stop() == 0
    assert "Traceback" not in service.log()
    service.start()
    done = client.jobs.wait(job.id, timeout_seconds=180)

    assert done.attempt == 2
    assert [p.step for p in client.jobs.metrics(job.id)] == list(range(151))


def test_a_worker_killed_with_its_trainer_loses_no_job(new_service: Callable[..., Service]) -> None:
    service = new_service(SFTD_LEASE_SECONDS="4")
    client = service.client
    job = client.jobs.create(spec=service.spec(max_steps=150, save_steps=20, eval_steps=50))
    service.wait(lambda: list(client.jobs.checkpoints(job.id)), "a checkpoint")

    os.kill(worker_pid(service), signal.SIGKILL)
    done = client.jobs.wait(job.id, timeout_seconds=180)

    assert done.attempt >= 2
    assert [p.step for p in client.jobs.metrics(job.id)] == list(range(151))
    kinds = [event.type for event in client.jobs.events(job.id)]
    assert kinds.count("succeeded") == 1


def test_an_answer_lost_to_a_restarted_server_does_not_lose_the_job(
    new_service: Callable[..., Service],
) -> None:
    """The server alone is killed and started again while a job runs: training never stops, all metrics arrive."""
    service = new_service(start=False)
    import sys

    server = [
        sys.executable,
        "-m",
        "sftd_server.app",
        "--data",
        str(service.data),
        "--port",
        str(service.port),
    ]
    worker = [sys.executable, "-m", "sftd_worker.agent", "--server", service.url, "--data", str(service.data)]
    log = (service.data / "up.log").open("a")

    def spawn(command: list[str]) -> "subprocess.Popen[str]":
        return subprocess.Popen(command, env=service.environment, stdout=log, stderr=log, text=True, cwd=ROOT)

    service.process = spawn(server)
    service.wait(service.answers, "the server")
    agent = spawn(worker)
    try:
        client = service.client
        job = client.jobs.create(spec=service.spec(max_steps=200, save_steps=50, eval_steps=50))
        service.wait(lambda: client.jobs.retrieve(job.id).step >= 20, "some steps")

        service.process.kill()
        service.process.wait()
        time.sleep(2)  # an outage that the trainer trains through
        service.process = spawn(server)
        service.wait(service.answers, "the server again")

        done = client.jobs.wait(job.id, timeout_seconds=180)
        assert done.attempt == 1
        assert [p.step for p in client.jobs.metrics(job.id)] == list(range(201))
    finally:
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(60) == 0
        service.stop(signal.SIGTERM)
