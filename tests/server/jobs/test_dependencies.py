"""Jobs that wait for others."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlmodel import delete, select

from sftd.schemas import REMEDIES
from sftd_server.auth import Caller
from sftd_server.jobs import changes, service
from sftd_server.tables import DependencyRow, JobRow

ADMIN = Caller(key_id="k", name="admin", role="admin")
SEVERAL_SERVERS = pytest.mark.parametrize("database", ["postgres"], indirect=True, scope="module")


def mistakes(answer) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in answer.json()["error"]["message"].split("\n"))


def execute(box, statement) -> None:
    def write(session) -> None:
        session.exec(statement)

    box.run(box.server.db.write(write))


def test_a_job_waits_until_all_it_needs_have_succeeded(box) -> None:
    first, second = box.running(), box.running()
    waiting = box.submit(after=[first.job_id, second.job_id], priority=9)

    assert box.try_claim().status_code == 204
    first.finish()
    assert box.try_claim().status_code == 204
    assert second.job_id in box.job(waiting)["why_waiting"]
    second.finish()

    assert box.claim().job_id == waiting


def test_a_held_claim_hears_that_the_last_needed_job_is_done(box) -> None:
    first = box.running()
    waiting = box.submit(after=[first.job_id])
    answers = []
    asking = threading.Thread(target=lambda: answers.append(box.try_claim("w2", wait_seconds=10)))
    asking.start()

    first.finish()
    asking.join(5)

    assert answers[0].json()["job_id"] == waiting


def test_mistakes_of_after_come_with_all_the_others(box) -> None:
    failed = box.running()
    failed.finish("failed")
    fine = box.submit()

    answer = box.admin.post(
        "/jobs", json=box.spec(after=[fine, "job_nope", failed.job_id, fine], base_model="job:job_x")
    )

    found = mistakes(answer)
    assert answer.json()["error"]["code"] == "invalid_spec"
    assert "there is no job 'job_nope'" in found["after[1]"]
    assert "has failed; retry it" in found["after[2]"]
    assert "twice" in found["after[3]"]
    assert "there is no job 'job_x'" in found["base_model"]


def test_a_failure_takes_along_all_that_wait_for_it(box) -> None:
    first = box.running()
    second = box.submit(after=[first.job_id])
    third = box.submit(after=[second])
    aside = box.submit(after=[first.job_id])
    box.admin.post(f"/jobs/{aside}/pause")
    other = box.submit()

    first.finish("failed")

    for job_id, needed in ((second, first.job_id), (third, second)):
        job = box.job(job_id)
        assert (job["state"], job["failure"]["reason"]) == ("failed", "dependency_failed")
        assert needed in job["failure"]["message"]
        assert job["failure"]["remedy"] == REMEDIES["dependency_failed"]
        assert box.events(job_id)[-1] == "failed"
    assert (box.state(aside), box.state(other)) == ("paused", "queued")

    box.admin.post(f"/jobs/{aside}/resume")
    assert box.job(aside)["failure"]["reason"] == "dependency_failed"


def test_a_cancelled_job_takes_along_a_chain_longer_than_python_recurses(box) -> None:
    first = box.submit()
    length = sys.getrecursionlimit() + 100

    def lengthen(session) -> None:
        row = session.exec(select(JobRow)).one()
        fields = row.model_dump(exclude={"number", "id"})
        session.add_all(JobRow(**fields, number=row.number + i, id=f"job_{i}") for i in range(1, length))
        session.flush()
        session.add_all(DependencyRow(job=row.number + i, needs=row.number + i - 1) for i in range(1, length))

    box.run(box.server.db.write(lengthen))

    box.admin.post(f"/jobs/{first}/cancel")

    assert box.job(f"job_{length - 1}")["failure"]["reason"] == "dependency_failed"


def test_the_result_of_a_job_that_is_still_to_run_can_be_the_base(box) -> None:
    first = box.submit(method="lora", lora={"rank": 4})
    reference = f"job:{first}"
    refused = box.admin.post("/jobs", json=box.spec(base_model=reference, lora={"rank": 4}))
    assert "name it in after" in mistakes(refused)["base_model"]
    other = box.admin.post("/jobs", json=box.spec(base_model=reference, after=[first], lora={"rank": 8}))
    assert '"rank":4' in mistakes(other)["lora"]
    second = box.submit(base_model=reference, after=[first], lora={"rank": 4})
    third = box.submit(base_model=f"job:{second}", after=[second], lora={"rank": 4})

    for expected, base in ((first, None), (second, first), (third, second)):
        lease = box.claim()
        assert lease.job_id == expected
        path = {"path": f"jobs/{base}/results", "is_adapter": True, "base_model": "org/model"}
        assert lease.answer["base"] == (path if base else None)
        lease.start()
        lease.finish()


def test_a_retry_waits_for_the_retry_of_what_failed(box) -> None:
    first = box.running()
    second = box.submit(after=[first.job_id])
    first.finish("failed")
    refused = box.admin.post(f"/jobs/{second}/retry")
    assert f"{first.job_id} has failed; retry it" in refused.text
    again = box.admin.post(f"/jobs/{first.job_id}/retry").json()["id"]

    job = box.admin.post(f"/jobs/{second}/retry").json()

    assert job["after"] == [again]


def test_what_a_job_waits_for_can_change_while_it_is_queued_but_not_to_a_circle(box, assert_error) -> None:
    first = box.submit()
    second = box.submit(after=[first])
    third = box.submit(after=[second])

    error = assert_error(box.admin.patch(f"/jobs/{first}", json={"after": [third]}), 422, "invalid_spec")
    assert "waits for" in error["message"]
    assert box.admin.patch(f"/jobs/{third}", json={"after": [first]}).json()["after"] == [first]
    assert box.admin.patch(f"/jobs/{second}", json={"after": None}).json()["after"] == []
    assert box.claim().job_id in (first, second)


@pytest.mark.parametrize("paused", [1, 2])
def test_a_circle_through_a_paused_job_is_none_that_is_accepted(box, assert_error, paused: int) -> None:
    jobs = [box.submit()]
    for _ in range(2):
        jobs.append(box.submit(after=[jobs[-1]]))
    box.admin.post(f"/jobs/{jobs[paused]}/pause")

    error = assert_error(box.admin.patch(f"/jobs/{jobs[0]}", json={"after": [jobs[2]]}), 422, "invalid_spec")

    assert f"{jobs[2]} waits for {jobs[0]} itself" in error["message"]
    assert box.job(jobs[0])["after"] == []


def test_the_job_that_makes_the_base_stays_in_after_until_it_is_done(box, assert_error) -> None:
    first = box.running(lora={"rank": 4})
    second = box.submit(base_model=f"job:{first.job_id}", after=[first.job_id], lora={"rank": 4})

    error = assert_error(box.admin.patch(f"/jobs/{second}", json={"after": []}), 422, "invalid_spec")
    assert error["param"] == "after"
    assert f"the result of {first.job_id} is the base of {second}" in error["message"]
    assert box.job(second)["after"] == [first.job_id]

    first.finish()
    assert box.admin.patch(f"/jobs/{second}", json={"after": []}).json()["after"] == []
    path = f"jobs/{first.job_id}/results"
    assert box.claim().answer["base"] == {"path": path, "is_adapter": True, "base_model": "org/model"}


@pytest.mark.parametrize("end", ["succeeded", "failed", None])
def test_a_job_whose_base_is_still_being_made_is_not_handed_out(box, end: str | None) -> None:
    first = box.running(lora={"rank": 4})
    second = box.submit(base_model=f"job:{first.job_id}", after=[first.job_id], lora={"rank": 4})
    third = box.submit(after=[second])
    other = box.submit(priority=-1)
    # As an earlier version left it, where `after` was emptied.
    execute(box, delete(DependencyRow).where(DependencyRow.job == 2))
    if end is None:
        execute(box, delete(JobRow).where(JobRow.id == first.job_id))
    elif end == "failed":
        first.finish("failed")

    assert box.claim("w2").job_id == other

    if end == "succeeded":
        assert first.job_id in box.job(second)["why_waiting"]
        first.finish()
        assert box.claim("w3").job_id == second
    else:
        assert box.job(second)["failure"]["reason"] == "dependency_failed"
        assert box.job(third)["failure"]["reason"] == "dependency_failed"


@SEVERAL_SERVERS
def test_a_job_resumed_at_the_moment_that_what_it_needs_ends_does_not_wait_for_ever(make_box) -> None:
    here, there = make_box(), make_box()
    first = here.submit()
    second = here.submit(after=[first])
    third = here.submit(after=[second])
    here.admin.post(f"/jobs/{second}/pause")

    def cancel(session) -> None:
        service.cancel(session, first, ADMIN, there.clock.now())

    with ThreadPoolExecutor(1) as pool:
        with there.in_open_write(cancel):
            resuming = pool.submit(here.admin.post, f"/jobs/{second}/resume")
            with pytest.raises(TimeoutError):
                resuming.result(0.3)  # it waits for what the other server decides
        assert resuming.result(20).status_code == 200

    assert [here.state(job_id) for job_id in (second, third)] == ["failed", "failed"]


@SEVERAL_SERVERS
def test_two_changes_at_once_make_no_circle(make_box) -> None:
    """a after b and c after d, each fine alone, while b waits for c and d for a."""
    here, there = make_box(), make_box()
    a, c = here.submit(), here.submit()
    b, d = here.submit(after=[c]), here.submit(after=[a])
    here.admin.post(f"/jobs/{b}/pause")
    here.admin.post(f"/jobs/{d}/pause")

    def change(session) -> None:
        changes.change(session, a, {"after": [b]}, ADMIN, there.clock.now())

    with ThreadPoolExecutor(1) as pool:
        with there.in_open_write(change):
            changing = pool.submit(here.admin.patch, f"/jobs/{c}", json={"after": [d]})
            with pytest.raises(TimeoutError):
                changing.result(0.3)
        assert changing.result(20).status_code == 422

    assert (here.job(a)["after"], here.job(c)["after"]) == ([b], [])
