"""How attempts end: finish, release; late and repeated last words."""

import pytest

from sftd.schemas import REMEDIES, FailureReason


def test_a_finished_job_has_one_terminal_event_and_its_result(box) -> None:
    lease = box.running()

    assert lease.finish(files={"a.txt": {"bytes": 1, "sha256": "ab" * 32}}).json() == {"ok": True}

    job = box.job(lease.job_id)
    assert (job["state"], job["progress"]) == ("succeeded", 1.0)
    assert job["finished_at"] is not None
    assert box.events(lease.job_id) == ["queued", "claimed", "running", "succeeded"]


@pytest.mark.parametrize("state", ["succeeded", "failed"])
def test_the_same_last_word_may_be_said_again_but_no_other(box, assert_error, state: str) -> None:
    lease = box.running()

    assert [lease.finish(state).status_code for _ in range(3)] == [200] * 3
    other = "failed" if state == "succeeded" else "succeeded"
    assert_error(lease.finish(other), 409, "stale_lease")
    assert_error(lease.post("release", message="?"), 409, "stale_lease")
    assert box.state(lease.job_id) == state


def test_a_late_finish_of_a_lost_job_is_refused(box, assert_error) -> None:
    lease = box.running()
    box.expire()

    assert_error(lease.finish(), 409, "stale_lease")
    assert box.state(lease.job_id) == "queued"


@pytest.mark.parametrize("state", ["cancelled", "paused"])
def test_a_worker_can_not_end_a_job_as_its_user_never_wished(box, assert_error, state: str) -> None:
    lease = box.running()

    assert_error(lease.finish(state), 409, "wrong_state")
    assert box.state(lease.job_id) == "running"


def test_a_failure_says_why_and_who_can_do_what(box) -> None:
    for reason in FailureReason:
        if reason is FailureReason.STALLED:  # is tried again: test_stalls.py
            continue
        lease = box.running()

        lease.finish("failed", reason=reason, message="it broke", log_tail=["line"])

        failure = box.job(lease.job_id)["failure"]
        assert failure == {
            "reason": reason,
            "message": "it broke",
            "remedy": REMEDIES[reason],
            "log_tail": ["line"],
        }


def test_a_released_job_goes_first_and_is_no_failure(box) -> None:
    lease = box.running()
    box.submit()

    assert [lease.post("release", message="drained").status_code for _ in range(2)] == [200, 200]

    assert box.job(lease.job_id)["queue_position"] == 1
    again = box.claim()
    assert (again.job_id, again.attempt) == (lease.job_id, 2)


def test_a_released_job_that_was_to_be_cancelled_is_cancelled(box) -> None:
    lease = box.running()
    box.admin.post(f"/jobs/{lease.job_id}/cancel")

    lease.post("release", message="drained")

    assert box.state(lease.job_id) == "cancelled"
    assert box.events(lease.job_id)[-2:] == ["released", "cancelled"]


def test_a_trainer_that_died_is_tried_again_where_that_is_allowed(make_box) -> None:
    box = make_box(max_failures=2)
    lease = box.running()

    lease.finish("failed", reason="trainer_died")
    assert box.state(lease.job_id) == "queued"
    box.clock.advance(1)
    again = box.claim()
    again.start()
    again.finish("failed", reason="trainer_died")

    assert box.state(lease.job_id) == "failed"
    assert box.events(lease.job_id).count("retrying") == 1


def test_a_trainer_that_died_while_it_was_to_be_paused_does_not_fail_the_job(make_box) -> None:
    box = make_box(max_failures=2)
    lease = box.running()
    box.admin.post(f"/jobs/{lease.job_id}/pause")

    lease.finish("failed", reason="trainer_died")

    assert box.state(lease.job_id) == "paused"
    assert box.events(lease.job_id)[-1] == "paused"
    box.admin.post(f"/jobs/{lease.job_id}/resume")
    again = box.claim()
    again.start()
    again.finish("failed", reason="trainer_died")
    assert box.state(lease.job_id) == "failed"  # the first failure has counted


def test_a_mistake_in_the_data_is_never_tried_again(make_box) -> None:
    box = make_box(max_failures=5)
    lease = box.running()

    lease.finish("failed", reason="bad_data")

    assert box.state(lease.job_id) == "failed"
