"""Cancel, pause and resume in every state."""

import threading

import pytest


def steer(box, job_id: str, verb: str):
    return box.admin.post(f"/jobs/{job_id}/{verb}")


def put_in(box, state: str):
    """A job in this state, and its lease if it has one. It goes before what other tests have left in the queue."""
    box.num_claims += 1
    job_id = box.submit(priority=box.num_claims)
    if state in ("queued", "paused", "cancelled"):
        verbs = {"queued": [], "paused": ["pause"], "cancelled": ["cancel"]}[state]
        for verb in verbs:
            assert steer(box, job_id, verb).status_code == 200
        return job_id, None
    lease = box.claim()
    if state != "claimed":
        lease.start()
    if state == "stopping":
        steer(box, job_id, "pause")
        lease.post("heartbeat", started=True)
    if state in ("succeeded", "failed"):
        lease.finish(state)
    assert box.state(job_id) == state
    return job_id, lease


@pytest.mark.parametrize(
    ("state", "verb", "status", "after", "want"),
    [
        ("queued", "cancel", 200, "cancelled", "cancel"),
        ("queued", "pause", 200, "paused", "pause"),
        ("queued", "resume", 200, "queued", "run"),
        ("claimed", "cancel", 200, "claimed", "cancel"),
        ("claimed", "pause", 200, "claimed", "pause"),
        ("claimed", "resume", 200, "claimed", "run"),
        ("running", "cancel", 200, "running", "cancel"),
        ("running", "pause", 200, "running", "pause"),
        ("running", "resume", 200, "running", "run"),
        ("stopping", "cancel", 200, "stopping", "cancel"),
        ("stopping", "pause", 200, "stopping", "pause"),
        ("stopping", "resume", 409, "stopping", "pause"),
        ("paused", "cancel", 200, "cancelled", "cancel"),
        ("paused", "pause", 200, "paused", "pause"),
        ("paused", "resume", 200, "queued", "run"),
        ("cancelled", "cancel", 200, "cancelled", "cancel"),
        ("cancelled", "pause", 409, "cancelled", "cancel"),
        ("cancelled", "resume", 409, "cancelled", "cancel"),
        ("succeeded", "cancel", 409, "succeeded", "run"),
        ("succeeded", "pause", 409, "succeeded", "run"),
        ("succeeded", "resume", 409, "succeeded", "run"),
        ("failed", "cancel", 409, "failed", "run"),
        ("failed", "pause", 409, "failed", "run"),
        ("failed", "resume", 409, "failed", "run"),
    ],
)
def test_each_wish_in_each_state(
    shared_box, state: str, verb: str, status: int, after: str, want: str
) -> None:
    box = shared_box
    job_id, _ = put_in(box, state)

    answer = steer(box, job_id, verb)

    assert answer.status_code == status, answer.text
    job = box.job(job_id)
    assert (job["state"], job["want"]) == (after, want)
    if status == 409:
        assert state in answer.json()["error"]["message"]
    assert steer(box, job_id, verb).status_code == status  # and again


@pytest.mark.parametrize("state", ["claimed", "running", "stopping"])
def test_a_cancel_reaches_the_worker_and_ends_the_job_once(box, state: str) -> None:
    job_id, lease = put_in(box, state)

    steer(box, job_id, "cancel")
    want = lease.post("heartbeat", started=True).json()["want"]
    lease.finish("cancelled")

    assert want == "cancel"
    assert box.state(job_id) == "cancelled"
    assert box.events(job_id).count("cancelled") == 1


@pytest.mark.parametrize("state", ["claimed", "running", "stopping"])
def test_a_cancelled_job_whose_worker_vanishes_is_cancelled(box, state: str) -> None:
    job_id, _ = put_in(box, state)
    steer(box, job_id, "cancel")

    box.expire()

    assert box.state(job_id) == "cancelled"


def test_a_pause_cannot_replace_a_cancel(box, assert_error) -> None:
    job_id, _ = put_in(box, "running")
    steer(box, job_id, "cancel")

    for verb in ("pause", "resume"):
        assert_error(steer(box, job_id, verb), 409, "job_stopping")
    assert box.job(job_id)["want"] == "cancel"


def test_a_pause_that_no_worker_has_heard_of_is_taken_back(box) -> None:
    job_id, lease = put_in(box, "running")

    steer(box, job_id, "pause")
    steer(box, job_id, "resume")

    assert lease.post("heartbeat", started=True).json()["want"] == "run"
    assert box.state(job_id) == "running"


def test_a_paused_job_goes_on_from_its_checkpoint_with_a_new_attempt(box) -> None:
    lease = box.running()
    lease.checkpoint(10)
    steer(box, lease.job_id, "pause")
    lease.post("heartbeat", started=True)
    lease.finish("paused")
    assert box.state(lease.job_id) == "paused"
    assert box.try_claim().status_code == 204

    steer(box, lease.job_id, "resume")
    again = box.claim()

    assert (again.attempt, [c["step"] for c in again.answer["checkpoints"]]) == (2, [10])


def test_a_pause_overtaken_by_a_cancel_ends_cancelled(box) -> None:
    job_id, lease = put_in(box, "stopping")
    steer(box, job_id, "cancel")

    assert lease.finish("paused").status_code == 200
    assert lease.finish("paused").status_code == 200
    assert box.state(job_id) == "cancelled"


def test_a_held_heartbeat_answers_as_soon_as_the_user_cancels(box) -> None:
    job_id, lease = put_in(box, "running")
    answers = []
    waiting = threading.Thread(
        target=lambda: answers.append(lease.post("heartbeat", started=True, wait_seconds=10))
    )
    waiting.start()

    steer(box, job_id, "cancel")
    waiting.join(5)

    assert answers[0].json()["want"] == "cancel"
    assert box.state(job_id) == "stopping"


def test_only_the_owner_or_an_admin_steers_a_job(box, assert_error) -> None:
    ann, bob = box.key("ann"), box.key("bob")
    job_id = ann.post("/jobs", json=box.spec()).json()["id"]

    assert_error(bob.post(f"/jobs/{job_id}/cancel"), 403, "not_owner")
    assert bob.get(f"/jobs/{job_id}").json()["owner"] == "ann"
    assert ann.post(f"/jobs/{job_id}/pause").status_code == 200
    assert steer(box, job_id, "cancel").status_code == 200
