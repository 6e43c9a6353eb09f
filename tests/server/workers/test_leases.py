"""Keeping and losing a lease: expiry, the grace after a start, clock jumps, stale writes."""

import threading
import time

import httpx
import pytest
from sqlmodel import select

from sftd_server.tables import JobRow

WRITES = {
    "heartbeat": {"started": True},
    "metrics": {"seq": 0, "points": [{"step": 1, "values": {"loss": 1.0}}]},
    "logs": {"seq": 0, "lines": ["late"]},
    "events": {"seq": 0, "events": [{"type": "notice", "message": "late"}]},
    "checkpoints": {"step": 1, "name": "checkpoint-1", "manifest_sha256": "ab" * 32, "files": {}},
    "finish": {"state": "succeeded"},
    "release": {"message": "late"},
}


@pytest.mark.parametrize("kind", WRITES)
def test_every_write_of_an_old_attempt_is_refused(box, assert_error, kind: str) -> None:
    old = box.running()
    box.expire()
    new = box.claim("w2")

    assert_error(old.post(kind, **WRITES[kind]), 409, "stale_lease")
    assert (new.attempt, box.state(new.job_id)) == (2, "claimed")
    assert box.admin.get(f"/jobs/{new.job_id}/logs").json()["data"] == []


def test_every_write_with_a_wrong_token_or_attempt_is_refused(box, assert_error) -> None:
    lease = box.running()
    token = lease.token
    for kind, body in WRITES.items():
        lease.token, lease.attempt = "0" * 32, 1
        assert_error(lease.post(kind, **body), 409, "stale_lease")
        lease.token, lease.attempt = token, 2
        assert_error(lease.post(kind, **body), 409, "stale_lease")

    assert box.state(lease.job_id) == "running"


def test_every_write_needs_a_token(box, assert_error) -> None:
    lease = box.running()

    for kind, body in WRITES.items():
        answer = box.worker.post(f"/worker/jobs/{lease.job_id}/{kind}", json={"attempt": 1, **body})

        assert assert_error(answer, 422, "invalid_request")["param"] == "X-Lease-Token"


def test_the_token_of_one_job_opens_no_other(box, assert_error) -> None:
    one, other = box.running(), box.running()
    one.job_id = other.job_id

    assert_error(one.finish(), 409, "stale_lease")


def test_a_silent_worker_loses_its_job_to_another(box) -> None:
    lease = box.running()
    box.clock.advance(29)
    assert box.reap() == 0

    box.clock.advance(2)
    assert box.reap() == 1

    assert box.state(lease.job_id) == "queued"
    assert box.events(lease.job_id)[-1] == "lease_expired"
    assert box.claim("w2").attempt == 2


def test_heartbeats_keep_a_job_for_ever(box) -> None:
    lease = box.running()

    for _ in range(5):
        box.clock.advance(20)
        lease.start()
        assert box.reap() == 0


def test_a_job_claimed_but_not_started_goes_back_without_being_a_failure(box) -> None:
    job_id = box.submit()
    lease = box.claim()
    box.clock.advance(40)
    box.reap()
    lease = box.claim()
    box.clock.advance(16)
    lease.post("heartbeat", started=False)

    box.reap()

    assert box.state(job_id) == "queued"
    assert box.events(job_id)[-1] == "not_started"
    assert box.claim().attempt == 3


def test_after_a_start_no_job_is_taken_back_for_a_lease_time(make_box) -> None:
    box = make_box()
    lease = box.running()
    box.stop()
    box.clock.advance(3600)  # the server is away for an hour

    again = make_box(clock=box.clock)
    lease.worker = again.worker
    again.clock.advance(29)

    assert again.reap() == 0
    lease.start()
    assert again.state(lease.job_id) == "running"
    again.clock.advance(29)
    assert again.reap() == 0
    again.clock.advance(2)
    assert again.reap() == 1


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_a_jump_of_the_clock_takes_no_job_back(box, seconds: float) -> None:
    lease = box.running()
    box.clock.advance(31)
    lease.start()
    box.reap()

    box.clock.jump(seconds)
    assert box.reap() == 0
    box.clock.advance(29)
    assert box.reap() == 0

    assert box.state(lease.job_id) == "running"
    assert box.events(lease.job_id)[-1] == "clock_jump"
    box.clock.advance(2)
    assert box.reap() == 1  # and none is kept for longer than a lease


def test_what_passes_on_the_clock_alone_is_charged_to_nobody(box) -> None:
    job_id = box.submit(max_seconds=3600)
    lease = box.claim()
    lease.start()
    box.clock.advance(100)

    box.clock.jump(8 * 3600)  # the box slept
    answer = lease.post("heartbeat", started=True)  # before the reaper's next look

    assert answer.json()["want"] == "run"
    job = box.job(job_id)
    assert job["state"] == "running"
    assert job["run_seconds"] == job["gpu_seconds"] == 100
    box.clock.jump(-3600)
    box.clock.advance(20)
    lease.start()
    lease.finish()
    assert box.job(job_id)["run_seconds"] == 120
    attempt = box.admin.get(f"/jobs/{job_id}/attempts").json()["data"][0]
    assert attempt["gpu_seconds"] == 120


@pytest.mark.parametrize("restarted", [True, False])
def test_a_lost_attempt_is_charged_until_its_worker_was_heard_of(box, restarted: bool) -> None:
    job_id = box.submit(max_seconds=3600)
    lease = box.claim()
    lease.start()
    box.clock.advance(100)
    lease.start()
    box.clock.advance(8 * 3600)  # the box was off

    if restarted:
        box.register(boot_id="b2", replaces_boot_id="b1")
    else:
        box.reap()

    job = box.job(job_id)
    assert (job["state"], job["run_seconds"], job["gpu_seconds"]) == ("queued", 100, 100)
    assert box.admin.get(f"/jobs/{job_id}/attempts").json()["data"][0]["gpu_seconds"] == 100


def test_a_claim_that_was_held_over_a_jump_is_charged_rightly(box) -> None:
    box.register()
    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(box.try_claim(wait_seconds=20)))
    waiting.start()
    while "queue" not in box.server.db._signals:
        time.sleep(0.01)
    time.sleep(0.2)  # until it has looked in vain: nothing outside tells
    box.clock.jump(-3600)
    job_id = box.submit()
    waiting.join()

    box.reap()
    box.clock.advance(10)

    assert answers[0].status_code == 200
    assert box.job(job_id)["run_seconds"] == 10


def test_a_box_that_slept_for_days_forgets_no_worker(box, assert_error) -> None:
    box.register(labels={"room": "a"})
    box.clock.advance(40)

    box.clock.jump(3 * 86400)
    box.reap()
    box.clock.advance(1)
    box.reap()

    assert [w["labels"] for w in box.admin.get("/workers").json()["data"]] == [{"room": "a"}]
    assert box.try_claim().status_code == 204  # it is heard of again
    box.clock.advance(40)
    box.reap()
    assert len(box.admin.get("/workers").json()["data"]) == 1


def test_a_worker_that_was_forgotten_is_told_to_register_again(box, assert_error) -> None:
    box.register(labels={"room": "a"})
    box.submit(requires={"label": "room=a"})
    box.clock.advance(2 * 86400)
    box.reap()
    assert box.admin.get("/workers").json()["data"] == []

    assert_error(box.try_claim(wait_seconds=9), 409, "worker_unregistered")  # at once

    box.register(labels={"room": "a"})
    assert box.try_claim().status_code == 200


def test_a_job_that_kills_its_workers_fails_at_the_fifth(box) -> None:
    lease = box.running()
    lease.post("logs", seq=0, lines=["the last words"])
    for number in range(1, 6):
        box.expire()
        if number < 5:
            assert box.state(lease.job_id) == "queued"
            box.clock.advance(61)
            box.claim().start()

    job = box.job(lease.job_id)
    assert (job["state"], job["failure"]["reason"]) == ("failed", "worker_lost")
    assert job["failure"]["log_tail"] == ["the last words"]
    assert box.events(lease.job_id).count("failed") == 1


def test_a_job_that_gets_on_between_losses_is_never_given_up(box) -> None:
    lease = box.running()
    for number in range(1, 9):
        lease.checkpoint(number)
        box.expire()
        assert box.state(lease.job_id) == "queued"
        box.clock.advance(61)
        lease = box.claim()
        lease.start()


def test_a_stopping_server_takes_no_job_back(box) -> None:
    lease = box.running()
    box.run(_in_loop(box.server.begin_stop))

    assert box.expire() == 0
    assert box.run(box.server.db.read(lambda session: session.exec(select(JobRow.state)).all())) == [
        "running"
    ]
    assert lease.attempt == 1


async def _in_loop(act) -> None:
    act()
