"""What the trainer gives to whoever watches over it: a pulse, its stacks, and no checkpoint that will not fit."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.trainer.harness import Finished, finish_trainer, start_trainer

from sftd.protocol import TRAINER_PULSE_FILE, TRAINER_STACKS_FILE, TrainerJob
from sftd_worker.trainer import memory
from sftd_worker.trainer.checkpoint import verify
from sftd_worker.trainer.pulse import Pulse
from sftd_worker.trainer.run import run
from sftd_worker.trainer.signals import Signals

MakeJob = Callable[..., TrainerJob]


def test_a_pulse_costs_next_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / ".pulse"
    pulse = Pulse(path)
    moved: set[int] = set()

    began, num_beats = time.perf_counter(), 0
    while time.perf_counter() - began < 2.5:
        for _ in range(1000):
            pulse.beat()
        num_beats += 1000
        moved.add(path.stat().st_mtime_ns)

    assert 2 <= len(moved) <= 4  # once a second, however often it is asked to
    assert num_beats > 100_000  # a few microseconds each, on a busy machine too


def test_a_pulse_on_a_disk_that_refuses_harms_nobody(tmp_path: Path) -> None:
    Pulse(tmp_path / "not there" / ".pulse").beat()


def wait_for(ready: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)  # another process


def test_a_trainer_writes_its_stacks_when_asked_and_goes_on(make_job: MakeJob) -> None:
    job = make_job(max_steps=10, save_steps=5)
    folder = Path(job.output_dir)
    process = start_trainer(job)
    try:
        wait_for((folder / TRAINER_STACKS_FILE).exists)  # before torch is imported
        process.send_signal(signal.SIGUSR2)
        wait_for(lambda: "most recent call first" in (folder / TRAINER_STACKS_FILE).read_text())
        done = finish_trainer(job, process)
    finally:
        process.kill()

    assert done.end is not None
    assert done.end.outcome == "succeeded"
    stacks = (folder / TRAINER_STACKS_FILE).read_text()
    assert (
        "__main__.py" in stacks or "\n  ...\n" in stacks
    )  # deep in imports: faulthandler shows a hundred frames
    assert (folder / TRAINER_PULSE_FILE).exists()


def test_every_rank_writes_its_stacks(make_job: MakeJob) -> None:
    job = make_job(max_steps=10**6, save_steps=10**6, gpus=2, batch_size=2)
    folder = Path(job.output_dir)
    process = start_trainer(job)
    stacks = folder / TRAINER_STACKS_FILE
    try:
        lines = folder / "logs" / "events.jsonl"
        wait_for(lambda: lines.exists() and '"type":"step"' in lines.read_text())
        ranks = [
            int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
        for number, pid in enumerate(ranks, start=1):
            os.kill(pid, signal.SIGUSR2)
            wait_for(lambda: stacks.read_text().count("Current thread") == number, 10)  # noqa: B023  # called at once
        assert len(ranks) == 2
        assert "train.py" in stacks.read_text()
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_the_run_announces_what_its_checkpoints_will_take(run_job: Callable[..., Finished]) -> None:
    done = run_job(method="full", max_steps=2)

    announced = next(line.data["checkpoint_bytes"] for line in done.lines if line.type == "run")
    files = next(line.files for line in done.lines if line.type == "checkpoint")
    tensors = sum(file.bytes for name, file in files.items() if name.endswith(".safetensors"))
    assert announced == pytest.approx(tensors, rel=0.02)


@pytest.mark.parametrize(("optimizer", "each"), [("adamw", 12), ("adamw_8bit", 6)])
def test_frozen_weights_take_no_space(make_job: MakeJob, optimizer: str, each: int) -> None:
    spec = make_job(optimizer=optimizer).spec
    trained, frozen = (
        torch.nn.Parameter(torch.zeros(10)),
        torch.nn.Parameter(torch.zeros(99), requires_grad=False),
    )

    assert memory.checkpoint_bytes(spec, [trained, frozen]) == 10 * each


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], None]]:
    """A disk for the run's checkpoints; call it with its size in KiB."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)

    def resize(kib: int) -> None:
        mounted = "remount," if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{mounted}size={kib}k", "sftd-test", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")

    yield resize
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_checkpoint_that_will_not_fit_is_refused_before_it_is_begun(
    make_job: MakeJob, small_disk: Callable[[int], None], run_job: Callable[..., Finished]
) -> None:
    fields = {"method": "full", "max_steps": 4, "save_steps": 2}
    whole = run_job("whole", **fields)
    first = Path(whole.folder) / "checkpoints" / "checkpoint-2"
    num_bytes = sum(path.stat().st_size for path in first.iterdir())
    small_disk(int(1.5 * num_bytes / 1024))
    job = make_job("run", **fields)
    checkpoints = Path(job.output_dir) / "checkpoints"

    end = run(job, signals=Signals())

    assert (end.outcome, end.reason) == ("failed", "disk_full")
    assert end.message is not None
    assert end.message.startswith("checkpoint of step 4: it needs ")
    assert end.message.endswith("nothing of it was written")
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"]
    assert verify(checkpoints / "checkpoint-2")

    small_disk(int(2.5 * num_bytes / 1024))
    again = job.model_copy(update={"resume_from": str(checkpoints / "checkpoint-2"), "attempt": 2})
    assert run(again, signals=Signals()).outcome == "succeeded"
    result = Path("results") / "model.safetensors"
    assert (Path(job.output_dir) / result).read_bytes() == (whole.folder / result).read_bytes()
