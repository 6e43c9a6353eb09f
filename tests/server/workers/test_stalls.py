"""Jobs whose trainer hangs: tried again from the last checkpoint, but not for ever."""

import pytest


@pytest.fixture
def stall(box):
    """Claim the job, let it save at these steps, and let its trainer hang."""

    def stall(*saved: int) -> None:
        lease = box.claim()
        lease.start()
        for step in saved:
            assert lease.checkpoint(step).status_code == 200
        assert lease.finish("failed", reason="stalled", message="No life for 600 s.").status_code == 200

    return stall


def test_a_stalled_job_is_tried_again_three_times_without_counting_as_a_failure(box, stall) -> None:
    job_id = box.submit()

    for _ in range(3):
        stall()
        assert box.state(job_id) == "queued"
    stall()

    assert box.state(job_id) == "failed"
    assert box.job(job_id)["failure"]["reason"] == "stalled"
    assert box.events(job_id).count("retrying") == 3


def test_a_checkpoint_since_the_last_stall_begins_the_count_anew(box, stall) -> None:
    job_id = box.submit()

    for step in (None, None, 2, None, None, 4, None, None):
        stall(*([step] if step else []))
        assert box.state(job_id) == "queued"
    stall()

    assert box.state(job_id) == "failed"


def test_a_checkpoint_of_an_attempt_that_was_lost_counts_as_getting_on(box, stall) -> None:
    job_id = box.submit()
    for _ in range(3):
        stall()
    lost = box.claim()
    lost.start()
    lost.checkpoint(2)
    box.expire()

    stall()

    assert box.state(job_id) == "queued"


def test_with_no_restarts_allowed_the_first_stall_is_the_last(make_box) -> None:
    box = make_box(max_stalls=0)
    lease = box.running()

    lease.finish("failed", reason="stalled", message="No life for 600 s.")

    assert box.state(lease.job_id) == "failed"
