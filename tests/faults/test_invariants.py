"""The checker itself: what a small peaceful run has left is without fault, and each thing that is spoiled in it is found."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.faults import invariants, law
from tests.faults.nursery import Nursery
from tests.faults.world import Plan, World


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two jobs, one of them with a worker that was killed; both have succeeded."""
    nursery = Nursery()
    world = World(tmp_path_factory.mktemp("peaceful"), nursery, seed=1)
    world.start_server()
    world.add_worker("one")
    world.post(steps=12, save_steps=4)
    killed = world.post(steps=40, save_steps=5, pace=0.05)
    world.wait(lambda: world.job(killed)["step"] > 12, "some steps")
    world.kill_worker("one")
    world.start_worker("one")
    world.wait(world.all_over, "the jobs to end")
    world.stop_workers()
    yield world
    world.close()
    nursery.close()


def test_a_run_that_kept_every_promise_has_no_violation(peaceful: World) -> None:
    assert invariants.check(peaceful) == []
    assert [row["attempt"] for row in peaceful.tables.rows("SELECT attempt FROM job ORDER BY number")] == [
        1,
        2,
    ]


SPOILED: dict[str, tuple[str, str]] = {
    "an acknowledged line": ("DELETE FROM log_line WHERE id = (SELECT max(id) FROM log_line)", "I4"),
    "an acknowledged value": (
        "UPDATE metric SET value = 7 WHERE step = 3 AND name_id = (SELECT id FROM metric_name WHERE name = 'loss')",
        "I10",
    ),
    "the number of a stream": ("UPDATE stream SET next_seq = next_seq + 1 WHERE kind = 'logs'", "I5"),
    "an attempt": ("DELETE FROM attempt WHERE attempt = 1 AND job = 2", "I2"),
    "the last event": ("DELETE FROM event WHERE type = 'succeeded' AND job = 1", "I6"),
    "a job's key": ("UPDATE job SET idempotency_key = 'other' WHERE number = 1", "I9"),
    "a write after the next claim": (
        "INSERT INTO witnessed (what, job, attempt, detail) VALUES ('log_line', 2, 1, '0')",
        "I3",
    ),
    "a second holder": (
        "INSERT INTO witnessed (what, job, attempt, detail, before, after, old_attempt, old_token, new_token)"
        " VALUES ('job', 2, 3, 'run', 'succeeded', 'claimed', 2, 'a', 'b')",
        "I1",
    ),
    "a state after the last": (
        "INSERT INTO witnessed (what, job, attempt, detail, before, after, old_attempt)"
        " VALUES ('job', 1, 1, 'run', 'succeeded', 'queued', 1)",
        "I7",
    ),
    "a checkpoint that goes back": (
        "INSERT INTO witnessed (what, job, attempt, detail) VALUES ('checkpoint', 2, 2, '1')",
        "I8",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_spoiled_in_the_database_is_found(peaceful: World, what: str) -> None:
    statement, name = SPOILED[what]
    path = peaceful.data / "sftd.db"
    peaceful.stop_server()
    before = _copy(path)
    try:
        peaceful.tables.execute(statement)  # type: ignore[attr-defined]  # of SQLite
        peaceful.start_server()

        found = invariants.check(peaceful)

        assert name in {text.split(":")[0] for text in found}, found
    finally:
        peaceful.stop_server()
        _restore(path, before)
        peaceful.start_server()


def test_a_spoiled_checkpoint_is_found(peaceful: World) -> None:
    job_id = next(iter(peaceful.plans.values())).job_id
    path = peaceful.data / "jobs" / str(job_id) / "checkpoints" / "checkpoint-8" / "optimizer.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")

    found = invariants.check(peaceful)

    path.write_bytes(content)
    assert [text for text in found if text.startswith("I8:")], found


def test_weights_that_lost_a_step_are_found(peaceful: World) -> None:
    plan = next(iter(peaceful.plans.values()))
    path = peaceful.data / "jobs" / str(plan.job_id) / "results" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(law.file_of(law.weights_after(plan.seed, plan.steps - 1), "weights"))

    found = invariants.check(peaceful)

    path.write_bytes(content)
    assert "the weights are not those of an undisturbed run" in "".join(found)


def test_a_cancel_that_came_true_too_late_is_found(peaceful: World) -> None:
    plan: Plan = next(iter(peaceful.plans.values()))
    ended = peaceful.tables.rows("SELECT finished_at FROM job WHERE number = 1")
    assert ended[0]["finished_at"]
    lives = peaceful.lives
    plan.cancel_heard_at = time.monotonic() - 3600
    peaceful.lives = [replace(lives[0], started_at=plan.cancel_heard_at)]

    found = invariants.check(peaceful)

    plan.cancel_heard_at, peaceful.lives = None, lives
    assert [text for text in found if text.startswith("I11:")], found


def test_two_trainers_on_one_lock_are_found(peaceful: World) -> None:
    path = peaceful.watch / "violations.jsonl"
    path.write_text(
        '{"who": "1 2", "job": "job_1", "attempt": 1, "what": "cpu-0.lock is taken while 3 lives"}\n'
    )

    found = invariants.check(peaceful)

    path.unlink()
    assert [text for text in found if text.startswith("I12:")]


def test_trainers_that_share_a_lock_complain(peaceful: World) -> None:
    """The other half of I12: the trainer sees that somebody alive has written down the same lock."""
    watch = peaceful.watch
    born = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
    (watch / "cpu-0.lock").write_text(f"{os.getpid()} {born}")
    extra = peaceful.plan(steps=2, save_steps=2)
    peaceful.submit(extra)
    peaceful.start_worker("one")
    peaceful.wait(lambda: peaceful.state(extra) == "succeeded", "the job")
    peaceful.stop_workers()

    complaints = (watch / "violations.jsonl").read_text()

    (watch / "violations.jsonl").unlink()
    assert f"cpu-0.lock is taken while {os.getpid()}" in complaints


def _copy(path: Path) -> dict[str, bytes]:
    peaceful_files = [path, Path(f"{path}-wal"), Path(f"{path}-shm")]
    return {str(file): file.read_bytes() for file in peaceful_files if file.exists()}


def _restore(path: Path, files: dict[str, bytes]) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    for name, content in files.items():
        Path(name).write_bytes(content)
