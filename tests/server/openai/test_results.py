"""The result file: what it holds, that there is one, and that it goes with its job."""

from datetime import timedelta

import pytest
from sqlmodel import delete, update

from sftd_server.cursors import forgettable
from sftd_server.openai.results import ResultFiles
from sftd_server.tables import FileRow, JobRow

JOBS = "/v1/fine_tuning/jobs"


def ended(box, state: str = "succeeded", **more) -> str:
    lease = box.running()
    nan = {"loss": "NaN", "grad_norm": "Infinity"}
    lease.metrics(0, (1, {"loss": 2.5, "learning_rate": 0.1}), (2, nan), (4, {"loss": 0.1}))
    for seq, (step, loss) in enumerate([(0, 3.0), (3, 1.5), (4, 1.25)]):
        told = {"eval_loss": loss, "perplexity": 2.0, "token_accuracy": 0.5, "num_tokens": 9}
        lease.event(seq, "evaluation", step=step, **told)
    assert lease.finish(state, **more).status_code == 200
    return str(lease.job_id)


def make(box) -> None:
    """As the server does by itself, and beside it: both make one."""
    box.run(ResultFiles(box.server).make_missing())


def result_files(box, job_id: str) -> list[str]:
    return list(box.admin.get(f"{JOBS}/{job_id}").json()["result_files"])


@pytest.mark.parametrize(
    ("state", "more"), [("succeeded", {}), ("failed", {"reason": "diverged", "message": "NaN"})]
)
def test_the_result_file_is_a_csv_of_all_steps_and_evaluations(box, state: str, more) -> None:
    job_id = ended(box, state, **more)
    make(box)
    make(box)

    (file_id,) = result_files(box, job_id)

    file = box.admin.get(f"/files/{file_id}").json()
    assert (file["purpose"], file["filename"], file["status"]) == (
        "fine-tune-results",
        "step_metrics.csv",
        "processed",
    )
    assert box.admin.get(f"/files/{file_id}/content").text.split("\r\n") == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,grad_norm,learning_rate",
        "0,,,3.0,0.5,,",
        "1,2.5,,,,,0.1",
        "2,NaN,,,,Infinity,",
        "3,,,1.5,0.5,,",
        "4,0.1,,1.25,0.5,,",
        "",
    ]


def test_a_job_that_never_trained_has_none(box) -> None:
    job_id = box.submit()
    box.admin.post(f"/jobs/{job_id}/cancel")
    make(box)

    assert result_files(box, job_id) == []


def test_what_is_missing_at_a_start_is_made_then(box) -> None:
    job_id = ended(box)
    make(box)
    lost = delete(FileRow).where(FileRow.purpose == "fine-tune-results")  # as if it had died before
    box.run(box.server.db.write(lambda session: session.exec(lost).rowcount))

    make(box)

    assert len(result_files(box, job_id)) == 1


def test_it_goes_with_its_job_and_does_not_come_back_when_its_owner_deletes_it(box) -> None:
    gone, kept = ended(box), ended(box)
    make(box)
    (file_id,) = result_files(box, gone)

    assert box.admin.delete(f"/jobs/{gone}").status_code == 204
    make(box)

    assert box.admin.get(f"/files/{file_id}").status_code == 404
    assert len(result_files(box, kept)) == 1


def test_result_files_are_made_though_a_deleted_model_can_not_be_put_away_at_the_start(make_box) -> None:
    box = make_box()
    broken, *others = ended(box), ended(box), ended(box)
    make(box)
    deleted = update(JobRow).where(JobRow.id == broken).values(result_deleted_at=box.clock.now())
    lost = delete(FileRow).where(FileRow.purpose == "fine-tune-results")
    box.run(
        box.server.db.write(lambda session: (session.exec(deleted).rowcount, session.exec(lost).rowcount))
    )
    (box.server.folder.path / "jobs" / broken).write_bytes(b"")  # no folder: nothing in it can be renamed
    box.stop()

    again = make_box()

    for _ in range(500):
        if all(result_files(again, job_id) for job_id in others):
            return
    raise AssertionError("they are missing")


def test_a_result_file_that_was_deleted_is_not_made_again_for_as_long_as_its_job_is_there(box) -> None:
    job_id = ended(box)
    make(box)
    (file_id,) = result_files(box, job_id)
    box.admin.delete(f"/files/{file_id}")
    before = box.clock.now() + timedelta(days=30)

    assert box.run(box.server.db.read(lambda session: forgettable(session, before))) == []
    box.admin.delete(f"/jobs/{job_id}")
    assert set(box.run(box.server.db.read(lambda session: forgettable(session, before)))) == {file_id, job_id}
