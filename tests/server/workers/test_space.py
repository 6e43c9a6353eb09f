"""Jobs that are put aside because the disk is nearly full, and go on by themselves."""

import functools
import shutil

import pytest
from sqlmodel import select

from sftd_server.tables import JobRow, WorkerRow
from sftd_server.workers import space

GIB = 2**30


@pytest.fixture
def hold(box):
    """A running job that its worker puts aside; returns its lease."""

    def hold(needs: int = 3 * GIB, **fields):
        lease = box.running(**fields)
        answer = lease.finish(
            "paused", pause_reason="disk_low", needs_disk_bytes=needs, message="The disk is full."
        )
        assert answer.status_code == 200, answer.text
        return lease

    return hold


def look(box, free_bytes: int) -> list[str]:
    """What the server does when so much is free."""
    work = functools.partial(space.resume_where_space, free_bytes=free_bytes, now=box.clock.now())
    return box.run(box.server.db.write(work))


def row(box, job_id: str) -> JobRow:
    return box.run(
        box.server.db.read(lambda session: session.exec(select(JobRow).where(JobRow.id == job_id)).one())
    )


def test_a_job_waits_for_space_and_goes_on_when_it_is_there(box, hold) -> None:
    lease = hold(3 * GIB)
    found = row(box, lease.job_id)
    assert (found.state, found.want, found.pause_reason, found.needs_disk_bytes) == (
        "paused",
        "pause",
        "disk_low",
        3 * GIB,
    )

    attempt = box.admin.get(f"/jobs/{lease.job_id}/attempts").json()["data"][0]
    assert (attempt["outcome"], attempt["reason"], attempt["message"]) == (
        "paused",
        "disk_low",
        "The disk is full.",
    )
    assert box.job(lease.job_id)["pause_reason"] == "disk_low"

    assert look(box, 3 * GIB - 1) == []
    assert look(box, 3 * GIB) == [lease.job_id]

    found = row(box, lease.job_id)
    assert (found.state, found.want, found.pause_reason) == ("queued", "run", None)
    assert box.events(lease.job_id) == ["queued", "claimed", "running", "paused", "queued"]
    assert box.claim().attempt == 2


def test_the_same_last_word_may_be_said_again(box, hold) -> None:
    lease = hold()

    again = lease.finish("paused", pause_reason="disk_low", needs_disk_bytes=3 * GIB)

    assert again.status_code == 200
    assert box.events(lease.job_id).count("paused") == 1


def test_two_jobs_do_not_go_on_into_the_room_of_one(box, hold) -> None:
    first, second = hold(3 * GIB), hold(3 * GIB)

    assert look(box, 5 * GIB) == [first.job_id]
    assert look(box, 5 * GIB) == []  # the first one's is spoken for, though not used yet
    lease = box.claim()
    lease.start()
    assert look(box, 5 * GIB) == []
    lease.finish()

    assert look(box, 5 * GIB) == [second.job_id]


def test_the_job_of_the_higher_priority_goes_on_first(box, hold) -> None:
    hold(3 * GIB, priority=0)
    urgent = hold(3 * GIB, priority=5)

    assert look(box, 4 * GIB) == [urgent.job_id]


def test_a_user_who_resumes_it_is_not_kept_waiting_for_the_disk(box, hold) -> None:
    lease = hold(3 * GIB)

    assert box.admin.post(f"/jobs/{lease.job_id}/resume").status_code == 200

    assert box.claim(disk_free_bytes=0).attempt == 2


def test_a_user_s_pause_is_never_ended_by_space(box) -> None:
    lease = box.running()
    box.admin.post(f"/jobs/{lease.job_id}/pause")

    lease.finish("paused", pause_reason="disk_low", needs_disk_bytes=1)

    assert box.state(lease.job_id) == "paused"
    assert row(box, lease.job_id).needs_disk_bytes is None
    assert look(box, 2**60) == []


def test_a_cancelled_job_that_is_put_aside_is_cancelled(box) -> None:
    lease = box.running()
    box.admin.post(f"/jobs/{lease.job_id}/cancel")

    assert lease.finish("paused", pause_reason="disk_low", needs_disk_bytes=1).status_code == 200

    assert box.state(lease.job_id) == "cancelled"
    assert box.events(lease.job_id)[-1] == "cancelled"


def test_a_worker_with_a_disk_of_its_own_tells_of_its_space(box, hold) -> None:
    assert box.register(device="cpu").status_code == 200
    lease = hold(3 * GIB)

    def tell(free_bytes: int | None, **more: object) -> None:
        def write(session) -> None:
            worker = session.exec(select(WorkerRow)).one()
            worker.disk_free_bytes = free_bytes
            for name, value in more.items():
                setattr(worker, name, value)
            session.add(worker)

        box.run(box.server.db.write(write))

    assert look(box, 2**60) == []
    tell(2 * GIB)
    assert look(box, 2**60) == []
    tell(4 * GIB)
    assert look(box, 0) == [lease.job_id]


def test_a_busy_worker_with_a_disk_of_its_own_tells_of_its_space_by_heartbeats(box, hold) -> None:
    """It does not claim, so that its last claim may be hours old."""
    box.register(gpus=2)
    waiting = hold(3 * GIB)
    box.submit()
    running = box.claim(disk_free_bytes=2 * GIB)
    running.post("heartbeat", started=True)
    assert look(box, 2**60) == []

    running.post("heartbeat", started=True, disk_free_bytes=4 * GIB)

    assert look(box, 0) == [waiting.job_id]


def test_a_worker_that_is_gone_holds_nobody_up(box, hold) -> None:
    hello = {"worker_id": "w1", "boot_id": "b1", "gpus": 1, "device": "cpu", "protocol": 2}
    box.worker.post("/worker/register", json=hello)
    lease = hold(3 * GIB)

    def bury(session) -> None:
        worker = session.exec(select(WorkerRow)).one()
        worker.gone_at = box.clock.now()
        session.add(worker)

    box.run(box.server.db.write(bury))

    assert look(box, 3 * GIB) == [lease.job_id]


def test_the_server_looks_for_space_by_itself(box, hold) -> None:
    free = shutil.disk_usage(box.server.settings.data).free
    small, huge = hold(free // 100), hold(2**60)

    box.reap()

    assert box.state(small.job_id) == "queued"
    assert box.state(huge.job_id) == "paused"
