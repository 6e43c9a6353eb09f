"""The warm parent and what it forks, as processes: that nothing but speed tells a forked trainer from a started one."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from examples import tiny_model

from sftd_worker.warm import WarmParent

if TYPE_CHECKING:
    from conftest import FakeServer, WorkerProcess

Q_BASICS = Path(__file__).parents[2] / "examples" / "q_basics.jsonl"
LONG = {"steps": 10**6, "step_seconds": 0.02}


def agent_of(worker: "WorkerProcess") -> psutil.Process:
    assert worker.process
    return psutil.Process(worker.process.pid)


def warm_parent(worker: "WorkerProcess") -> psutil.Process | None:
    """The agent's child that forks."""
    for child in agent_of(worker).children():
        if any("warm" in word for word in child.cmdline()):
            return child
    return None


def trainer_of(worker: "WorkerProcess") -> psutil.Process | None:
    """The agent's child that trains."""
    for child in agent_of(worker).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # gone meanwhile, or not buried yet
            if {"sftd_worker.trainer", str(worker.folder)} <= set(child.cmdline()):
                return child
    return None


def ready(worker: "WorkerProcess") -> int:
    """How often a warm parent became ready."""
    return worker.log().count("the warm parent is ready")


def open_files(process: psutil.Process) -> dict[int, str]:
    folder = Path(f"/proc/{process.pid}/fd")
    return {int(entry.name): os.readlink(entry) for entry in folder.iterdir()}


def is_free(lock: Path) -> bool:
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def start_warm(server: "FakeServer", worker: "WorkerProcess", script: dict[str, Any], **more: Any) -> None:
    """A worker whose warm parent is ready before its first job comes."""
    worker.warm = True
    worker.start(script, **more)
    server.until(lambda: ready(worker) == 1)


def end_of_job(server: "FakeServer", seconds: float = 15) -> dict[str, Any]:
    return server.until(lambda: server.last_calls, seconds)[-1][1]


# ---------------------------------------------------------------- a forked trainer is what a started one is


def test_a_forked_trainer_is_the_agents_child_in_a_session_of_its_own(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    start_warm(server, worker, LONG)
    server.post_job()
    server.until(lambda: len(server.steps()) > 3)

    (pid,) = worker.trainer_pids()
    trainer, parent = trainer_of(worker), warm_parent(worker)

    assert trainer is not None
    assert parent is not None
    assert trainer.pid == pid
    assert os.getsid(pid) == os.getpgid(pid) == pid
    assert trainer.cwd() == str(worker.folder)
    assert parent.children() == []


def test_a_forked_trainer_holds_its_locks_and_nothing_else_of_its_parents(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    start_warm(server, worker, LONG)
    parent = warm_parent(worker)
    assert parent is not None
    held_idle = open_files(parent)
    server.post_job()
    server.until(lambda: len(server.steps()) > 3)

    trainer = trainer_of(worker)
    assert trainer is not None
    held = open_files(trainer)
    locks = [server.data / "locks/cpu-0.lock", worker.folder / ".trainer.lock"]

    assert sorted(held.values()) == sorted(
        [
            "/dev/null",
            *[str(worker.folder / "logs/trainer_output.txt")] * 2,
            str(worker.folder / "logs/stacks.txt"),
            *[str(lock) for lock in locks],
        ]
    )
    assert open_files(parent) == held_idle
    assert [is_free(lock) for lock in locks] == [False, False]

    trainer.kill()
    end_of_job(server)

    assert [is_free(lock) for lock in locks] == [True, True]


@pytest.mark.parametrize("name", ["HF_TOKEN", "LANG"])
def test_both_ways_lead_to_the_same_environment(
    server: "FakeServer", worker: "WorkerProcess", name: str
) -> None:
    seen = []
    for warm in (True, False):
        worker.warm = warm
        worker.start({"steps": 1}, env={name: "of the worker", "SFTD_ADMIN_KEY": "secret"})
        server.until(lambda: ready(worker) == 1)
        server.last_calls.clear()
        server.post_job()
        end_of_job(server)
        seen.append(json.loads((worker.folder / "environment.json").read_text()))
        worker.stop()

    assert seen[0] == seen[1]
    assert seen[0][name] == "of the worker"


def test_nothing_of_one_job_is_seen_by_the_next(server: "FakeServer", worker: "WorkerProcess") -> None:
    start_warm(server, worker, {"steps": 1, "leave": "a trace"})
    server.post_job()
    end_of_job(server)
    first = (worker.folder / "environment.json").read_text()

    server.last_calls.clear()
    server.post_job()
    end_of_job(server)

    assert (worker.folder / "environment.json").read_text() == first
    assert len(set(worker.trainer_pids())) == 2


# ---------------------------------------------------------------- deaths


def test_a_killed_agent_takes_its_warm_parent_and_the_trainer_with_it(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    start_warm(server, worker, {**LONG, "ignore_signals": True})
    server.post_job()
    server.until(lambda: len(server.steps()) > 3)
    parent = warm_parent(worker)
    assert parent is not None
    assert worker.process

    worker.process.kill()
    worker.process.wait()

    server.until(worker.trainer_gone, 3)
    parent.wait(3)


def test_a_stopped_agent_leaves_no_warm_parent(server: "FakeServer", worker: "WorkerProcess") -> None:
    start_warm(server, worker, {})
    parent = warm_parent(worker)
    assert parent is not None

    assert worker.stop() == 0

    assert not parent.is_running()


def test_a_killed_warm_parent_harms_no_run_and_is_replaced(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    start_warm(server, worker, {"steps": 80, "step_seconds": 0.02})
    server.post_job()
    server.until(lambda: len(server.steps()) > 3)
    parent = warm_parent(worker)
    assert parent is not None

    parent.kill()

    assert end_of_job(server)["state"] == "succeeded"
    assert server.steps() == list(range(1, 81))
    server.until(lambda: ready(worker) == 2)
    replaced = warm_parent(worker)
    assert replaced is not None
    assert replaced.pid != parent.pid


def test_a_warm_parent_that_hangs_costs_a_job_its_speed_only(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    start_warm(server, worker, {"steps": 3})
    parent = warm_parent(worker)
    assert parent is not None

    parent.suspend()
    server.post_job()

    assert end_of_job(server)["state"] == "succeeded"
    assert "the trainer is started the cold way" in worker.log()
    assert len(worker.trainer_pids()) == 1
    server.until(lambda: ready(worker) == 2)
    assert not parent.is_running()


def test_a_warm_parent_that_never_comes_up_is_given_up(server: "FakeServer", worker: "WorkerProcess") -> None:
    worker.warm = True
    worker.start({"steps": 3}, warm_argv=[sys.executable, "-c", "raise SystemExit(7)"])
    server.until(lambda: "jobs are started the cold way from now on" in worker.log())

    server.post_job()

    assert end_of_job(server)["state"] == "succeeded"
    assert worker.log().count("the warm parent is lost: it ended with 7") == 3


def test_a_job_that_comes_during_the_imports_waits_for_them_and_can_be_cancelled(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    worker.warm = True
    server.post_job()
    slow = "import time; time.sleep(1000)"
    worker.start({"steps": 3}, warm_argv=[sys.executable, "-c", slow])
    server.until(lambda: any(path.endswith("heartbeat") for path, _ in server.calls))

    asked_at = time.monotonic()
    server.wish("cancel")

    assert end_of_job(server)["state"] == "cancelled"
    assert time.monotonic() - asked_at < 5
    assert worker.trainer_pids() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_forked_trainers_death_is_told_by_its_signal(
    server: "FakeServer", worker: "WorkerProcess", number: signal.Signals
) -> None:
    start_warm(server, worker, LONG)
    server.post_job()
    server.until(lambda: len(server.steps()) > 3)

    os.kill(worker.trainer_pids()[0], number)
    body = end_of_job(server)

    assert body["reason"] == "trainer_died"
    assert f"killed by signal {int(number)}" in str(body["message"])


# ---------------------------------------------------------------- with the real one


@pytest.fixture
def real(server: "FakeServer", worker: "WorkerProcess") -> Iterator["WorkerProcess"]:
    """A worker that trains: a tiny model lies in the data folder."""
    tiny_model.build(server.data / "models" / "tiny", Q_BASICS, hidden_size=64, vocab_size=1024)
    yield worker
    if worker.process and worker.process.poll() is None:
        worker.stop()


def start_real(worker: "WorkerProcess", *, warm: bool, **env: str) -> None:
    trainer = [sys.executable, "-m", "sftd_worker.trainer"]
    parent = [sys.executable, "-P", "-m", "sftd_worker.trainer.warm"]
    worker.start(
        {},
        trainer_argv=trainer,
        warm_argv=parent,
        warm=warm,
        offline=True,
        cancel_grace_seconds=20,
        env={"OMP_NUM_THREADS": "1", **env},
    )


def post_real(server: "FakeServer", **fields: Any) -> None:
    spec = {
        "base_model": "tiny",
        "method": "lora",
        "max_steps": 4,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_seq_length": 512,
        "warmup_steps": 0,
        "lora": {"dropout": 0.2},
        "validation_split": 0.1,
        "eval_steps": 2,
        **fields,
    }
    server.last_calls.clear()
    server.post_job(rows=Q_BASICS.read_bytes(), **spec)


def curve(server: "FakeServer") -> list[tuple[int, object, object]]:
    points = server.streams["metrics"]
    return [(p["step"], p["values"].get("loss"), p["values"].get("eval_loss")) for p in points]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_both_ways_give_the_same_result_to_the_bit(
    server: "FakeServer", real: "WorkerProcess", method: str
) -> None:
    curves, weights = [], []
    for num_ready, warm in ((1, True), (1, False)):
        start_real(real, warm=warm)
        server.until(lambda n=num_ready: ready(real) == n, 120)  # type: ignore[misc]  # a default of a lambda
        post_real(server, method=method)
        body = end_of_job(server, 120)
        assert body["state"] == "succeeded", body
        curves.append(curve(server))
        weights.append(body["files"]["adapter_model.safetensors"]["sha256"])
        real.stop()

    assert len(curves[0]) == 7
    assert curves[0] == curves[1]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_the_warm_parent_only_imports_and_gets_its_memory_back(
    server: "FakeServer", real: "WorkerProcess"
) -> None:
    start_real(real, warm=True, OMP_NUM_THREADS="2")
    server.until(lambda: ready(real) == 1, 120)
    parent = warm_parent(real)
    assert parent is not None
    idle = parent.memory_info().rss

    num_threads = []
    for _ in range(2):
        # Wide enough for torch to share a product among threads.
        post_real(server, batch_size=16, max_steps=2, eval_steps=10**6, validation_split=None)
        while not server.last_calls:
            trainer = trainer_of(real)
            if trainer is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    num_threads.append((trainer.pid, trainer.num_threads()))
            time.sleep(0.05)  # another process's state: there is nothing to wait on
        assert server.last_calls[-1][1]["state"] == "succeeded"

    trainers = {pid for pid, _ in num_threads}
    assert len(trainers) == 2
    for pid in trainers:
        assert max(num for found, num in num_threads if found == pid) >= 2
        assert not psutil.pid_exists(pid)
    assert parent.num_threads() == 1
    assert "libcuda" not in Path(f"/proc/{parent.pid}/maps").read_text()
    assert parent.memory_info().rss < idle + 16 * 2**20


def test_a_warm_parent_that_cannot_be_started_harms_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The machine has no process number or memory left: raised here, for nothing else can bring it about."""

    def none_left(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", none_left)
    files_before = len(os.listdir("/proc/self/fd"))
    parent = WarmParent(["python"], environment={})

    for _ in range(5):
        parent.keep()
        assert not parent.starting

    assert caplog.text.count("it could not be started") == 3
    assert "jobs are started the cold way from now on" in caplog.text
    assert len(os.listdir("/proc/self/fd")) == files_before


KILLED_IN_A_BAR = """
import os, signal, sys, time
from sftd_worker.trainer import warm

warm.preload()
import datasets
from tqdm.auto import tqdm

def fork(child):
    pid = os.fork()
    if pid == 0:
        child()
        os._exit(0)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return "hangs"

def die_in_a_bar(kind):
    list(kind(range(2)))
    kind.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)

for kind in (tqdm, datasets.utils.tqdm):
    list(kind(range(2)))  # as a library might while it is imported
    assert fork(lambda: die_in_a_bar(kind)) == -signal.SIGKILL
    assert fork(lambda: list(kind(range(2)))) == 0, kind
print("free")
"""


@pytest.mark.slow
def test_a_trainer_that_died_in_a_progress_bar_leaves_the_next_one_free() -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_IN_A_BAR], capture_output=True, text=True, timeout=180
    )

    assert done.stdout.split() == ["free"], done.stderr


@pytest.mark.slow
def test_a_forked_trainer_obeys_a_signal_that_comes_at_once(
    server: "FakeServer", real: "WorkerProcess"
) -> None:
    start_real(real, warm=True)
    server.until(lambda: ready(real) == 1, 120)
    post_real(server, max_steps=10**5)
    trainer = None
    while trainer is None:
        trainer = trainer_of(real)
    trainer.terminate()

    call, body = server.until(lambda: server.last_calls, 60)[-1]

    assert call == "release"
    assert "stopped" in body["message"]
    assert [loss for _, loss, _ in curve(server) if loss is not None] == []
