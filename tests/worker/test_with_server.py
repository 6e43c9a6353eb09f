"""Workers and the real server, both killed: nothing is lost, nothing is told twice."""

import time
from typing import TYPE_CHECKING

import pytest

from sftd.errors import ConnectionFailed

if TYPE_CHECKING:
    from conftest import Box


def test_a_killed_server_gets_everything_and_takes_no_job_away(box: "Box") -> None:
    job_id = box.post(steps=150, step_seconds=0.03, checkpoint_every=50)
    box.start_worker("one")
    box.until(lambda: len(box.steps(job_id)) > 5)

    box.server.kill()
    box.server.wait()
    spool = box.data / "jobs" / job_id / "logs/events.jsonl"
    box.until(lambda: '"step": 140' in spool.read_text())  # longer than the lease
    box.start_server()
    job = box.client.jobs.wait(job_id, timeout_seconds=20)

    assert job.attempt == 1
    assert box.steps(job_id) == list(range(1, 151))
    assert [found.step for found in box.client.jobs.checkpoints(job_id)] == [50, 100, 150]


def test_a_killed_workers_job_goes_on_elsewhere_from_its_checkpoint(box: "Box") -> None:
    job_id = box.post(steps=60, step_seconds=0.02, checkpoint_every=10)
    first = box.start_worker("one")
    box.until(lambda: list(box.client.jobs.checkpoints(job_id)))

    first.kill()
    box.start_worker("two")
    job = box.client.jobs.wait(job_id, timeout_seconds=30)

    assert job.attempt == 2
    assert box.steps(job_id) == list(range(1, 61))
    types = [event.type for event in box.client.jobs.events(job_id)]
    assert types.count("succeeded") == 1
    assert "lease_expired" in types


def test_a_stopped_workers_job_is_queued_again_at_once(box: "Box") -> None:
    job_id = box.post(steps=60, step_seconds=0.02)
    first = box.start_worker("one")
    box.until(lambda: len(box.steps(job_id)) > 5)

    first.terminate()
    assert first.wait(10) == 0
    assert box.client.jobs.retrieve(job_id).state == "queued"
    box.start_worker("two")
    box.client.jobs.wait(job_id, timeout_seconds=20)

    assert box.steps(job_id) == list(range(1, 61))
    assert "lease_expired" not in [event.type for event in box.client.jobs.events(job_id)]


def test_a_pause_taken_back_lets_the_job_go_on(box: "Box") -> None:
    job_id = box.post(steps=60, step_seconds=0.02)
    box.start_worker("one")
    box.until(lambda: len(box.steps(job_id)) > 5)

    box.client.jobs.pause(job_id)
    box.until(lambda: box.client.jobs.retrieve(job_id).state == "paused")
    box.client.jobs.resume(job_id)
    box.client.jobs.wait(job_id, timeout_seconds=20)

    assert box.steps(job_id) == list(range(1, 61))


def test_a_job_is_cancelled_in_any_state_within_five_seconds(box: "Box") -> None:
    box.start_worker("one")
    for pause in (0.0, 0.05, 0.2, 0.6):
        job_id = box.post(steps=10**6, step_seconds=0.02, ignore_signals=True)
        time.sleep(pause)  # so that the cancel falls into another state each time

        asked_at = time.monotonic()
        box.client.jobs.cancel(job_id)
        box.until(lambda: box.client.jobs.retrieve(job_id).state == "cancelled", 6)  # noqa: B023  # called at once

        assert time.monotonic() - asked_at < 5


def test_a_server_that_stops_for_good_is_said(box: "Box") -> None:
    box.server.kill()
    box.server.wait()

    with pytest.raises(ConnectionFailed, match="Nothing listens"):
        box.client.jobs.retrieve("job_1")
