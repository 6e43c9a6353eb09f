"""What attempts cost, budgets, and the list of attempts."""

import pytest


def attempts(box, job_id: str) -> list[dict]:
    return box.admin.get(f"/jobs/{job_id}/attempts").json()["data"]


def beat(lease) -> dict:
    return lease.post("heartbeat", started=True).json()


def test_every_attempt_is_listed_with_how_it_ended_and_why(make_box) -> None:
    box = make_box(max_failures=2)
    lease = box.running()
    box.clock.advance(10)
    lease.post("events", seq=0, events=[{"type": "run", "message": "r", "data": {"start_step": -1}}])
    lease.post("release", message="drained", reason="stopping")
    lease = box.claim("w2")
    lease.start()
    box.clock.advance(5)
    lease.start()
    box.expire()
    box.clock.advance(61)
    lease = box.claim()
    lease.start()
    lease.finish("failed", reason="trainer_died", message="it died")
    box.clock.advance(61)
    box.claim()

    found = attempts(box, lease.job_id)

    assert [a["outcome"] for a in found] == ["released", "lost", "failed", None]
    assert [a["reason"] for a in found] == ["stopping", None, "trainer_died", None]
    assert [a["worker_id"] for a in found] == ["w1", "w2", "w1", "w1"]
    assert [a["message"] for a in found][::2] == ["drained", "it died"]
    assert [a["gpu_seconds"] for a in found] == [10, 5, 0, 0]  # the lost one until it was heard of last
    assert (found[0]["start_step"], found[0]["started_at"], found[0]["ended_at"]) == (
        -1,
        "2030-01-01T00:00:00Z",
        "2030-01-01T00:00:10Z",
    )
    assert found[3]["started_at"] is None


def test_logs_and_events_of_one_attempt(box, read_events) -> None:
    lease = box.running()
    lease.post("logs", seq=0, lines=["of the first"])
    lease.post("release", message="x")
    lease = box.claim()
    lease.start()
    lease.post("logs", seq=0, lines=["of the second"])
    lease.finish()

    path = f"/jobs/{lease.job_id}/logs"
    assert [line["text"] for line in box.admin.get(f"{path}?attempt=2").json()["data"]] == ["of the second"]
    events = box.admin.get(f"/jobs/{lease.job_id}/events?attempt=1").json()["data"]
    assert [event["type"] for event in events] == ["claimed", "running", "released"]
    streamed = box.admin.get(f"{path}?attempt=1", headers={"accept": "text/event-stream"}).text
    assert [event["event"] for event in read_events(streamed)] == ["log", "end"]


def test_a_job_shows_what_it_has_used_the_running_attempt_included(box) -> None:
    lease = box.running(gpus=1)
    box.clock.advance(20)
    lease.post("release", message="x")
    box.clock.advance(100)
    lease = box.claim()
    box.clock.advance(5)

    job = box.job(lease.job_id)

    assert (job["run_seconds"], job["gpu_seconds"]) == (25, 25)


def test_gpu_seconds_count_each_gpu(box) -> None:
    box.submit(gpus=4)
    lease = box.claim(gpus=4)
    box.clock.advance(10)

    job = box.job(lease.job_id)

    assert (job["run_seconds"], job["gpu_seconds"]) == (10, 40)


@pytest.mark.parametrize(
    ("field", "value", "raised"), [("max_seconds", 60, 200), ("max_gpu_seconds", 60, None)]
)
def test_a_budget_pauses_the_job_over_all_attempts_and_is_raised_to_go_on(
    box, assert_error, field: str, value: int, raised: int | None
) -> None:
    lease = box.running(**{field: value})
    box.clock.advance(20)
    assert beat(lease)["want"] == "run"
    lease.post("release", message="x")
    lease = box.claim()
    lease.start()
    box.clock.advance(25)
    beat(lease)
    box.clock.advance(15)

    assert beat(lease)["want"] == "pause"
    assert box.job(lease.job_id)["pause_reason"] == field
    assert box.state(lease.job_id) == "stopping"
    lease.finish("paused")
    job = box.job(lease.job_id)
    assert (job["state"], job["pause_reason"], job["run_seconds"]) == ("paused", field, 60)
    assert attempts(box, lease.job_id)[-1]["reason"] == field
    error = assert_error(box.admin.post(f"/jobs/{lease.job_id}/resume"), 409, "budget_exhausted")
    assert (error["param"], "PATCH" in error["message"]) == (field, True)
    box.admin.patch(f"/jobs/{lease.job_id}", json={field: raised})
    resumed = box.admin.post(f"/jobs/{lease.job_id}/resume").json()
    assert (resumed["state"], resumed["pause_reason"]) == ("queued", None)


def test_tokens_are_a_budget_that_metrics_use_up(box) -> None:
    lease = box.running(max_tokens=1000)

    lease.metrics(0, (1, {"tokens_seen": 999}))
    assert box.job(lease.job_id)["want"] == "run"
    lease.metrics(1, (2, {"tokens_seen": 1000}))

    job = box.job(lease.job_id)
    assert (job["want"], job["pause_reason"]) == ("pause", "max_tokens")
    assert box.events(lease.job_id)[-1] == "pause_requested"
    assert beat(lease)["want"] == "pause"


def test_a_job_at_the_end_of_its_budget_may_still_succeed(box) -> None:
    lease = box.running(max_seconds=10)
    box.clock.advance(11)
    assert beat(lease)["want"] == "pause"

    lease.finish("succeeded")

    job = box.job(lease.job_id)
    assert (job["state"], job["pause_reason"]) == ("succeeded", None)


def test_a_users_pause_says_so_and_a_cancel_goes_before_a_budget(box) -> None:
    lease = box.running(max_seconds=10)
    box.admin.post(f"/jobs/{lease.job_id}/pause")
    assert box.job(lease.job_id)["pause_reason"] == "user"
    box.clock.advance(11)
    beat(lease)
    assert box.job(lease.job_id)["pause_reason"] == "user"

    other = box.running(max_seconds=10)
    box.admin.post(f"/jobs/{other.job_id}/cancel")
    box.clock.advance(11)
    assert beat(other)["want"] == "cancel"
