"""Limits of keys: what may be posted, what starts, and that jobs held back are in nobody's way."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tests.server.conftest import start_box

HOUR = 3600


@pytest.fixture
def limited(box):
    """A client of a key named `ci` with limits."""

    def make(name: str = "ci", role: str = "user", **limits) -> httpx.Client:
        made = box.admin.post("/keys", json={"name": name, "role": role, **limits})
        assert made.status_code == 200, made.text
        client = box.client(made.json()["secret"])
        client.key_id = made.json()["id"]
        return client

    return make


def post(box, client, **fields) -> str:
    answer = client.post("/jobs", json=box.spec(**fields))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def use_hours(box, client, hours: float) -> None:
    """Let a job of the key hold a GPU for so long and end."""
    post(box, client)
    lease = box.claim()
    lease.start()
    left = hours * HOUR
    while left > 0:  # a silent worker would lose the job
        box.clock.advance(min(left, 1800))
        left -= 1800
        lease.start()
    assert lease.finish().status_code == 200


def test_a_post_over_max_queued_jobs_is_refused_with_the_numbers_and_what_to_do(
    box, limited, assert_error
) -> None:
    ci = limited(max_queued_jobs=2)
    first, second = post(box, ci), post(box, ci)

    answer = ci.post("/jobs", json=box.spec())

    error = assert_error(answer, 429, "limit_reached")
    assert error["message"] == (
        "ci has 2 jobs in the queue, and its key allows 2 (max_queued_jobs). Wait until one has started, cancel one,"
        " or ask an admin to raise that limit."
    )
    assert (error["param"], answer.headers["x-should-retry"]) == ("max_queued_jobs", "false")
    assert_error(ci.post(f"/jobs/{first}/clone", json={}), 429, "limit_reached")
    box.submit()  # of somebody without limits
    ci.post(f"/jobs/{second}/cancel")
    assert ci.post(f"/jobs/{second}/retry").status_code == 200
    assert_error(ci.post(f"/jobs/{second}/retry"), 429, "limit_reached")


def test_resuming_counts_like_posting_and_an_admins_limits_count_too(box, limited, assert_error) -> None:
    boss = limited("boss", role="admin", max_queued_jobs=1)
    job_id = post(box, boss)
    boss.post(f"/jobs/{job_id}/pause")
    other = post(box, boss)

    assert_error(boss.post(f"/jobs/{job_id}/resume"), 429, "limit_reached")
    boss.post(f"/jobs/{other}/pause")
    assert boss.post(f"/jobs/{job_id}/resume").json()["state"] == "queued"
    assert boss.post(f"/jobs/{job_id}/resume").status_code == 200  # it is queued already


def test_the_same_post_again_is_answered_as_before_over_the_limit(box, limited) -> None:
    ci = limited(max_queued_jobs=1)
    spec, once = box.spec(), {"Idempotency-Key": "once"}
    job_id = ci.post("/jobs", json=spec, headers=once).json()["id"]

    assert ci.post("/jobs", json=spec, headers=once).json()["id"] == job_id


def test_posts_at_the_same_time_do_not_pass_the_limit_together(box, limited) -> None:
    ci = limited(max_queued_jobs=3)
    spec = box.spec()

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: ci.post("/jobs", json=spec).status_code, range(12)))

    assert sorted(statuses) == [200] * 3 + [429] * 9


def test_max_running_jobs_keeps_the_next_in_the_queue_until_one_ends_and_holds_up_nobody_else(
    box, limited
) -> None:
    ci = limited(max_running_jobs=1)
    mine = [post(box, ci, priority=5) for _ in range(3)]
    theirs = box.submit()
    lease = box.claim()

    assert lease.job_id == mine[0]
    assert box.job(mine[1])["why_waiting"] == (
        "1 job runs for ci, and its key allows no more (max_running_jobs 1)."
    )
    assert box.job(theirs)["queue_position"] == 1  # those that are held back are not counted before it
    assert box.claim().job_id == theirs
    assert box.try_claim().status_code == 204
    waiting = threading.Thread(target=lambda: found.append(box.claim(wait_seconds=20)))
    found: list = []
    waiting.start()
    lease.start()
    lease.finish()
    waiting.join(10)
    assert [lease.job_id for lease in found] == [mine[1]]  # the end of one wakes who waits for a job


def test_a_raised_limit_counts_at_once(box, limited) -> None:
    ci = limited(max_running_jobs=1)
    for _ in range(3):
        post(box, ci)
    box.claim()
    assert box.try_claim().status_code == 204

    changed = box.admin.patch(f"/keys/{ci.key_id}", json={"max_running_jobs": 2})

    assert changed.json()["max_running_jobs"] == 2
    assert box.try_claim().status_code == 200
    assert box.try_claim().status_code == 204
    box.admin.patch(f"/keys/{ci.key_id}", json={"max_running_jobs": None})
    assert box.try_claim().status_code == 200


def test_posts_and_claims_of_two_servers_do_not_pass_a_limit_together(make_box, tmp_path) -> None:
    box = make_box()
    if not box.server.db.shared:
        pytest.skip("several servers share PostgreSQL only")
    other = start_box(tmp_path / "data", database_url=box.server.settings.database_url)
    try:
        limits = {"max_running_jobs": 1, "max_queued_jobs": 4}
        secret = box.admin.post("/keys", json={"name": "ci", **limits}).json()["secret"]
        other.run(other.server.keyring.load())
        clients, spec = (box.client(secret), other.client(secret)), box.spec()
        with ThreadPoolExecutor(6) as pool:
            answers = pool.map(lambda i: clients[i % 2].post("/jobs", json=spec).status_code, range(8))
            assert sorted(answers) == [200] * 4 + [429] * 4
        names = [f"w{i}" for i in range(6)]
        for name in names:
            box.register(name)

        def take(i: int) -> int:
            at = (box, other)[i % 2]
            claim = {"worker_id": names[i], "boot_id": "b1", "gpus": 1, "wait_seconds": 0, "protocol": 2}
            return at.worker.post("/worker/claim", json={"request_id": f"x{i}", **claim}).status_code

        with ThreadPoolExecutor(6) as pool:
            statuses = list(pool.map(take, range(6)))
    finally:
        other.stop()

    assert sorted(statuses) == [200] + [204] * 5


def test_used_up_gpu_hours_refuse_posts_and_starts_until_the_next_month_and_let_running_jobs_end(
    box, limited, assert_error
) -> None:
    ci = limited(max_gpu_hours_per_month=2)
    use_hours(box, ci, 1.5)
    waiting = post(box, ci, name="waits")
    running = box.claim()
    assert running.job_id == waiting
    running.start()
    later = post(box, ci)
    box.clock.advance(HOUR)

    answer = ci.post("/jobs", json=box.spec())

    error = assert_error(answer, 429, "limit_reached")
    assert error["message"] == (
        "ci has used 2.50 of the 2 GPU-hours of its key in 2030-01 (max_gpu_hours_per_month). Post it again from"
        " 2030-02-01 00:00 UTC on, or ask an admin to raise that limit."
    )
    assert (error["param"], answer.headers["x-should-retry"]) == ("max_gpu_hours_per_month", "false")
    assert box.try_claim("w2").status_code == 204
    assert "2030-02-01 00:00 UTC" in box.job(later)["why_waiting"]
    assert running.finish().status_code == 200
    mine = ci.get("/keys/me").json()
    assert (mine["gpu_hours_this_month"], mine["queued_jobs"], mine["running_jobs"]) == (2.5, 1, 0)
    box.clock.advance(31 * 86400)
    assert ci.get("/keys/me").json()["gpu_hours_this_month"] == 0
    assert box.claim("w2").job_id == later


def test_gpu_hours_count_each_gpu_and_outlive_the_job(box, limited) -> None:
    ci = limited(max_gpu_hours_per_month=100)
    job_id = post(box, ci, gpus=4)
    lease = box.claim(gpus=4)
    lease.start()
    box.clock.advance(HOUR)
    assert ci.get("/keys/me").json()["gpu_hours_this_month"] == 4  # while it runs
    lease.finish()

    assert ci.delete(f"/jobs/{job_id}").status_code == 204

    assert ci.get("/keys/me").json()["gpu_hours_this_month"] == 4


def test_an_attempt_counts_in_the_month_in_which_it_ends(box, limited) -> None:
    ci = limited(max_gpu_hours_per_month=100)
    box.clock.advance(31 * 86400 - HOUR)  # 23:00 on the last of January
    post(box, ci)
    lease = box.claim()
    lease.start()
    box.clock.advance(2 * HOUR)
    lease.start()

    assert ci.get("/keys/me").json()["gpu_hours_this_month"] == 2
    lease.finish()
    mine = ci.get("/keys/me").json()
    assert (mine["gpu_hours_this_month"], mine["month_ends_at"]) == (2, "2030-03-01T00:00:00Z")


def test_no_slots_are_kept_and_nobody_makes_room_for_a_job_that_is_held_back(make_box) -> None:
    box = make_box(preemption="priority", reserve_seconds=60, preempt_after_seconds=0)
    made = box.admin.post("/keys", json={"name": "ci", "max_running_jobs": 1}).json()
    ci = box.client(made["secret"])
    box.register("w1", gpus=3)
    post(box, ci, gpus=1)
    own = box.claim(gpus=3)
    own.start()
    box.submit()
    victim = box.claim(gpus=2)
    victim.start()
    held = post(box, ci, gpus=2, priority=9)
    for _ in range(6):
        box.clock.advance(20)
        own.start()
        victim.start()
        box.reap()
    small = box.submit()

    assert victim.post("heartbeat", started=True).json()["make_room"] is False
    assert "max_running_jobs" in box.job(held)["why_waiting"]
    assert box.claim(gpus=1).job_id == small


def test_room_is_made_for_as_many_jobs_as_the_owner_may_still_start(make_box) -> None:
    box = make_box(preemption="priority", preempt_after_seconds=0)
    made = box.admin.post("/keys", json={"name": "ci", "max_running_jobs": 1}).json()
    ci = box.client(made["secret"])
    box.register("w1", gpus=2)
    victims = []
    for free in (2, 1):
        box.submit()
        victims.append(box.claim(gpus=free))
        victims[-1].start()
    box.clock.advance(20)
    for _ in range(5):
        for victim in victims:
            victim.start()
        box.clock.advance(20)
    for _ in range(2):
        post(box, ci, priority=9)
    for _ in range(2):
        for victim in victims:
            victim.start()
        box.clock.advance(5)
        box.reap()

    told = [victim.post("heartbeat", started=True).json()["make_room"] for victim in victims]

    assert sorted(told) == [False, True]


def test_without_its_key_nothing_limits_an_owner_and_a_new_key_of_the_name_takes_its_hours_over(
    box, limited
) -> None:
    ci = limited(max_running_jobs=1)
    use_hours(box, ci, 1)
    for _ in range(2):
        post(box, ci)
    box.claim()
    assert box.try_claim().status_code == 204

    box.admin.delete(f"/keys/{ci.key_id}")

    assert box.try_claim().status_code == 200
    again = limited(max_gpu_hours_per_month=1)
    assert again.get("/keys/me").json()["gpu_hours_this_month"] == 1
    assert again.post("/jobs", content=json.dumps(box.spec())).status_code == 429
