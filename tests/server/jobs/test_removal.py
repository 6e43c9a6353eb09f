"""Deleting jobs, with their folders."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlmodel import func, select

from sftd_server import tables
from sftd_server.auth import Caller
from sftd_server.jobs import removal, service, submission

ADMIN = Caller(key_id="k", name="admin", role="admin")
SEVERAL_SERVERS = pytest.mark.parametrize("database", ["postgres"], indirect=True, scope="module")


def folder_of(box, job_id: str) -> Path:
    folder = box.server.folder.path / "jobs" / job_id
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / "results/model").write_bytes(b"x")
    return folder


def counts(box) -> dict[str, int]:
    """Rows by table."""
    kinds = [tables.JobRow, tables.AttemptRow, tables.StreamRow, tables.JobMetricRow, tables.MetricRow]
    kinds += [tables.LogLineRow, tables.EventRow, tables.CheckpointRow, tables.EvaluationRow]

    def look(session):
        return {k.__tablename__: session.exec(select(func.count()).select_from(k)).one() for k in kinds}

    return box.run(box.server.db.read(look))


def wait_until_gone(box) -> None:
    deadline = time.monotonic() + 5
    while list((box.server.folder.path / "jobs").glob(".*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_deleted_job_leaves_nothing(box, assert_error) -> None:
    lease = box.running()
    lease.metrics(0, (1, {"loss": 1.0}))
    lease.post("logs", seq=0, lines=["line"])
    data = {"step": 1, "eval_loss": 1.0, "perplexity": 2.7, "token_accuracy": 0.5, "num_tokens": 9}
    lease.event(0, "evaluation", **data)
    lease.checkpoint(10)
    lease.finish()
    folder = folder_of(box, lease.job_id)
    assert all(counts(box).values())

    assert box.admin.delete(f"/jobs/{lease.job_id}").status_code == 204

    assert not any(counts(box).values())
    assert not folder.exists()
    wait_until_gone(box)
    assert_error(box.admin.get(f"/jobs/{lease.job_id}"), 404, "unknown_job")
    assert_error(box.admin.delete(f"/jobs/{lease.job_id}"), 404, "unknown_job")


def test_the_files_may_be_kept(box) -> None:
    job_id = box.submit()
    folder = folder_of(box, job_id)

    assert box.admin.delete(f"/jobs/{job_id}?keep_files=true").status_code == 204

    assert (folder / "results/model").exists()


@pytest.mark.parametrize("verb", [None, "pause", "cancel"])
def test_a_job_that_no_worker_holds_can_be_deleted(box, verb: str | None) -> None:
    job_id = box.submit()
    if verb:
        box.admin.post(f"/jobs/{job_id}/{verb}")

    assert box.admin.delete(f"/jobs/{job_id}").status_code == 204
    assert box.try_claim().status_code == 204


def test_a_job_that_a_worker_holds_is_cancelled_first(box, assert_error) -> None:
    lease = box.running()
    folder = folder_of(box, lease.job_id)

    assert (
        "cancel it first"
        in assert_error(box.admin.delete(f"/jobs/{lease.job_id}"), 409, "wrong_state")["message"]
    )
    assert folder.exists()
    assert list(folder.parent.glob(".*")) == []


def test_a_job_that_another_needs_stays(box, assert_error) -> None:
    old = box.running(method="full")
    old.checkpoint(10)
    old.finish()
    folder_of(box, old.job_id)
    base = box.submit(base_model=f"job:{old.job_id}", lora={"rank": 4})
    again = box.admin.post(f"/jobs/{old.job_id}/retry", json={"step": 10}).json()["id"]
    waits = box.submit(after=[again])

    for needed, by in ((old.job_id, again), (old.job_id, base), (again, waits)):
        error = assert_error(box.admin.delete(f"/jobs/{needed}"), 409, "job_needed")
        assert by in error["message"]
        box.admin.post(f"/jobs/{by}/cancel") if by != waits else box.admin.delete(f"/jobs/{waits}")
        if by == again:  # it took along the one that waits for it; another one takes its place
            again = box.admin.post(f"/jobs/{old.job_id}/retry", json={"step": 10}).json()["id"]
            waits = box.submit(after=[again])
            box.admin.post(f"/jobs/{again}/pause")
            break
    box.admin.delete(f"/jobs/{waits}")
    assert box.admin.delete(f"/jobs/{again}").status_code == 204
    error = assert_error(box.admin.delete(f"/jobs/{old.job_id}"), 409, "job_needed")
    assert base in error["message"]
    box.admin.post(f"/jobs/{base}/cancel")
    assert box.admin.delete(f"/jobs/{old.job_id}").status_code == 204


def finished(box, **fields) -> str:
    """A job that has succeeded, with its folder."""
    lease = box.running(**fields)
    lease.checkpoint(10)
    lease.finish()
    folder_of(box, lease.job_id)
    return lease.job_id


def test_what_the_base_of_a_waiting_job_stands_on_stays(box, assert_error) -> None:
    whole = finished(box, method="full")
    adapter = box.running(base_model=f"job:{whole}")
    waits = box.submit(base_model=f"job:{adapter.job_id}", after=[adapter.job_id])
    adapter.finish()

    error = assert_error(box.admin.delete(f"/jobs/{whole}"), 409, "job_needed")

    assert waits in error["message"]
    lease = box.claim()
    assert (lease.job_id, lease.answer["base"]["base_model"]) == (waits, f"jobs/{whole}/results")
    assert_error(box.admin.delete(f"/jobs/{whole}"), 409, "job_needed")
    lease.start()
    lease.finish()
    assert box.admin.delete(f"/jobs/{whole}").status_code == 204


@pytest.mark.parametrize("kind", ["result", "checkpoint", "seed"])
def test_a_job_is_refused_whose_base_or_seed_is_deleted_between_its_check_and_its_row(box, kind: str) -> None:
    needed = finished(box, method="full")
    ask = asking_for(box, needed, kind)
    box.admin.delete(f"/jobs/{needed}?keep_files=true")

    with pytest.raises(service.NotFound if kind == "seed" else service.Invalid):
        box.run(box.server.db.write(ask))


def asking_for(box, needed: str, kind: str):
    """The write of a job that has been checked: on another job's result or checkpoint, or going on from its run."""
    reference = {"result": f"job:{needed}", "checkpoint": f"job:{needed}@10", "seed": "org/model"}[kind]
    (box.server.folder.path / "jobs" / needed / "checkpoints/checkpoint-10").mkdir(parents=True)
    fields = box.spec(base_model=reference)

    def check(session):
        return submission.check(session, fields, submission.Sources(box.server.folder, ()))

    spec, inputs = box.run(box.server.db.read(check))
    seed = {"seed_job": 1, "seed_checkpoint": "checkpoint-10"} if kind == "seed" else {}
    submitted = service.Submission(spec, inputs, "admin", None, "", service.Origin("Waits.", **seed))
    return lambda session: service.submit(session, submitted, box.clock.now())


@SEVERAL_SERVERS
@pytest.mark.parametrize("kind", ["result", "checkpoint", "seed"])
def test_a_job_posted_at_the_moment_of_a_delete_keeps_what_it_needs(
    make_box, assert_error, kind: str
) -> None:
    here, there = make_box(), make_box()
    needed = finished(here, method="full")

    with ThreadPoolExecutor(1) as pool:
        with there.in_open_write(asking_for(here, needed, kind)):
            deleting = pool.submit(here.admin.delete, f"/jobs/{needed}")
            with pytest.raises(TimeoutError):
                deleting.result(0.3)
        assert_error(deleting.result(20), 409, "job_needed")


@SEVERAL_SERVERS
@pytest.mark.parametrize("kind", ["result", "checkpoint", "seed"])
def test_a_job_posted_while_what_it_needs_is_being_deleted_is_refused(make_box, kind: str) -> None:
    here, there = make_box(), make_box()
    needed = finished(here, method="full")
    ask = asking_for(here, needed, kind)

    with ThreadPoolExecutor(1) as pool:
        with there.in_open_write(lambda session: removal.remove(session, needed, ADMIN, there.clock.now())):
            posting = pool.submit(lambda: here.run(here.server.db.write(ask)))
            with pytest.raises(TimeoutError):
                posting.result(0.3)
        with pytest.raises(service.NotFound if kind == "seed" else service.Invalid):
            posting.result(20)


def test_what_a_server_that_died_left_is_removed_at_the_next_start(make_box) -> None:
    box = make_box()
    deleted, kept = box.submit(), box.submit()
    box.admin.delete(f"/jobs/{deleted}?keep_files=true")
    folders = [folder_of(box, job_id) for job_id in (deleted, kept)]
    jobs = box.server.folder.path / "jobs"
    for job_id in (deleted, kept):  # it died between the rows and the folder, and before the rows
        (jobs / f".delete-{job_id}").touch()
    (jobs / ".trash-job_x-t_1").mkdir()
    box.stop()

    again = make_box()

    wait_until_gone(again)
    assert [folder.exists() for folder in folders] == [False, True]


def test_a_stream_of_a_job_that_is_deleted_ends(box, read_events) -> None:
    import threading

    job_id = box.submit()
    texts = []

    def follow() -> None:
        headers = {"accept": "text/event-stream"}
        texts.append(box.admin.get(f"/jobs/{job_id}/events", headers=headers).text)

    following = threading.Thread(target=follow)
    following.start()
    while not box.server.db._signals.get(f"job:{job_id}"):
        time.sleep(0.01)
    box.admin.delete(f"/jobs/{job_id}")
    following.join(5)

    assert read_events(texts[0])[-1]["event"] == "end"
