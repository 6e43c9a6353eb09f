"""A worker watches over its trainer: one that hangs, one that is killed for want of memory, one whose disk fills up."""

import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sftd.protocol import StepLine
from sftd_worker import oom, stacks
from sftd_worker.watch import MOST_COUNTED_SECONDS, Quiet

if TYPE_CHECKING:
    from conftest import FakeServer, WorkerProcess

SOON = {"stall_seconds": 1, "start_stall_seconds": 2, "stall_factor": 5}
ENDLESS = {"steps": 10**6, "step_seconds": 0.02}


def last_call(server: "FakeServer", seconds: float = 15) -> dict[str, Any]:
    return dict(server.until(lambda: server.last_calls, seconds)[-1][1])


# ---------------------------------------------------------------- one that hangs


@pytest.mark.parametrize("way", ["cold", "warm"])
def test_a_trainer_that_hangs_is_killed_and_the_log_says_where(
    way: str, server: "FakeServer", worker: "WorkerProcess"
) -> None:
    worker.warm = way == "warm"
    server.post_job()
    worker.start({**ENDLESS, "hang_at": 5}, **SOON)

    body = last_call(server)

    assert (body["state"], body["reason"]) == ("failed", "stalled")
    assert "no life for 1 s after step 4" in body["message"]
    log = "\n".join(server.streams["logs"])
    assert "in hang_without_a_word" in log
    assert re.search(r"[RSD] \((running|sleeping|disk sleep)\)", log)  # it may be at its dump just then
    assert "hang_without_a_word" in "\n".join(body["log_tail"])
    assert worker.trainer_gone()


def test_the_stacks_of_each_rank_are_told(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()
    worker.start({**ENDLESS, "hang_at": 5, "launcher": True}, **SOON)

    body = last_call(server)

    assert body["reason"] == "stalled"
    log = server.streams["logs"]
    assert len([line for line in log if line.startswith("process ")]) == 2  # the launcher, and the rank
    assert any("in hang_without_a_word" in line for line in log)
    assert worker.trainer_gone()


@pytest.mark.parametrize(("how", "told"), [("stop", "T (stopped)"), ("deaf", "S (sleeping)")])
def test_of_one_that_does_not_answer_the_kernel_tells(
    how: str, told: str, server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start({**ENDLESS, "hang_at": 5, "hang": how}, **SOON)

    body = last_call(server, 25)

    assert body["reason"] == "stalled"
    log = "\n".join(server.streams["logs"])
    assert told in log
    assert ("does not answer" in log) is (how == "stop")
    assert worker.trainer_gone()


def test_a_trainer_that_shows_life_is_left_alone(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()
    worker.start({"steps": 8, "hang_at": 5, "hang": "pulse", "hang_seconds": 3}, **SOON)

    assert last_call(server)["state"] == "succeeded"


def test_a_slow_start_has_an_allowance_of_its_own(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()
    worker.start({"steps": 3, "silent_seconds": 3}, **{**SOON, "start_stall_seconds": 60})

    assert last_call(server)["state"] == "succeeded"


def test_a_trainer_that_never_begins_has_stalled_too(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()
    worker.start({"steps": 3, "silent_seconds": 1000}, **SOON)

    body = last_call(server)

    assert body["reason"] == "stalled"
    assert "no life for 2 s before its first step" in body["message"]


def test_zero_turns_it_off(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()
    worker.start(
        {"steps": 3, "silent_seconds": 2, "hang_at": 2, "hang_seconds": 2},
        stall_seconds=0,
        start_stall_seconds=0,
    )

    assert last_call(server)["state"] == "succeeded"


def test_a_machine_that_was_asleep_is_not_taken_for_a_hanging_trainer(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    """Worker and trainer are stopped for far longer than the allowance, and the worker wakes first."""
    server.post_job()
    worker.start({"steps": 50, "step_seconds": 0.1}, stall_seconds=MOST_COUNTED_SECONDS + 1, stall_factor=0)
    server.until(lambda: len(server.steps()) > 5)
    assert worker.process
    trainer = worker.trainer_pids()[0]

    for pid in (trainer, worker.process.pid):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(8)
    os.kill(worker.process.pid, signal.SIGCONT)
    time.sleep(0.5)
    os.kill(trainer, signal.SIGCONT)

    assert last_call(server)["state"] == "succeeded"


def test_a_torn_line_of_the_killed_trainer_does_not_swallow_the_stacks(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start({**ENDLESS, "hang_at": 5}, **SOON)
    server.until(lambda: len(server.steps()) == 4)
    with (worker.folder / "logs/events.jsonl").open("a") as spool:
        spool.write('{"type": "step", "att')

    assert last_call(server)["reason"] == "stalled"
    assert any("showed no life" in line for line in server.streams["logs"])


# ---------------------------------------------------------------- how long is too long


def quiet(**more: float) -> Quiet:
    return Quiet(**{"seconds": 10.0, "start_seconds": 100.0, "factor": 20.0, "now": 0.0, **more})


def step(number: int, *, at: float = 0.0, **values: float) -> StepLine:
    return StepLine(attempt=1, at=at, step=number, values=values)


def test_slow_steps_have_more_time() -> None:
    watched = quiet()
    assert watched.allowed == 100

    watched.heard(step(1, seconds=0.1))
    assert watched.allowed == 10

    for number in range(2, 30):
        watched.heard(step(number, seconds=3.0))
    assert watched.allowed == 60
    watched.heard(step(30, seconds=500.0))  # one that was slow changes nothing
    assert watched.allowed == 60


def test_steps_that_do_not_tell_their_time_are_measured_by_their_lines() -> None:
    watched = quiet()

    for number in range(0, 100, 10):  # a line each ten steps
        watched.heard(step(number, at=20.0 * number))

    assert watched.allowed == 400


def test_values_that_are_no_time_are_passed_over() -> None:
    watched = quiet()

    for seconds in (math.nan, -1.0, 0.0, math.inf):
        watched.heard(step(5, seconds=seconds))

    assert watched.allowed == 10


def test_time_between_looks_counts_only_where_this_process_ran() -> None:
    watched = quiet()
    for now in range(1, 6):
        watched.look(float(now), moved=False)
    assert watched.seconds == 5

    watched.look(10_000.0, moved=False)
    assert watched.seconds == 5 + MOST_COUNTED_SECONDS

    watched.look(10_001.0, moved=True)
    assert watched.seconds == 0


def test_a_process_that_is_gone_has_no_stacks(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()

    assert stacks.collect(gone.pid, tmp_path / "stacks.txt") == []


# ---------------------------------------------------------------- memory


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A memory cgroup of 256 MiB."""
    root = next(
        (folder for folder in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")) if folder.exists()),
        None,
    )
    group = (root or Path("/")) / f"sftd-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = "memory.limit_in_bytes" if (group / "memory.limit_in_bytes").exists() else "memory.max"
        (group / limit).write_text(str(256 * 2**20))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield group
    for _ in range(50):
        try:
            group.rmdir()
            return
        except OSError:  # its last process is not quite gone
            time.sleep(0.1)


def test_a_trainer_that_runs_out_of_memory_says_so_and_leaves_nothing(
    small_group: Path, server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start({**ENDLESS, "eat_at": 20, "daemon": True})
    assert worker.process
    (small_group / "cgroup.procs").write_text(str(worker.process.pid))  # before it starts a trainer

    body = last_call(server, 30)

    assert (body["state"], body["reason"]) == ("failed", "out_of_memory")
    assert "the memory of the worker's cgroup (0.2 GiB) ran out" in body["message"]
    assert "Lower max_seq_length" in body["message"]
    assert worker.trainer_gone()
    assert worker.process.poll() is None  # the worker lives, and takes the next job


def test_a_trainer_that_is_killed_by_hand_has_died(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()
    worker.start(ENDLESS)
    server.until(lambda: len(server.steps()) > 5)

    os.kill(worker.trainer_pids()[0], signal.SIGKILL)

    assert last_call(server)["reason"] == "trainer_died"


def test_a_rank_killed_for_want_of_memory_is_told_from_one_that_broke(
    small_group: Path, server: "FakeServer", worker: "WorkerProcess"
) -> None:
    """Its launcher ends with an exit code, not by a signal."""
    server.post_job(gpus=2)
    worker.start({**ENDLESS, "eat_at": 20, "launcher": True}, gpus=2)
    assert worker.process
    (small_group / "cgroup.procs").write_text(str(worker.process.pid))

    assert last_call(server, 30)["reason"] == "out_of_memory"
    assert worker.trainer_gone()


def test_this_process_has_a_memory_group_whose_kills_can_be_read() -> None:
    group = oom.memory_group(os.getpid())
    if group is None:
        pytest.skip("there is no memory cgroup here")

    kills = oom.group_kills(group)

    assert kills is not None
    assert kills >= 0


@pytest.mark.parametrize(
    ("files", "kills", "limit"),
    [
        ({"memory.events": "low 0\noom 3\noom_kill 2\n", "memory.max": "1048576\n"}, 2, 1048576),
        ({"memory.events": "oom_kill 0\n", "memory.max": "max\n"}, 0, None),
        (
            {
                "memory.oom_control": "under_oom 0\noom_kill 7\n",
                "memory.limit_in_bytes": "9223372036854771712\n",
            },
            7,
            None,
        ),
        ({}, None, None),
    ],
)
def test_both_versions_of_cgroups_are_read(
    files: dict[str, str], kills: int | None, limit: int | None, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)

    assert (oom.group_kills(tmp_path), oom.group_limit(tmp_path)) == (kills, limit)
