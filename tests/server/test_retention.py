"""Which checkpoints are kept, and that nothing which is being deleted is ever handed out or called damaged."""

import hashlib
import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlmodel import col, select, update
from tests.waiting import until

from sftd.schemas import JobState
from sftd_server import retention, sweep
from sftd_server.retention import Held, Shelf, choose
from sftd_server.settings import Settings
from sftd_server.tables import CheckpointRow

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def shelf(*held: Held, state: str = "queued", attempt: int = 1, keep: int | None = None, days_ago: float = 0):
    over = JobState(state).terminal
    return Shelf(
        1, "job_a", JobState(state), attempt, keep, NOW - timedelta(days=days_ago) if over else None, held
    )


def held(step: int, **more) -> Held:
    values = {"attempt": 1, "corrupt": False, "pinned": None, "eval_loss": None, **more}
    return Held(name=f"checkpoint-{step}", step=step, **values)


def going(of: Shelf, needed=(), **settings) -> list[int]:
    chosen = choose(of, needed, settings=Settings(**settings), now=NOW)
    return sorted(int(name.rsplit("-", 1)[1]) for name in chosen)


# ---------------------------------------------------------------- the rule


def test_the_newest_are_kept_as_many_as_the_spec_says_or_else_the_server() -> None:
    steps = [held(step) for step in (10, 20, 30, 40, 50)]

    assert going(shelf(*steps)) == [10, 20]
    assert going(shelf(*steps), keep_checkpoints=4) == [10]
    assert going(shelf(*steps, keep=4), keep_checkpoints=2) == [10]
    assert going(shelf(*steps, keep=9)) == []


@pytest.mark.parametrize(("state", "kept"), [("queued", 2), ("paused", 2), ("running", 2), ("failed", 1)])
def test_two_are_kept_until_the_job_is_over(state: str, kept: int) -> None:
    steps = [held(step) for step in (10, 20, 30)]

    assert going(shelf(*steps, state=state, keep=1)) == [10, 20, 30][: 3 - kept]


def test_the_best_is_the_first_of_the_lowest_evaluation() -> None:
    losses = {10: 3.0, 20: 1.0, 30: 1.0, 40: 2.0, 50: 2.5, 60: None}
    steps = [held(step, eval_loss=loss) for step, loss in losses.items()]

    assert going(shelf(*steps, keep=2)) == [10, 30, 40]


def test_pinned_needed_and_the_last_are_kept() -> None:
    steps = [held(10, pinned="good"), held(20), held(30), held(40), held(50)]
    of = shelf(*steps, state="succeeded", keep=1)

    assert going(of, {("job_a", "checkpoint-20"), ("job_b", "checkpoint-30")}) == [30, 40]
    assert going(of, {("job_a", "*")}) == []


def test_the_newest_of_the_newest_attempt_is_kept_though_older_attempts_had_come_further() -> None:
    steps = [held(10), held(20, attempt=2), held(30), held(40), held(50)]

    assert going(shelf(*steps, state="running", attempt=2, keep=2)) == [10, 30]


def test_damaged_ones_do_not_count_and_go_when_the_job_is_over() -> None:
    steps = [held(10), held(20), held(30, corrupt=True), held(40, corrupt=True), held(50)]

    assert going(shelf(*steps, keep=2)) == [10]
    assert going(shelf(*steps, state="failed", keep=2)) == [10, 30, 40]


def test_old_jobs_keep_the_last_best_and_pinned() -> None:
    steps = [held(10, eval_loss=1.0), held(20, pinned="x"), held(30), held(40, eval_loss=2.0)]
    young = shelf(*steps, state="succeeded", keep=9, days_ago=9)
    old = shelf(*steps, state="succeeded", keep=9, days_ago=11)

    assert going(young, finished_checkpoint_days=10) == []
    assert going(old, finished_checkpoint_days=10) == [30]
    assert going(old) == []


def test_nothing_goes_while_an_attempt_may_still_read_what_its_lease_lists() -> None:
    earlier = [held(step) for step in (10, 20, 30, 40, 50)]

    for state in ("claimed", "running", "stopping"):
        assert going(shelf(*earlier, state=state, attempt=2)) == []
    assert going(shelf(*earlier, held(60, attempt=2), state="running", attempt=2)) == [10, 20, 30]


def test_whatever_happens_enough_to_go_on_from_is_kept() -> None:
    """Ten thousand random shelves: what is kept always holds the newest two, the best, and all that is held fast."""
    draw = random.Random(5)
    for _ in range(10_000):
        steps = sorted(draw.sample(range(1, 100), draw.randrange(0, 12)))
        all_held = [
            held(
                step,
                attempt=draw.choice((1, 2)),
                corrupt=draw.random() < 0.2,
                pinned=draw.choice((None, None, None, "p")),
                eval_loss=draw.choice((None, 1.0, 2.0, 3.0)),
            )
            for step in steps
        ]
        state = draw.choice(["queued", "claimed", "running", "paused", "succeeded", "failed"])
        of = shelf(*all_held, state=state, attempt=2, keep=draw.choice((None, 1, 2, 5)), days_ago=50)
        needed = {("job_a", one.name) for one in all_held if draw.random() < 0.1}
        gone = set(choose(of, needed, settings=Settings(finished_checkpoint_days=10), now=NOW))

        whole = [one for one in all_held if not one.corrupt]
        least = whole[-1:] if of.state.terminal else whole[-2:]
        rated = [one for one in whole if one.eval_loss is not None]
        best = [min(rated, key=lambda one: (one.eval_loss, one.step))] if rated else []
        for one in [*least, *best, *(one for one in all_held if one.pinned)]:
            assert one.name not in gone
        assert not gone & {name for _, name in needed}
        if of.state.leased and not any(one.attempt == 2 for one in all_held):
            assert not gone


# ---------------------------------------------------------------- on a server


@pytest.fixture
def make_box(make_box):
    """Servers whose janitor has made its first round, so that it does not meet what a test lays down."""

    def make(**settings):
        box = make_box(**settings)
        collect(box)
        return box

    return make


def lay_down(box, lease, step: int, **more) -> dict:
    """A checkpoint on disk as a trainer makes it, and the report of it."""
    folder = box.server.folder.path / "jobs" / lease.job_id / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    manifest = json.dumps({"step": step, "attempt": lease.attempt, "files": {}})
    (folder / "manifest.json").write_text(manifest)
    (folder / "weights").write_bytes(b"w" * 1000)
    files = {"weights": {"bytes": 1000, "sha256": "ab" * 32}}
    return {"manifest_sha256": hashlib.sha256(manifest.encode()).hexdigest(), "files": files, **more}


def save(box, lease, step: int, **more) -> None:
    answer = lease.checkpoint(step, **lay_down(box, lease, step, **more))
    assert answer.status_code == 200, answer.text


def on_disk(box, job_id: str) -> list[str]:
    folder = box.server.folder.path / "jobs" / job_id / "checkpoints"
    return sorted((path.name for path in folder.iterdir()), key=lambda name: (len(name), name))


def listed(box, job_id: str) -> list[int]:
    return [found["step"] for found in box.admin.get(f"/jobs/{job_id}/checkpoints").json()["data"]]


def collect(box, **how) -> list:
    return box.run(box.app.state.janitor.collect(**how))


def names(*steps: int) -> list[str]:
    return [f"checkpoint-{step}" for step in steps]


def test_old_checkpoints_go_right_after_a_new_one_is_recorded(box) -> None:
    lease = box.running()
    for step in (10, 20, 30, 40, 50):
        save(box, lease, step, metrics={"eval_loss": 0.5 if step == 10 else 1.0})

    until(lambda: on_disk(box, lease.job_id) == names(10, 30, 40, 50), 5)
    assert listed(box, lease.job_id) == [10, 30, 40, 50]
    events = box.admin.get(f"/jobs/{lease.job_id}/events").json()["data"]
    told = [event["data"] for event in events if event["type"] == "checkpoints_deleted"]
    assert told == [{"steps": [20], "bytes": 1000, "why": "not among those kept"}]
    gone = box.admin.get(f"/jobs/{lease.job_id}/checkpoints/20/files/weights")
    assert gone.json()["error"]["code"] == "unknown_checkpoint"


def test_a_lease_never_lists_what_goes_and_what_it_lists_stays_until_the_attempt_has_saved(make_box) -> None:
    box = make_box(keep_checkpoints=10)
    lease = box.running()
    for step in (10, 20, 30, 40):
        save(box, lease, step)
    box.expire()
    second = box.claim("w2")
    assert [found["step"] for found in second.answer["checkpoints"]] == [40, 30, 20, 10]

    box.server.settings = box.server.settings.model_copy(update={"keep_checkpoints": 2})
    assert collect(box) == []  # it may be reading any of them
    second.start()
    assert collect(box) == []
    assert on_disk(box, lease.job_id) == names(10, 20, 30, 40)
    save(box, second, 50)
    until(lambda: on_disk(box, lease.job_id) == names(40, 50), 5)

    box.expire()
    third = box.claim("w3")
    assert [found["step"] for found in third.answer["checkpoints"]] == [50, 40]


def test_a_claim_that_comes_between_plan_and_deletion_keeps_everything(make_box) -> None:
    box = make_box(keep_checkpoints=10)
    lease = box.running()
    for step in (10, 20, 30, 40):
        save(box, lease, step)
    box.expire()
    settings, now = box.server.settings.model_copy(update={"keep_checkpoints": 2}), box.clock.now()

    planned = box.run(box.server.db.read(lambda session: retention.plan(session, settings=settings, now=now)))
    second = box.claim("w2")
    gone = box.run(
        box.server.db.write(
            lambda session: retention.retire(session, lease.job_id, by_size=set(), settings=settings, now=now)
        )
    )

    assert [found.step for found in planned[lease.job_id]] == [10, 20]
    assert gone == []
    assert len(second.answer["checkpoints"]) == 4


def test_a_deletion_never_turns_up_as_damage(box) -> None:
    lease = box.running()
    reports = {step: lay_down(box, lease, step) for step in (10, 20, 30, 40)}
    for step, report in reports.items():
        lease.checkpoint(step, **report)
    until(lambda: listed(box, lease.job_id) == [20, 30, 40], 5)

    found_missing = lease.checkpoint(10, **reports[10], corrupt=True)
    assert found_missing.status_code == 200

    assert "checkpoint_corrupt" not in box.events(lease.job_id)
    rows = box.run(box.server.db.read(lambda session: session.exec(select(CheckpointRow.corrupt)).all()))
    assert not any(rows)


def test_a_report_that_is_repeated_does_not_bring_back_what_was_deleted(box) -> None:
    lease = box.running()
    reports = {step: lay_down(box, lease, step) for step in (10, 20, 30, 40)}
    for step, report in reports.items():
        lease.checkpoint(step, **report)
    until(lambda: on_disk(box, lease.job_id) == names(20, 30, 40), 5)

    assert lease.checkpoint(10, **reports[10]).status_code == 200

    assert listed(box, lease.job_id) == [20, 30, 40]


def test_a_step_that_is_saved_again_after_its_deletion_is_there_again(make_box) -> None:
    box = make_box(keep_checkpoints=2)
    lease = box.running()
    save(box, lease, 10, metrics={"eval_loss": 0.1})
    for step in (20, 30, 40):
        save(box, lease, step)
    until(lambda: on_disk(box, lease.job_id) == names(10, 30, 40), 5)
    box.expire()
    second = box.claim("w2")
    second.start()
    for found in second.answer["checkpoints"][:2]:  # both are damaged: it goes on from 10, and makes 20 anew
        second.checkpoint(found["step"], manifest_sha256=found["manifest_sha256"], corrupt=True)
    save(box, second, 20)

    collect(box)

    assert listed(box, lease.job_id) == [10, 20]
    assert {"checkpoint-10", "checkpoint-20"} <= set(on_disk(box, lease.job_id))


def test_only_what_was_meant_is_removed_when_a_name_has_come_again(box) -> None:
    lease = box.running()
    report = lay_down(box, lease, 10)
    job = box.server.folder.path / "jobs" / lease.job_id

    assert not sweep.remove_checkpoint(job, "checkpoint-10", manifest_sha256="cd" * 32)
    assert on_disk(box, lease.job_id) == names(10)
    assert sweep.remove_checkpoint(job, "checkpoint-10", manifest_sha256=report["manifest_sha256"])
    assert on_disk(box, lease.job_id) == []
    assert sweep.remove_checkpoint(job, "checkpoint-10", manifest_sha256=report["manifest_sha256"])


def test_a_checkpoint_that_another_job_begins_from_stays_until_that_is_over(make_box) -> None:
    box = make_box(keep_checkpoints=10)
    lease = box.running(method="full")
    for step in (10, 20, 30, 40, 50):
        save(box, lease, step)
    lease.finish(files={})
    needs = box.submit(base_model=f"job:{lease.job_id}@10")
    box.server.settings = box.server.settings.model_copy(update={"keep_checkpoints": 1})
    assert [item.step for item in collect(box)] == [20, 30, 40]
    assert on_disk(box, lease.job_id) == names(10, 50)

    box.admin.post(f"/jobs/{needs}/cancel")
    assert [item.step for item in collect(box)] == [10]


def test_all_that_the_lease_of_a_retry_lists_stays_until_it_is_over(make_box) -> None:
    box = make_box(keep_checkpoints=10)
    lease = box.running()
    for step in (10, 20, 30):
        save(box, lease, step)
    lease.finish("failed")
    retried = box.admin.post(f"/jobs/{lease.job_id}/retry", json={"from": "checkpoint"}).json()["id"]
    box.server.settings = box.server.settings.model_copy(update={"keep_checkpoints": 1})

    assert collect(box) == []
    second = box.claim("w2", protocol=2)
    assert second.job_id == retried
    assert [found["step"] for found in second.answer["checkpoints"]] == [30, 20, 10]
    assert collect(box) == []
    second.start()
    save(box, second, 40)
    assert collect(box) == []
    second.finish("failed")
    assert [item.step for item in collect(box)] == [10, 20]


def test_what_a_finished_adapter_stands_on_stays(make_box) -> None:
    box = make_box(keep_checkpoints=10)
    lease = box.running(method="full")
    for step in (10, 20, 30):
        save(box, lease, step)
    lease.finish(files={})
    box.submit(base_model=f"job:{lease.job_id}@10", method="lora")
    adapter = box.claim()
    adapter.start()
    adapter.finish(files={})
    box.server.settings = box.server.settings.model_copy(update={"keep_checkpoints": 1})

    assert [item.step for item in collect(box)] == [20]


def test_a_job_is_refused_whose_base_is_deleted_while_it_is_posted(
    make_box, assert_error, monkeypatch
) -> None:
    box = make_box(keep_checkpoints=10)
    lease = box.running(method="full")
    for step in (10, 20):
        save(box, lease, step)
    lease.finish(files={})
    body = box.spec(base_model=f"job:{lease.job_id}@10")
    write = box.server.db.write

    def delete(session) -> None:
        session.exec(
            update(CheckpointRow).where(col(CheckpointRow.step) == 10).values(deleted_at=box.clock.now())
        )

    async def after_a_deletion(work, **how):
        await write(delete)
        return await write(work, **how)

    monkeypatch.setattr(box.server.db, "write", after_a_deletion)
    error = assert_error(box.admin.post("/jobs", json=body), 422, "invalid_spec")
    assert error["param"] == "base_model"
    assert "no longer there" in error["message"]


def test_a_retry_is_refused_whose_checkpoint_is_deleted_while_it_is_asked_for(
    box, assert_error, monkeypatch
) -> None:
    lease = box.running()
    save(box, lease, 10)
    lease.finish("failed")
    write = box.server.db.write

    def delete(session) -> None:
        session.exec(update(CheckpointRow).values(deleted_at=box.clock.now()))

    async def after_a_deletion(work, **how):
        await write(delete)
        return await write(work, **how)

    monkeypatch.setattr(box.server.db, "write", after_a_deletion)
    answer = box.admin.post(f"/jobs/{lease.job_id}/retry", json={"from": "checkpoint"})
    assert "no longer there" in assert_error(answer, 422, "invalid_spec")["message"]


# ---------------------------------------------------------------- crashes


def test_a_crash_at_any_moment_of_a_deletion_is_made_good_at_the_next_start(make_box, tmp_path) -> None:
    box = make_box(keep_checkpoints=10)
    lease = box.running()
    for step in (10, 20, 30, 40):
        save(box, lease, step)
    folder = box.server.folder.path / "jobs" / lease.job_id / "checkpoints"

    def mark(session) -> None:  # marked on record, and the server dies
        session.exec(
            update(CheckpointRow).where(col(CheckpointRow.step) <= 20).values(deleted_at=box.clock.now())
        )

    box.run(box.server.db.write(mark))
    (folder / "checkpoint-20").rename(folder / ".trash-gc-00000000-checkpoint-20")  # one was renamed already
    (folder / "checkpoint-30").rename(folder / ".trash-gc-00000001-checkpoint-30")  # one was not meant
    (folder / ".stage-1").mkdir()  # its trainer is writing
    box.stop()

    again = make_box(keep_checkpoints=10)
    until(lambda: on_disk(again, lease.job_id) == [".stage-1", *names(30, 40)], 5)
    assert listed(again, lease.job_id) == [30, 40]


def test_halves_and_strangers_go_when_the_job_is_over_and_no_trainer_is_left(box) -> None:
    lease = box.running()
    save(box, lease, 10)
    job = box.server.folder.path / "jobs" / lease.job_id
    for name in (
        "checkpoints/.stage-1",
        "checkpoints/.trash-checkpoint-5",
        "checkpoints/checkpoint-7",
        ".stage-results-1",
    ):
        (job / name).mkdir()
        (job / name / "x").write_bytes(b"x" * 10)
    halves = {
        f"jobs/{lease.job_id}/{name}"
        for name in (
            "checkpoints/.stage-1",
            "checkpoints/.trash-checkpoint-5",
            ".stage-results-1",
            "checkpoints/checkpoint-7",
        )
    }
    assert collect(box) == []
    lease.finish("failed")

    with (job / ".trainer.lock").open("w") as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        assert collect(box) == []
    removed = collect(box)

    assert {item.name for item in removed} == halves
    assert {item.kind for item in removed} == {"leftover"}
    assert on_disk(box, lease.job_id) == names(10)


def test_a_link_in_place_of_the_folder_is_not_followed(box, tmp_path) -> None:
    lease = box.running()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "checkpoint-10").mkdir(parents=True)
    (elsewhere / ".stage-1").mkdir()
    job = box.server.folder.path / "jobs" / lease.job_id
    job.mkdir(parents=True, exist_ok=True)
    (job / "checkpoints").symlink_to(elsewhere)
    lease.finish("failed")

    collect(box)

    assert not sweep.remove_checkpoint(job, "checkpoint-10", manifest_sha256=None)
    assert (elsewhere / "checkpoint-10").is_dir()
    assert (elsewhere / ".stage-1").is_dir()


# ---------------------------------------------------------------- by size


def test_above_the_limit_the_oldest_finished_jobs_lose_checkpoints_and_no_result(make_box) -> None:
    box = make_box(keep_checkpoints=10)
    jobs = []
    for _ in range(2):
        lease = box.running()
        for step in (10, 20, 30):
            save(box, lease, step)
        pinned = box.admin.post(f"/jobs/{lease.job_id}/checkpoints/10/pin", json={"name": "first"})
        assert pinned.status_code == 200
        lease.finish(files={"model": {"bytes": 500, "sha256": "ab" * 32}})
        box.clock.advance(60)
        jobs.append(lease.job_id)
    running = box.running()
    save(box, running, 10)

    def kept(limit: int) -> list[list[int]]:
        box.server.settings = box.server.settings.model_copy(update={"artifacts_max_bytes": limit})
        collect(box)
        return [listed(box, job_id) for job_id in [*jobs, running.job_id]]

    assert kept(8000) == [[10, 20, 30], [10, 20, 30], [10]]
    assert kept(7000) == [[10, 30], [10, 20, 30], [10]]
    assert kept(6000) == [[10, 30], [10, 30], [10]]
    assert kept(5000) == [[10], [10, 30], [10]]  # what is last goes only now
    assert kept(1) == [[10], [10], [10]]  # pinned, pinned, and not over


def test_a_dry_run_deletes_nothing(make_box) -> None:
    box = make_box(keep_checkpoints=10)
    lease = box.running()
    for step in (10, 20, 30):
        save(box, lease, step)
    lease.finish("failed")
    box.server.settings = box.server.settings.model_copy(update={"keep_checkpoints": 2})

    assert [item.step for item in collect(box, dry_run=True)] == [10]
    assert listed(box, lease.job_id) == [10, 20, 30]
    assert on_disk(box, lease.job_id) == names(10, 20, 30)
    assert Path(box.server.folder.path / "jobs" / lease.job_id).is_dir()
