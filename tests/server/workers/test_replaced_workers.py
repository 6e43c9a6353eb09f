"""A worker that registers again after its own death: what its dead process held goes on at once."""

import pytest
from sqlmodel import Session, select

from sftd_server.tables import WorkerRow


def hello(box, boot_id: str, **more: object):
    body = {"worker_id": "w1", "boot_id": boot_id, "gpus": 1, "device": "cpu", "protocol": 2, **more}
    return box.worker.post("/worker/register", json=body)


def test_the_jobs_of_the_dead_process_can_be_claimed_at_once(make_box, assert_error) -> None:
    box = make_box(backoff_seconds=60)
    hello(box, "b1")
    lease = box.running()

    assert hello(box, "b2", replaces_boot_id="b1").status_code == 200
    again = box.claim(boot_id="b2")

    assert (again.job_id, again.attempt) == (lease.job_id, 2)
    assert box.events(lease.job_id)[-2:] == ["worker_restarted", "claimed"]
    assert_error(lease.finish(), 409, "stale_lease")


def test_it_counts_as_a_loss(make_box) -> None:
    box = make_box(max_lost=2)
    job_id = box.submit()
    for number in (1, 2):
        box.claim(boot_id=f"b{number}").start()
        hello(box, f"b{number + 1}", replaces_boot_id=f"b{number}")

    job = box.job(job_id)
    assert (job["state"], job["failure"]["reason"]) == ("failed", "worker_lost")
    assert box.events(job_id)[-2:] == ["worker_restarted", "failed"]


@pytest.mark.parametrize(("wish", "state"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_wish_of_the_user_is_carried_out(box, wish: str, state: str) -> None:
    lease = box.running()
    box.admin.post(f"/jobs/{lease.job_id}/{wish}")

    hello(box, "b2", replaces_boot_id="b1")

    assert box.state(lease.job_id) == state


def test_nothing_of_others_is_taken(box) -> None:
    ours = box.running()
    box.submit()
    others = box.claim("w2", boot_id="b1")
    box.submit()
    second = box.claim("w1", boot_id="b0")

    hello(box, "b9", replaces_boot_id="b8")
    assert [box.state(lease.job_id) for lease in (ours, others, second)] == ["running", "claimed", "claimed"]
    hello(box, "b9", replaces_boot_id="b1")

    assert [box.state(lease.job_id) for lease in (ours, others, second)] == ["queued", "claimed", "claimed"]


def test_the_same_hello_again_changes_nothing(box) -> None:
    lease = box.running()
    for _ in range(2):
        assert hello(box, "b2", replaces_boot_id="b1").status_code == 200
    again = box.claim(boot_id="b2")

    assert hello(box, "b2", replaces_boot_id="b1").status_code == 200

    assert box.state(lease.job_id) == "claimed"
    assert again.attempt == 2
    assert box.events(lease.job_id).count("worker_restarted") == 1


def test_a_process_does_not_replace_itself(box, assert_error) -> None:
    error = hello(box, "b1", replaces_boot_id="b1")

    assert_error(error, 422, "replaces_itself")
    assert error.json()["error"]["param"] == "replaces_boot_id"


def test_the_dead_process_is_marked(box) -> None:
    hello(box, "b1")
    hello(box, "b2", replaces_boot_id="b1")

    def gone(session: Session) -> dict[str, bool]:
        return {row.boot_id: row.gone_at is not None for row in session.exec(select(WorkerRow))}

    assert box.run(box.server.db.read(gone)) == {"b1": True, "b2": False}
