"""Who goes next, on which worker, and what a waiting job is told."""

import pytest

from sftd.spec import RequiresSpec
from sftd_server.jobs import scheduling
from sftd_server.jobs.scheduling import Place


def order(box) -> list[str]:
    jobs = box.admin.get("/jobs?state=queued&limit=100").json()["data"]
    return [job["id"] for job in sorted(jobs, key=lambda job: job["queue_position"])]


def why(box, job_id: str) -> str:
    return str(box.job(job_id)["why_waiting"])


# ---------------------------------------------------------------- fair share


def test_short_jobs_go_before_long_ones_until_those_have_waited_as_much_longer(box) -> None:
    long, short = box.submit(max_steps=1000), box.submit(max_steps=10)
    assert order(box) == [short, long]

    box.clock.advance(900)
    new = box.submit(max_steps=10)
    assert order(box) == [short, new, long]
    box.clock.advance(100)
    newer = box.submit(max_steps=10)
    assert order(box) == [short, long, new, newer] or order(box) == [short, new, long, newer]
    box.clock.advance(3600)
    newest = box.submit(max_steps=10)
    assert order(box)[-1] == newest
    assert order(box).index(long) < order(box).index(newest)


def test_who_has_used_less_of_late_goes_first_and_usage_fades(make_box) -> None:
    box = make_box(fair_share_half_life_seconds=3600)
    ann, bob = box.key("ann"), box.key("bob")
    ann.post("/jobs", json=box.spec())
    lease = box.claim()
    lease.start()
    box.clock.advance(1000)

    def post(client) -> str:
        return str(client.post("/jobs", json=box.spec()).json()["id"])

    a, b = post(ann), post(bob)
    assert order(box) == [b, a]  # what runs counts too
    lease.start()
    assert "bob" in why(box, a)
    lease.finish()
    assert order(box) == [b, a]
    for job_id in (a, b):
        box.admin.post(f"/jobs/{job_id}/cancel")
    box.clock.advance(20 * 3600)
    a, b = post(ann), post(bob)
    assert order(box) == [a, b]  # as good as forgotten: the older one


def test_without_fair_share_the_queue_goes_by_age(make_box) -> None:
    box = make_box(fair_share=False)
    long, short = box.submit(max_steps=1000), box.submit(max_steps=10)

    assert order(box) == [long, short]
    assert box.claim().job_id == long


def test_what_a_job_takes_is_learned_from_those_of_its_kind(box) -> None:
    lease = box.running(max_steps=10)
    lease.event(0, "run", total_steps=10, start_step=-1)
    box.clock.advance(1000)
    lease.finish()

    known = box.submit(max_steps=10)
    other = box.submit(max_steps=500, base_model="org/other")

    assert order(box) == [other, known]  # 500 s against 1000 s


def test_a_lost_job_keeps_its_turn_and_a_resumed_one_waits_anew(box) -> None:
    lease = box.running()
    box.clock.advance(10)
    others = [box.submit(), box.submit()]
    box.expire()
    assert order(box) == [lease.job_id, *others]

    for verb in ("pause", "resume"):
        box.clock.advance(1)
        box.admin.post(f"/jobs/{lease.job_id}/{verb}")
    assert order(box) == [*others, lease.job_id]


# ---------------------------------------------------------------- requirements


@pytest.mark.parametrize(
    ("requires", "fits"),
    [
        ({}, True),
        ({"gpu_memory_gb": 24}, True),
        ({"gpu_memory_gb": 24.5}, False),
        ({"label": "site"}, True),
        ({"label": "site=berlin"}, True),
        ({"label": "site=rome"}, False),
        ({"label": ["site=berlin", "fast"]}, False),
        ({"worker": "w1"}, True),
        ({"worker": "w2"}, False),
    ],
)
def test_a_worker_has_what_a_job_requires_or_not(requires: dict, fits: bool) -> None:
    place = Place("w1", "b", 2, 2, 2, 24.0, {"site": "berlin"})

    assert scheduling.has(place, RequiresSpec.model_validate(requires)) is fits


def test_a_job_goes_to_a_worker_that_has_what_it_requires(box) -> None:
    box.register("small", gpu_memory_gb=16, labels={"site": "berlin"})
    box.register("big", gpu_memory_gb=80)
    picky = box.submit(requires={"gpu_memory_gb": 40})
    plain = box.submit()

    assert box.claim("small").job_id == plain
    assert box.try_claim("small").status_code == 204
    assert box.claim("big").job_id == picky


def test_a_job_far_down_the_queue_is_found(box) -> None:
    box.register("w1")
    for _ in range(40):
        box.submit(requires={"worker": "other"}, priority=1)
    mine = box.submit()

    assert box.claim().job_id == mine


def test_a_job_that_needs_disk_waits_for_a_worker_that_has_it(box) -> None:
    from sqlmodel import update

    from sftd_server.tables import JobRow

    box.register()
    job_id = box.submit()
    box.run(box.server.db.write(lambda session: session.exec(update(JobRow).values(needs_disk_bytes=100))))

    assert box.try_claim(disk_free_bytes=99).status_code == 204
    assert "GiB of free disk on worker w1" in why(box, job_id)
    assert box.claim(disk_free_bytes=100).job_id == job_id


# ---------------------------------------------------------------- several slots


def test_after_a_time_slots_are_kept_for_a_job_that_needs_several(box) -> None:
    box.register("w1", gpus=2)
    box.register("w2", gpus=1)
    first = box.submit()
    held = box.claim("w1", gpus=2)
    assert held.job_id == first
    held.start()
    big = box.submit(gpus=2, max_steps=10)
    small = [box.submit(), box.submit()]

    assert box.claim("w1", gpus=1).job_id == small[0]  # it has not waited long
    box.clock.advance(601)
    held.start()
    box.register("w1", gpus=2)
    box.register("w2", gpus=1)
    box.admin.post(f"/jobs/{small[0]}/cancel")
    box.reap()

    assert box.try_claim("w1", gpus=1).status_code == 204
    assert "Worker w1 keeps its free slots for it" in why(box, big)
    assert box.claim("w2").job_id == small[1]
    urgent = box.submit(priority=1)
    assert box.claim("w1", gpus=1).job_id == urgent


# ---------------------------------------------------------------- why


def test_why_a_job_waits_is_told_in_words(box) -> None:
    job_id = box.submit(gpus=2, requires={"gpu_memory_gb": 40})
    assert why(box, job_id) == "Needs 2 GPUs with 40 GiB: no worker has registered."

    box.register("w1", gpus=1, gpu_memory_gb=24)
    expected = "Needs 2 GPUs with 40 GiB: no registered worker has that (largest: w1 with 1 GPU of 24 GiB)."
    assert why(box, job_id) == expected
    posted = box.admin.post("/jobs", json=box.spec(requires={"label": "moon"})).json()
    assert "1 GPU and the label moon: no registered worker has that" in posted["why_waiting"]

    plain = box.submit()
    assert why(box, plain) == "A worker is about to take it."
    running = box.claim()
    assert running.job_id == plain
    assert box.job(plain)["why_waiting"] is None
    low, high = box.submit(), box.submit(priority=3)
    assert "Worker w1, the only one that can run it, is busy." in why(box, high)
    assert "of higher priority" in why(box, low)
    waits = box.submit(after=[plain])
    assert why(box, waits) == f"Waits for {plain} (claimed)."
    running.start()
    running.event(0, "run", total_steps=10, start_step=-1)
    running.metrics(0, (4, {"loss": 1.0}))
    assert why(box, waits) == f"Waits for {plain} (running, 40%)."

    box.admin.post("/workers/w1/drain")
    assert "Worker w1 could run it, but drains" in why(box, low)
    box.clock.advance(91)
    assert "was not heard of lately" in why(box, low)


def test_a_backoff_is_told(make_box) -> None:
    box = make_box(max_failures=2, backoff_seconds=60)
    box.register()
    lease = box.running()
    lease.finish("failed", reason="trainer_died")

    assert "Is tried again in" in why(box, lease.job_id)


def test_fair_share_is_told(box) -> None:
    box.register("w1")
    ann, bob = box.key("ann"), box.key("bob")
    ann.post("/jobs", json=box.spec())
    lease = box.claim()
    lease.start()
    box.clock.advance(80)
    lease.start()
    a = ann.post("/jobs", json=box.spec()).json()["id"]
    bob.post("/jobs", json=box.spec())

    assert "bob used less GPU time lately than ann" in why(box, a)
    (listed,) = (j for j in box.admin.get("/jobs").json()["data"] if j["id"] == a)
    assert listed["why_waiting"] == "Worker w1, the only one that can run it, is busy."


# ---------------------------------------------------------------- draining


def test_a_draining_worker_takes_no_job_and_is_asked_to_give_its_own_back(box, assert_error) -> None:
    box.register()
    box.submit()
    lease = box.claim(protocol=2)
    lease.start()
    waiting = box.submit()

    assert_error(box.key("u").post("/workers/w1/drain"), 403, "admin_only")
    (worker,) = box.admin.post("/workers/w1/drain").json()["data"]
    assert worker["draining"] is True
    assert lease.post("heartbeat", started=True).json()["draining"] is True
    assert lease.post("release", message="drains", reason="stopping").status_code == 200
    assert box.try_claim().status_code == 204
    box.register(boot_id="b2")  # it is started again, and drains on
    assert box.try_claim(boot_id="b2").status_code == 204

    box.admin.post("/workers/w1/undrain")
    assert [box.claim().job_id, box.claim(boot_id="b2").job_id] == [lease.job_id, waiting]


def test_a_held_heartbeat_hears_of_a_drain_at_once(box) -> None:
    import threading

    box.register()
    box.submit()
    lease = box.claim(protocol=2)
    lease.start()
    answers = []
    held = threading.Thread(
        target=lambda: answers.append(lease.post("heartbeat", started=True, wait_seconds=10))
    )
    held.start()

    box.admin.post("/workers/w1/drain")
    held.join(5)

    assert answers[0].json()["draining"] is True


def test_processes_are_listed_newest_first_and_forgotten_after_a_day(box) -> None:
    box.register(boot_id="b1")
    box.clock.advance(95)
    box.register(boot_id="b2")

    def listed() -> list[tuple]:
        workers = box.admin.get("/workers").json()["data"]
        return [(worker["boot_id"], worker["alive"]) for worker in workers]

    assert listed() == [("b2", True), ("b1", False)]
    box.clock.advance(86400 - 90)
    box.reap()
    assert listed() == [("b2", False)]
