"""Jobs side by side on one worker, with the real server: each has its devices, and its end is nobody else's."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Box

LEASE_SECONDS = 20  # none is to be lost here, however busy the machine is
LONG = {"steps": 10**6, "step_seconds": 0.02}


@pytest.fixture(params=["cold", "warm"])
def warm(request: pytest.FixtureRequest) -> bool:
    """Whether trainers are started or forked: all that follows holds for both."""
    return request.param == "warm"


def start_two(box: "Box", *, warm: bool = False, second: dict | None = None, **settings: object) -> list[str]:
    """A worker of two slots and two jobs that train on it."""
    jobs = [box.post(name="one", **LONG), box.post(name="two", **(second or LONG))]
    box.start_worker("w", gpus=2, warm=warm, **settings)
    box.until(lambda: all(len(box.steps(job)) > 3 for job in jobs))
    return jobs


def locks_of(pid: int) -> list[str]:
    """The devices' locks that a process holds."""
    open_files = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return [Path(path).name for path in open_files if "/locks/" in path]


def test_two_jobs_run_side_by_side_on_devices_of_their_own(box: "Box", warm: bool) -> None:
    jobs = start_two(box, warm=warm)

    locks = [locks_of(box.trainer_pids(job)[0]) for job in jobs]

    assert [box.state(job) for job in jobs] == ["running", "running"]
    assert sorted(locks) == [["cpu-0.lock"], ["cpu-1.lock"]]


def test_a_cancel_ends_one_and_the_other_goes_on(
    box: "Box", warm: bool, alive: Callable[[int], bool]
) -> None:
    first, second = start_two(box, warm=warm)

    box.client.jobs.cancel(first)
    box.until(lambda: box.state(first) == "cancelled")
    so_far = len(box.steps(second))

    box.until(lambda: len(box.steps(second)) > so_far + 20)
    assert not any(alive(pid) for pid in box.trainer_pids(first))
    assert len(box.trainer_pids(second)) == 1


def test_a_killed_trainer_is_its_own_jobs_failure(box: "Box", warm: bool) -> None:
    first, second = start_two(box, warm=warm, second={"steps": 150, "step_seconds": 0.02})

    os.kill(box.trainer_pids(first)[0], signal.SIGKILL)
    done = box.client.jobs.wait(second, timeout_seconds=20)
    failed = box.client.jobs.retrieve(first)

    assert failed.failure is not None
    assert (failed.state, failed.failure.reason) == ("failed", "trainer_died")
    assert (done.state, box.steps(second)) == ("succeeded", list(range(1, 151)))


def test_a_freed_slot_is_filled_while_the_other_is_busy(box: "Box", warm: bool) -> None:
    first, second = start_two(box, warm=warm)
    third = box.post(name="three", steps=3)
    assert box.state(third) == "queued"

    box.client.jobs.cancel(first)
    done = box.client.jobs.wait(third, timeout_seconds=20)

    assert done.state == "succeeded"
    assert box.state(second) == "running"


def test_a_stopped_worker_saves_and_gives_back_all_its_jobs(box: "Box", warm: bool) -> None:
    jobs = start_two(box, warm=warm)

    worker = box.processes[-1]
    worker.terminate()

    assert worker.wait(20) == 0
    for job in jobs:
        assert box.state(job) == "queued"
        assert [found.step for found in box.client.jobs.checkpoints(job)] == [box.steps(job)[-1]]
        assert "lease_expired" not in [event.type for event in box.client.jobs.events(job)]


def test_nothing_is_left_of_a_killed_worker(box: "Box", warm: bool, alive: Callable[[int], bool]) -> None:
    jobs = start_two(box, warm=warm, second={**LONG, "ignore_signals": True})
    pids = [pid for job in jobs for pid in box.trainer_pids(job)]

    box.processes[-1].kill()
    box.processes[-1].wait()

    box.until(lambda: not any(alive(pid) for pid in pids), 5)


def test_what_a_trainer_has_left_to_itself_lives_as_long_as_it_does(
    box: "Box", warm: bool, alive: Callable[[int], bool]
) -> None:
    """The end of a trainer clears away what it leaves; that of another one is not touched."""
    first, second = start_two(box, warm=warm, second={**LONG, "orphan": True})
    left = int((box.job_folder(second) / "orphan.txt").read_text())

    box.client.jobs.cancel(first)
    box.until(lambda: box.state(first) == "cancelled")
    assert alive(left)

    box.client.jobs.cancel(second)
    box.until(lambda: box.state(second) == "cancelled")
    assert not alive(left)


def test_a_job_of_two_slots_waits_until_both_are_free(box: "Box") -> None:
    first = box.post(name="one", **LONG)
    worker = box.start_worker("w", gpus=2)
    box.until(lambda: len(box.steps(first)) > 3)
    wide = box.post(name="wide", gpus=2, steps=3)
    narrow = box.post(name="narrow", steps=60, step_seconds=0.02)

    box.client.jobs.wait(narrow, timeout_seconds=20)  # beside the first one; the wide one has no room
    assert box.state(wide) == "queued"
    box.client.jobs.cancel(first)
    done = box.client.jobs.wait(wide, timeout_seconds=20)

    assert (done.state, done.attempt) == ("succeeded", 1)
    worker.terminate()
    assert worker.wait(10) == 0


def test_a_mistake_in_one_attempt_does_not_end_the_others(box: "Box") -> None:
    first = box.post(name="one", steps=200, step_seconds=0.02)
    box.start_worker("w", gpus=2)
    box.until(lambda: len(box.steps(first)) > 3)

    key = (box.data / "worker.key").rename(box.data / "moved.key")  # an attempt reads it, and fails
    second = box.post(name="two", **LONG)
    box.until(lambda: box.state(second) == "failed")
    key.rename(box.data / "worker.key")
    third = box.post(name="three", steps=3)

    assert box.client.jobs.wait(third, timeout_seconds=20).state == "succeeded"
    assert box.client.jobs.wait(first, timeout_seconds=20).state == "succeeded"
    assert box.steps(first) == list(range(1, 201))
    failure = box.client.jobs.retrieve(second).failure
    assert failure is not None
    assert "worker.key" in str(failure.message)


def test_a_worker_that_comes_back_after_its_death_has_its_jobs_again_in_seconds(box: "Box") -> None:
    box.restart_server(lease_seconds=60)
    jobs = [box.post(name=name, **LONG, checkpoint_every=5) for name in ("one", "two")]
    worker = box.start_worker("w", gpus=2)
    box.until(lambda: all(list(box.client.jobs.checkpoints(job)) for job in jobs))

    worker.kill()
    worker.wait()
    killed_at = time.monotonic()
    box.start_worker("w", gpus=2)
    box.until(lambda: all(len(box.trainer_pids(job)) == 2 for job in jobs), 15)

    assert time.monotonic() - killed_at < 10
    for job in jobs:
        found = box.client.jobs.retrieve(job)
        assert (found.state, found.attempt) == ("running", 2)
        assert [event.type for event in box.client.jobs.events(job)].count("worker_restarted") == 1
        steps = box.steps(job)
        assert steps == list(range(1, len(steps) + 1))


# ---------------------------------------------------------------- threads


def environment_of(box: "Box", job: str) -> dict[str, str]:
    box.until(lambda: box.steps(job))
    return dict(json.loads((box.job_folder(job) / "environment.json").read_text()))


def test_trainers_on_cpu_share_the_cores(box: "Box", warm: bool) -> None:
    job = box.post(name="one", **LONG)
    box.start_worker("w", gpus=2, warm=warm, env={"OMP_NUM_THREADS": None})

    num_cores = len(os.sched_getaffinity(0))
    threads = int(environment_of(box, job)["OMP_NUM_THREADS"])

    assert 1 <= threads <= max(1, num_cores // 2)


def test_what_the_environment_says_of_threads_goes_before(box: "Box") -> None:
    job = box.post(name="one", **LONG)
    box.start_worker("w", gpus=2, env={"OMP_NUM_THREADS": "7"})

    assert environment_of(box, job)["OMP_NUM_THREADS"] == "7"


# ---------------------------------------------------------------- draining


def test_a_drained_workers_jobs_may_finish(box: "Box") -> None:
    job = box.post(name="one", steps=100, step_seconds=0.02)
    worker = box.start_worker("w", gpus=2, drain_seconds=60)
    box.until(lambda: len(box.steps(job)) > 3)

    worker.terminate()
    late = box.post(name="late", steps=3)

    assert worker.wait(20) == 0
    assert box.state(job) == "succeeded"
    assert box.trainer_pids(late) == []
    box.until(lambda: box.state(late) == "queued", 1)
    assert box.client.jobs.retrieve(job).attempt == 1


def test_what_is_not_done_when_draining_ends_is_saved_and_given_back(box: "Box") -> None:
    (job, _) = start_two(box, drain_seconds=1.5)
    worker = box.processes[-1]
    so_far = len(box.steps(job))

    worker.terminate()

    assert worker.wait(20) == 0
    assert len(box.steps(job)) > so_far + 20  # it went on for a while
    assert box.state(job) == "queued"
    assert [found.step for found in box.client.jobs.checkpoints(job)] == [box.steps(job)[-1]]


def test_a_second_signal_cuts_draining_short_and_still_saves(box: "Box") -> None:
    jobs = start_two(box, drain_seconds=600)
    worker = box.processes[-1]

    worker.terminate()
    box.until(lambda: "stopping" in box.log("w"))
    worker.terminate()

    assert worker.wait(20) == 0
    for job in jobs:
        assert box.state(job) == "queued"
        assert [found.step for found in box.client.jobs.checkpoints(job)] == [box.steps(job)[-1]]


def test_a_third_signal_kills(box: "Box", alive: Callable[[int], bool]) -> None:
    stubborn = {**LONG, "ignore_signals": True}
    jobs = start_two(box, second=stubborn, drain_seconds=600)
    worker = box.processes[-1]

    worker.terminate()
    box.until(lambda: "stopping" in box.log("w"))
    worker.terminate()
    box.until(lambda: (box.job_folder(jobs[1]) / "signals.txt").exists())
    worker.terminate()

    assert worker.wait(10) == 0
    assert not any(alive(pid) for job in jobs for pid in box.trainer_pids(job))
    assert [box.state(job) for job in jobs] == ["queued", "queued"]
