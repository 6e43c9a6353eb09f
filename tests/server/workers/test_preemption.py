"""Making room: who is asked, what becomes of it, and that nobody takes turns."""

import pytest


@pytest.fixture
def by_priority(make_box):
    box = make_box(preemption="priority")
    box.register("w1", gpus=2)
    return box


def start(box, worker_id: str = "w1", **fields):
    """A job of a worker that knows how to make room."""
    fields.setdefault("protocol", 2)
    lease = box.claim(worker_id, **fields)
    lease.start()
    return lease


def look(box, *leases, seconds: float = 0) -> None:
    """Let time pass in which the leases are kept, and look."""
    while seconds > 0:
        box.clock.advance(min(20, seconds))
        seconds -= 20
        for lease in leases:
            lease.post("heartbeat", started=True, step=0)
    box.reap()


def told(lease) -> dict:
    return lease.post("heartbeat", started=True).json()


def test_a_job_of_higher_priority_takes_the_place_of_the_one_that_began_last(by_priority) -> None:
    box = by_priority
    box.submit()
    first = start(box, gpus=2)
    box.clock.advance(5)
    box.submit()
    last = start(box, gpus=1)
    look(box, first, last, seconds=70)
    urgent = box.submit(priority=5)
    bystander = box.submit()
    look(box, first, last)
    assert told(last)["make_room"] is False  # not before the grace

    look(box, first, last, seconds=40)

    assert (told(first)["make_room"], told(last)["make_room"]) == (False, True)
    assert box.events(last.job_id)[-2:] == ["preempting", "stopping"]
    assert f"{last.job_id} makes room for it" in box.job(urgent)["why_waiting"]
    last.checkpoint(7)
    look(box, first, last, seconds=40)  # no second victim meanwhile
    assert told(first)["make_room"] is False
    assert last.post("release", message="made room", reason="preempted").status_code == 200
    assert last.post("release", message="made room", reason="preempted").status_code == 200
    job = box.job(last.job_id)
    assert (job["state"], job["queue_position"]) == ("queued", 3)
    attempt = box.admin.get(f"/jobs/{last.job_id}/attempts").json()["data"][0]
    assert (attempt["outcome"], attempt["reason"]) == ("preempted", "preempted")
    assert box.events(last.job_id)[-1] == "preempted"
    assert [box.claim(protocol=2).job_id, box.claim(protocol=2).job_id] == [urgent, bystander]
    back = box.claim(protocol=2)
    assert (back.job_id, back.answer["checkpoints"][0]["step"]) == (last.job_id, 7)


@pytest.mark.parametrize("policy", ["off", "priority", "fair_share"])
def test_jobs_of_equal_priority_of_one_owner_never_take_turns(make_box, policy: str) -> None:
    box = make_box(preemption=policy)
    box.register("w1", gpus=1)
    box.submit()
    lease = start(box)
    box.submit()

    look(box, lease, seconds=5000)

    assert told(lease)["make_room"] is False


def test_no_one_is_asked_where_a_worker_is_free(by_priority) -> None:
    box = by_priority
    box.submit()
    lease = start(box, gpus=2)
    box.submit(priority=5)

    look(box, lease, seconds=200)

    assert told(lease)["make_room"] is False


def test_two_small_ones_make_room_for_a_big_one_and_nobody_slips_in(by_priority) -> None:
    box = by_priority
    box.submit(), box.submit()
    one, two = start(box, gpus=2), start(box, gpus=1)
    big = box.submit(gpus=2, priority=1)
    small = box.submit()
    look(box, one, two, seconds=100)
    assert told(one)["make_room"] is told(two)["make_room"] is True

    one.post("release", message="x", reason="preempted")
    assert box.try_claim(gpus=1, protocol=2).status_code == 204  # kept for the big one
    two.post("release", message="x", reason="preempted")

    assert box.claim(gpus=2, protocol=2).job_id == big
    assert box.state(small) == "queued"


def test_one_big_victim_is_fewer_than_two_small_ones(make_box) -> None:
    box = make_box(preemption="priority")
    box.register("w1", gpus=2)
    box.register("w2", gpus=2)
    box.submit(gpus=2)
    whole = start(box, "w1", gpus=2)
    box.submit(), box.submit()
    parts = [start(box, "w2", gpus=2), start(box, "w2", gpus=1)]
    box.submit(gpus=2, priority=1)
    look(box, whole, *parts, seconds=100)

    assert [told(lease)["make_room"] for lease in (whole, *parts)] == [True, False, False]


@pytest.mark.sqlite  # elsewhere it is not served
def test_a_worker_of_the_earlier_version_is_never_asked(by_priority) -> None:
    box = by_priority
    box.submit(gpus=2)
    lease = start(box, gpus=2, protocol=1)
    box.submit(priority=5)

    look(box, lease, seconds=200)

    assert "make_room" not in told(lease)
    assert box.state(lease.job_id) == "running"
    assert "preempting" not in box.events(lease.job_id)


def test_a_wish_is_called_off_when_the_job_does_not_wait_any_more(by_priority) -> None:
    box = by_priority
    box.submit(gpus=2)
    lease = start(box, gpus=2)
    urgent = box.submit(priority=5)
    look(box, lease, seconds=80)
    assert "preempting" in box.events(lease.job_id)
    assert box.state(lease.job_id) in ("running", "stopping")
    box.admin.post(f"/jobs/{urgent}/cancel")

    look(box)

    if box.state(lease.job_id) == "running":
        assert told(lease)["make_room"] is False


def test_a_pause_or_cancel_goes_before_making_room(by_priority) -> None:
    box = by_priority
    box.submit(gpus=2)
    lease = start(box, gpus=2)
    box.submit(priority=5)
    look(box, lease, seconds=80)
    box.admin.post(f"/jobs/{lease.job_id}/cancel")

    answer = told(lease)
    assert (answer["want"], answer["make_room"]) == ("cancel", False)
    lease.finish("cancelled")
    assert box.state(lease.job_id) == "cancelled"


def test_by_fair_share_a_far_over_served_owner_yields_and_does_not_take_the_place_back(make_box) -> None:
    box = make_box(preemption="fair_share")
    box.register("w1", gpus=1)
    ann, bob = box.key("ann"), box.key("bob")
    ann.post("/jobs", json=box.spec())
    lease = start(box)
    hers = bob.post("/jobs", json=box.spec()).json()["id"]
    look(box, lease, seconds=600)
    assert told(lease)["make_room"] is False
    look(box, lease, seconds=3300)
    assert told(lease)["make_room"] is True
    lease.post("release", message="x", reason="preempted")
    other = start(box)
    assert other.job_id == hers

    look(box, other, seconds=3000)

    assert told(other)["make_room"] is False
