"""A job of two devices: the worker starts its trainer under torchrun, and pause and cancel reach every rank."""

import time
from collections.abc import Callable

import pytest
from tests.e2e.conftest import Service


@pytest.fixture(scope="module")
def pair(new_service: Callable[..., Service]) -> Service:
    return new_service(SFTD_GPUS="2")


def test_two_ranks_pause_resume_and_finish_as_if_nothing_had_happened(pair: Service) -> None:
    client = pair.client
    spec = pair.spec(
        gpus=2, batch_size=2, max_steps=60, save_steps=10**6, eval_steps=30, lora={"dropout": 0.2}
    )
    whole = client.jobs.create(spec=spec)
    client.jobs.wait(whole.id, timeout_seconds=180)

    job = client.jobs.create(spec=spec)
    pair.wait(lambda: client.jobs.retrieve(job.id).step >= 5, "some steps")
    client.jobs.pause(job.id)
    pair.wait(lambda: client.jobs.retrieve(job.id).state == "paused", "the pause")
    client.jobs.resume(job.id)
    done = client.jobs.wait(job.id, timeout_seconds=180)

    assert done.attempt == 2
    assert any("lora on CPU, 2 process(es)" in line.text for line in client.jobs.logs(job.id))
    curves = [[(p.step, p.model_dump().get("loss")) for p in client.jobs.metrics(j.id)] for j in (whole, job)]
    assert curves[0] == curves[1]


def test_two_ranks_are_cancelled_within_five_seconds(pair: Service) -> None:
    client = pair.client
    job = client.jobs.create(
        spec=pair.spec(gpus=2, batch_size=2, max_steps=10**6, save_steps=10**6, eval_steps=10**6)
    )
    pair.wait(lambda: client.jobs.retrieve(job.id).step >= 3, "some steps")

    started = time.monotonic()
    client.jobs.cancel(job.id)
    pair.wait(lambda: client.jobs.retrieve(job.id).state == "cancelled", "the end")

    assert time.monotonic() - started < 5


def test_a_job_of_more_devices_than_any_worker_has_waits(pair: Service) -> None:
    client = pair.client
    wide = client.jobs.create(spec=pair.spec(gpus=4))
    narrow = client.jobs.create(spec=pair.spec(gpus=1, max_steps=1))

    client.jobs.wait(narrow.id, timeout_seconds=120)

    assert client.jobs.retrieve(wide.id).state == "queued"
    client.jobs.cancel(wide.id)
