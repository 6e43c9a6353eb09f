"""A call that is made again makes no second job: OpenAI's clients mark their retries, others send an Idempotency-Key."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from sftd_server.jobs import service
from sftd_server.jobs.service import Submission, Try

JOBS = "/v1/fine_tuning/jobs"


def create(box, *, count: int | None = None, key: str | None = None, client=None, **fields) -> str:
    headers = {} if count is None else {"x-stainless-retry-count": str(count)}
    headers |= {} if key is None else {"idempotency-key": key}
    body = {"model": "org/model", "training_file": box.spec()["training_file"], **fields}
    answer = (client or box.admin).post(JOBS, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def test_a_retry_of_the_same_call_brings_the_same_job(box) -> None:
    first = create(box, count=0)

    assert create(box, count=1) == create(box, count=2) == first
    assert create(box, count=1, suffix="other") != first
    assert create(box, count=1, client=box.key("ci")) != first


def test_retries_after_the_ten_minutes_that_openais_clients_wait_for_an_answer_bring_the_same_job(
    box,
) -> None:
    first = create(box, count=0)

    for count in (1, 2):
        box.clock.advance(600 + 60)  # an answer that never came, and the longest pause
        assert create(box, count=count) == first
    box.clock.advance(3600 - 2 * 660)
    assert create(box, count=1) != first


@pytest.mark.parametrize("state", ["cancelled", "running"])
def test_a_retry_is_not_answered_with_a_job_that_was_cancelled_since(box, state: str) -> None:
    dead = create(box, count=0)
    if state == "running":
        box.claim().start()
    box.admin.post(f"{JOBS}/{dead}/cancel")
    assert box.state(dead) == state

    anew = create(box, count=1)  # the first try of this call got an error

    assert anew != dead
    assert create(box, count=2) == anew


def test_the_same_body_posted_twice_on_purpose_makes_two_jobs(box) -> None:
    ids = [create(box, count=0), create(box, count=0), create(box), create(box)]

    assert len(set(ids)) == 4
    assert create(box, count=1) == ids[-1]


def test_a_retry_whose_first_try_never_came_makes_the_job_once(box) -> None:
    retried = create(box, count=1)
    box.clock.advance(1)

    assert create(box, count=2) == retried
    assert create(box, count=0) != retried  # it has come later: another call


def test_a_first_try_that_its_retry_has_overtaken_brings_the_same_job(box) -> None:
    job_id = create(box, count=0)
    arrived_at = box.clock.now()
    box.clock.advance(5)
    row = box.run(box.server.db.read(lambda session: service.find_job(session, job_id)))
    spec = service.JobSpec.model_validate_json(row.spec)
    inputs = service.JobInputs.model_validate(row.inputs)

    def submit(is_retry: bool) -> str:
        one = Try(is_retry=is_retry, arrived_at=arrived_at)
        made = Submission(spec, inputs, "admin", None, "another body", one_of_tries=one)
        now = box.clock.now()
        return box.run(box.server.db.write(lambda session: service.submit(session, made, now)))

    assert submit(True) == submit(False)


def test_two_tries_at_once_make_one_job(box) -> None:
    create(box)
    with ThreadPoolExecutor(8) as pool:
        for i in range(4):
            ids = set(pool.map(lambda count, i=i: create(box, count=count, suffix=f"s{i}"), [0, 1, 2, 1]))
            assert len(ids) == 1


@pytest.mark.parametrize("surface", ["/jobs", JOBS])
def test_a_key_brings_the_same_job_for_a_day_and_may_be_used_anew_then(
    box, assert_error, surface: str
) -> None:
    name = {"/jobs": "base_model", JOBS: "model"}[surface]
    body = {name: "org/model", "training_file": box.spec()["training_file"]}
    headers = {"Idempotency-Key": "k"}

    def post(**fields):
        return box.admin.post(surface, json={**body, **fields}, headers=headers)

    first = post().json()["id"]
    box.clock.advance(timedelta(hours=24).total_seconds() - 1)
    assert post().json()["id"] == first
    other = post(seed=1)
    assert_error(other, 422 if surface == "/jobs" else 400, "idempotency_key_reused")
    assert other.headers.get("x-should-retry", "false") == "false"

    box.clock.advance(1)
    second = post(seed=1).json()["id"]
    assert second != first
    assert post(seed=1).json()["id"] == second
    assert box.state(first) == "queued"
