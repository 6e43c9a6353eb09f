"""A GPU that is lost under a job: the job goes on elsewhere, and the worker does without it until it is back. The driver is
a script that prints what the test wants.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sftd_worker.gpus import Gpu, find_lost, parse_gpus

if TYPE_CHECKING:
    from conftest import FakeServer, WorkerProcess

ROWS = (
    "0, GPU-aaaa, 81559, NVIDIA H100, 00000000:1B:00.0",
    "1, GPU-bbbb, 40960, NVIDIA A100, 00000000:3B:00.0",
)
LOST = "Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.  Reboot the system to recover this GPU"
LONG = {"steps": 10**6, "step_seconds": 0.02}


class Driver:
    """A nvidia-smi of its own on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        script = f'#!/bin/sh\ncat "{folder}/says"\nexit $(cat "{folder}/code")\n'
        (folder / "nvidia-smi").write_text(script)
        (folder / "nvidia-smi").chmod(0o755)
        self.path = f"{folder}:{os.environ['PATH']}"
        self.say(*ROWS)

    def say(self, *lines: str, code: int = 0) -> None:
        (self.folder / "code").write_text(str(code))
        (self.folder / "next").write_text("".join(f"{line}\n" for line in lines))
        (self.folder / "next").rename(self.folder / "says")


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver(tmp_path / "bin")


@pytest.fixture
def start(worker: "WorkerProcess", driver: Driver) -> Callable[..., None]:
    """Start a worker on the driver's GPUs."""

    def start(script: dict, **settings: object) -> None:
        env = {"PATH": driver.path, "CUDA_VISIBLE_DEVICES": "1,0"}
        worker.start(script, env=env, device="cuda", gpu_look_seconds=0.3, claim_wait_seconds=0.5, **settings)

    return start


def slots(server: "FakeServer") -> list[int]:
    return [hello["gpus"] for hello in server.bodies("register")]


def test_a_worker_tells_of_its_gpus(server: "FakeServer", start: Callable[..., None]) -> None:
    start({})
    (hello,) = server.until(lambda: server.bodies("register"))

    assert (hello["gpus"], hello["device"]) == (2, "cuda")
    assert (hello["gpu_memory_gb"], hello["gpu_names"]) == (40.0, ["NVIDIA A100", "NVIDIA H100"])


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    "says", [(ROWS[0],), (ROWS[0], "1, GPU-bbbb, [GPU is lost], NVIDIA A100, [GPU is lost]")]
)
def test_a_job_goes_on_elsewhere_and_the_worker_does_without_its_gpu(
    server: "FakeServer",
    worker: "WorkerProcess",
    driver: Driver,
    start: Callable[..., None],
    warm: bool,
    says: tuple[str, ...],
) -> None:
    worker.warm = warm
    server.post_job()
    start(LONG)
    server.until(lambda: len(server.steps()) > 3)
    assert '"CUDA_VISIBLE_DEVICES": "GPU-bbbb"' in (worker.folder / "environment.json").read_text()

    driver.say(*says)
    os.kill(worker.trainer_pids()[0], signal.SIGKILL)
    ((call, body),) = server.until(lambda: server.last_calls)
    server.until(lambda: slots(server) == [2, 1])
    server.until(lambda: "attempt 1: released" in worker.log())
    asked = len(server.bodies("claim"))
    server.until(lambda: len(server.bodies("claim")) > asked + 1)  # none of a time when the other was there
    server.post_job()
    server.until(lambda: len(server.steps()) > 3)

    assert (call, body["reason"]) == ("release", "gpu_lost")
    assert "GPU-bbbb" in body["message"]
    assert "GPU-bbbb (NVIDIA A100) is lost: 1 GPU(s) are used now" in worker.log()
    assert '"CUDA_VISIBLE_DEVICES": "GPU-aaaa"' in (worker.folder / "environment.json").read_text()
    assert server.bodies("register")[-1]["gpu_memory_gb"] == pytest.approx(79.6, abs=0.1)


def test_a_driver_that_gives_up_at_the_lost_one_takes_no_other_with_it(
    server: "FakeServer", worker: "WorkerProcess", driver: Driver, start: Callable[..., None]
) -> None:
    server.post_job()
    start(LONG)
    server.until(lambda: len(server.steps()) > 3)

    driver.say(LOST, code=15)
    os.kill(worker.trainer_pids()[0], signal.SIGKILL)
    _, body = server.until(lambda: server.last_calls)[-1]

    assert body["reason"] == "gpu_lost"
    server.until(lambda: slots(server) == [2, 1])


def test_a_gpu_that_is_back_is_used_again(
    server: "FakeServer", worker: "WorkerProcess", driver: Driver, start: Callable[..., None]
) -> None:
    server.post_job()
    start(LONG)
    server.until(lambda: len(server.steps()) > 3)
    driver.say(ROWS[0])
    os.kill(worker.trainer_pids()[0], signal.SIGKILL)
    server.until(lambda: slots(server) == [2, 1])

    driver.say(*ROWS)

    server.until(lambda: slots(server) == [2, 1, 2])
    server.until(lambda: server.bodies("claim")[-1]["gpus"] == 2)
    assert "GPU-bbbb (NVIDIA A100) is back" in worker.log()


def test_a_worker_without_any_gpu_left_claims_nothing_and_lives_on(
    server: "FakeServer", worker: "WorkerProcess", driver: Driver, start: Callable[..., None]
) -> None:
    server.post_job()
    start(LONG, gpus=1)
    server.until(lambda: len(server.steps()) > 3)

    driver.say("No devices were found")
    os.kill(worker.trainer_pids()[0], signal.SIGKILL)
    server.until(lambda: server.last_calls)
    server.until(lambda: "no GPU is left" in worker.log())
    asked = len(server.bodies("claim"))
    server.post_job()
    with pytest.raises(AssertionError, match="in vain"):
        server.until(lambda: len(server.bodies("claim")) > asked, 2)

    driver.say(*ROWS)
    server.until(lambda: len(server.steps()) > 3)
    assert worker.stop() == 0
    assert slots(server) == [1, 1]


def test_a_named_failure_that_speaks_of_cuda_is_looked_into(
    server: "FakeServer", driver: Driver, start: Callable[..., None]
) -> None:
    server.post_job()
    failing = {"steps": 50, "step_seconds": 0.02, "at": 40, "end": "exception"}
    start({**failing, "log": "RuntimeError: CUDA error: unspecified launch failure"})
    server.until(lambda: len(server.steps()) > 3)

    driver.say(ROWS[0])
    ((call, body),) = server.until(lambda: server.last_calls)

    assert (call, body["reason"]) == ("release", "gpu_lost")


@pytest.mark.parametrize(
    ("says", "code"),
    [(ROWS, 0), (("Failed to initialize NVML: Driver/library version mismatch",), 18), ((), 1)],
)
def test_a_death_for_another_reason_stays_a_failure(
    server: "FakeServer",
    worker: "WorkerProcess",
    driver: Driver,
    start: Callable[..., None],
    says: tuple[str, ...],
    code: int,
) -> None:
    server.post_job()
    start(LONG)
    server.until(lambda: len(server.steps()) > 3)

    driver.say(*says, code=code)
    os.kill(worker.trainer_pids()[0], signal.SIGKILL)
    ((call, body),) = server.until(lambda: server.last_calls)

    assert (call, body["reason"]) == ("finish", "trainer_died")
    assert slots(server) == [2]


def test_which_gpus_are_lost(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", driver.path)
    first, second = parse_gpus("\n".join(ROWS))
    assert second == Gpu(1, "GPU-bbbb", 40960, "NVIDIA A100")

    assert find_lost([first, second]) == ()
    driver.say(ROWS[1])
    assert find_lost([first, second]) == (first,)
    driver.say("No devices were found")
    assert find_lost([first, second]) == (first, second)
    driver.say(LOST, code=15)  # before it lists any
    assert find_lost([first]) == ()
    assert find_lost([first, second]) == (second,)
    driver.say(ROWS[0], "Unable to determine the device handle for GPU1: GPU has fallen off the bus", code=15)
    assert find_lost([first, second]) == (second,)
    driver.say("Unable to determine the device handle: Unknown Error", code=255)
    assert find_lost([second]) == (second,)


def test_a_trainer_that_hangs_because_its_gpu_is_gone_is_no_stall(
    server: "FakeServer", driver: Driver, start: Callable[..., None]
) -> None:
    server.post_job()
    hangs = {**LONG, "hang_at": 20}
    start(hangs, stall_seconds=1, start_stall_seconds=2, stall_factor=5)
    server.until(lambda: len(server.steps()) > 3)

    driver.say(ROWS[0])
    ((call, body),) = server.until(lambda: server.last_calls)

    assert (call, body["reason"]) == ("release", "gpu_lost")
