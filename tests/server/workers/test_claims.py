"""Claiming: each job once, the same answer to the same request."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sftd.protocol import Lease


def test_eight_claimers_get_one_job_once(box) -> None:
    box.submit()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: box.try_claim(f"w{i}", f"request-{i}"), range(8)))

    assert sorted(answer.status_code for answer in answers) == [200] + [204] * 7


def test_every_one_of_many_jobs_is_claimed_exactly_once(box) -> None:
    ids = {box.submit() for _ in range(20)}

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: box.try_claim(f"w{i}", f"request-{i}"), range(24)))

    claimed = [answer.json()["job_id"] for answer in answers if answer.status_code == 200]
    assert sorted(claimed) == sorted(ids)


def test_the_answer_is_a_lease(box) -> None:
    box.submit()

    lease = Lease.model_validate(box.claim().answer)

    assert (lease.attempt, lease.lease_seconds, lease.checkpoints) == (1, 30, [])
    assert lease.next_seq == {"metrics": 0, "logs": 0, "events": 0}
    assert (box.server.folder.path / lease.training_file.path).is_file()


def test_a_repeated_request_brings_the_same_lease_while_the_job_is_claimed(box, assert_error) -> None:
    box.submit()
    lease = box.claim(request_id="again")

    assert box.try_claim(request_id="again").json() == lease.answer
    lease.start()
    assert_error(box.try_claim(request_id="again"), 409, "claim_over")
    assert box.try_claim("another", request_id="again").status_code == 204


def test_a_repeated_request_after_the_job_was_taken_back_is_refused(box, assert_error) -> None:
    box.submit()
    box.claim(request_id="lost")
    box.clock.advance(40)
    box.reap()

    assert_error(box.try_claim(request_id="lost"), 409, "claim_over")
    assert box.claim(request_id="fresh").attempt == 2


def test_a_waiting_claim_gets_a_job_that_is_posted_meanwhile(box) -> None:
    spec, answers = box.spec(), []
    waiting = threading.Thread(target=lambda: answers.append(box.try_claim(wait_seconds=10)))
    waiting.start()

    box.submit(**spec)
    waiting.join(5)

    assert answers[0].status_code == 200


def test_jobs_that_do_not_fit_are_left_to_others(box) -> None:
    big, small = box.submit(gpus=4), box.submit()

    assert box.claim().job_id == small
    assert box.try_claim().status_code == 204
    assert box.claim(gpus=4).job_id == big


def test_a_worker_that_sees_another_data_folder_is_refused(box, assert_error) -> None:
    hello = {"worker_id": "w1", "boot_id": "b", "gpus": 1, "device": "cpu", "protocol": 2}
    welcome = box.worker.post("/worker/register", json=hello)
    known = welcome.json()["installation_id"]

    assert box.worker.post("/worker/register", json={**hello, "installation_id": known}).status_code == 200
    other = box.worker.post("/worker/register", json={**hello, "installation_id": "inst_other"})
    assert "--data" in assert_error(other, 409, "other_installation")["message"]
    assert [worker["id"] for worker in box.admin.get("/workers").json()["data"]] == ["w1"]


def test_a_worker_is_listed_with_the_jobs_it_holds(box) -> None:
    hello = {"worker_id": "w1", "boot_id": "b1", "gpus": 2, "device": "cuda", "protocol": 2}
    box.worker.post("/worker/register", json=hello)
    lease = box.running()

    assert box.admin.get("/workers").json()["data"][0]["job_ids"] == [lease.job_id]
    lease.finish()
    assert box.admin.get("/workers").json()["data"][0]["job_ids"] == []


@pytest.mark.sqlite
def test_no_token_is_stored_or_shown(box) -> None:
    lease = box.running()

    box.run(box.server.db.read(lambda session: None))
    stored = b"".join(path.read_bytes() for path in box.server.folder.path.glob("sftd.db*"))
    shown = box.admin.get(f"/jobs/{lease.job_id}").text + box.admin.get(f"/jobs/{lease.job_id}/events").text

    assert lease.token.encode() not in stored
    assert lease.token not in shown


def test_a_worker_that_asks_again_and_again_but_never_starts_does_not_hold_the_job(box, assert_error) -> None:
    job_id = box.submit()
    box.claim(request_id="again")
    box.clock.advance(31)  # the server has been up for a lease
    box.reap()
    box.claim(request_id="once-more")

    for _ in range(3):
        box.clock.advance(5)
        assert box.try_claim(request_id="once-more").status_code == 200
    box.clock.advance(1)
    box.reap()

    assert box.state(job_id) == "queued"
    assert_error(box.try_claim(request_id="once-more"), 409, "claim_over")
