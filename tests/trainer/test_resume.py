"""Killed anywhere and started again, a run is the uninterrupted run, bit for bit. The real trainer process is killed."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.harness import Q_BASICS, Finished, finish_trainer, start_trainer

from sftd.protocol import TrainerJob
from sftd_worker.trainer.checkpoint import find_checkpoint, require_whole, verify
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.run import run
from sftd_worker.trainer.signals import Signals

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "learning_rate": 1e-3},
    "lora with dropout": {"method": "lora", "lora": {"rank": 4, "dropout": 0.2}},
    "qlora": {"method": "qlora", "precision": "auto"},
    "8-bit optimizer": {"method": "full", "learning_rate": 1e-3, "optimizer": "adamw_8bit"},
    "paged optimizer": {"method": "full", "learning_rate": 1e-3, "optimizer": "paged_adamw_8bit"},
}
COMMON = {"max_steps": 12, "save_steps": 3, "eval_steps": 4, "validation_split": 0.1, "batch_size": 8}


def weights(run: Finished) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}/{name}": value
        for path in sorted((run.folder / "results").glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def assert_identical(one: Finished, other: Finished) -> None:
    for name in ("loss", "learning_rate", "grad_norm", "eval_loss", "tokens_seen"):
        assert one.values(name) == other.values(name), name
    assert one.evaluations() == other.evaluations()
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def wait_for(process: Any, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def steps_done(folder: Path) -> int:
    path = folder / "logs" / "events.jsonl"
    return path.read_text().count('"seconds"') if path.exists() else 0


def resumed(job: TrainerJob) -> TrainerJob:
    newest = find_checkpoint(Path(job.output_dir) / "checkpoints", job.spec).newest
    return job.model_copy(update={"attempt": job.attempt + 1, "resume_from": str(newest) if newest else None})


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_at_a_checkpoint_goes_on_bit_identically(
    variant: str, make_job: Callable[..., TrainerJob]
) -> None:
    """In one process, for every method: the loop is left after a checkpoint and entered again from it."""
    whole = make_job("whole", **COMMON, **VARIANTS[variant])
    assert run(whole, signals=Signals()).outcome == "succeeded"
    job = make_job("cut", **COMMON, **VARIANTS[variant])
    for attempt in range(1, 6):
        signals = Signals()
        signals.save_and_stop = attempt < 5  # the first attempts save before their first step and stop
        if attempt > 1:
            job = resumed(job)
        outcome = run_some_steps(job, signals, steps=3)
    assert outcome == "succeeded"

    assert_identical(
        Finished(None, Path(whole.output_dir)),
        Finished(None, Path(job.output_dir)),
    )


def test_a_run_goes_on_with_as_many_threads_as_it_began_with(make_job: Callable[..., TrainerJob]) -> None:
    """Wherever its checkpoint was taken to, and whatever that machine has: the last bits depend on it."""
    spec = {**VARIANTS["full"], "max_steps": 4, "save_steps": 2, "batch_size": 8}

    def finished(name: str, *, threads: int, **job: Any) -> Finished:
        run = make_job(name, job=job, **spec)
        return finish_trainer(run, start_trainer(run, OMP_NUM_THREADS=str(threads)))

    whole, other = finished("whole", threads=1), finished("other", threads=2)
    assert whole.values("loss") != other.values("loss")
    for began, threads in ((whole, 2), (other, 1)):
        checkpoint = began.folder / "checkpoints" / "checkpoint-2"
        resumed = finished(f"resumed-{threads}", threads=threads, attempt=2, resume_from=str(checkpoint))
        left = weights(began)
        assert all(torch.equal(left[name], value) for name, value in weights(resumed).items())
        losses = resumed.values("loss")
        assert losses == {step: loss for step, loss in began.values("loss").items() if step > 2}
        assert f"{3 - threads} thread(s), as before" in resumed.log


def test_a_file_of_evaluations_that_an_attempt_in_between_left_shorter_is_made_whole(
    make_job: Callable[..., TrainerJob],
) -> None:
    """That one went on from an older checkpoint, and was killed before it came as far."""
    job = make_job(**COMMON, **VARIANTS["full"])
    run(job, signals=Signals())
    ended = Finished(None, Path(job.output_dir))
    whole = ended.evaluations()
    (ended.folder / "logs" / "eval_results.json").write_text(json.dumps(whole[:2]))

    assert run(resumed(job), signals=Signals()).outcome == "succeeded"

    assert len(whole) == 4
    assert ended.evaluations() == whole


def run_some_steps(job: TrainerJob, signals: Signals, *, steps: int) -> str:
    """Run, and ask to save and stop once `steps` more steps are done."""
    from sftd_worker.trainer import train as train_module

    wanted = signals.save_and_stop
    signals.save_and_stop = False
    real, left = train_module._accumulate, steps

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        signals.save_and_stop = wanted and left <= 0
        return real(*args, **options)

    train_module._accumulate = counting
    try:
        return run(job, signals=signals).outcome
    finally:
        train_module._accumulate = real


@pytest.mark.parametrize("kill_at", [1, 4, 8])
def test_kill_9_in_the_middle_then_resume(kill_at: int, make_job: Callable[..., TrainerJob]) -> None:
    fields = {**COMMON, **VARIANTS["lora with dropout"]}
    whole, job = make_job("whole", **fields), make_job("killed", **fields)
    reference = start_trainer(whole)
    process = start_trainer(job)
    wait_for(process, lambda: steps_done(Path(job.output_dir)) >= kill_at)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    again = resumed(job)
    finished = finish_trainer(again, start_trainer(again))

    assert finished.returncode == 0, finished.output
    assert_identical(finish_trainer(whole, reference), finished)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty", "no manifest"])
def test_a_damaged_checkpoint_is_told_from_a_whole_one(
    damage: str, make_job: Callable[..., TrainerJob]
) -> None:
    job = make_job(max_steps=4, save_steps=2)
    run(job, signals=Signals())
    checkpoints = Path(job.output_dir) / "checkpoints"
    newest = checkpoints / "checkpoint-4"
    victim = newest / ("manifest.json" if damage == "no manifest" else "optimizer.safetensors")
    data = victim.read_bytes()
    if damage in ("missing", "no manifest"):
        victim.unlink()
    else:
        broken = {"truncated": data[:-10], "empty": b"", "flipped": data[:-1] + bytes([data[-1] ^ 1])}
        victim.write_bytes(broken[damage])

    assert verify(newest) is None
    assert find_checkpoint(checkpoints, job.spec).newest == checkpoints / "checkpoint-2"
    with pytest.raises(RunFailed, match="does not match its manifest"):
        require_whole(newest, job.spec)


def test_a_checkpoint_of_another_spec_is_not_resumed_from(make_job: Callable[..., TrainerJob]) -> None:
    job = make_job(max_steps=4)
    run(job, signals=Signals())
    other = make_job(max_steps=4, learning_rate=3e-3)

    assert find_checkpoint(Path(job.output_dir) / "checkpoints", other.spec).newest is None


def test_a_run_started_again_under_the_same_attempt_says_its_own_end(
    make_job: Callable[..., TrainerJob],
) -> None:
    """Without a server each start is attempt 1."""
    job = make_job(max_steps=4)
    asked = Signals()
    asked.save_and_stop = True
    assert run_some_steps(job, asked, steps=2) == "stopped"
    newest = find_checkpoint(Path(job.output_dir) / "checkpoints", job.spec).newest

    assert run(job.model_copy(update={"resume_from": str(newest)}), signals=Signals()).outcome == "succeeded"

    lines = Finished(None, Path(job.output_dir)).lines
    assert [line.outcome for line in lines if line.type == "end"] == ["stopped", "succeeded"]


def test_a_checkpoint_of_other_rows_is_not_resumed_from(
    make_job: Callable[..., TrainerJob], tmp_path: Path
) -> None:
    """A file that was edited between two starts of the same command."""
    rows = tmp_path / "rows.jsonl"
    lines = Q_BASICS.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines))
    job = make_job(max_steps=4, job={"training_path": str(rows)})
    assert run(job, signals=Signals()).outcome == "succeeded"
    again = job.model_copy(update={"resume_from": f"{job.output_dir}/checkpoints/checkpoint-2"})

    rows.write_text("".join(lines[:-1]))
    edited = run(again, signals=Signals())
    fewer = run(again.model_copy(update={"skip_test_translation": True}), signals=Signals())
    rows.write_text("".join(lines))

    assert edited.reason == fewer.reason == "bad_spec"
    assert "was trained on other rows" in (edited.message or "")
    assert run(again, signals=Signals()).outcome == "succeeded"


def test_a_full_disk_leaves_no_half_checkpoint_to_fill_it(
    make_job: Callable[..., TrainerJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sftd_worker.trainer.checkpoint.write_tensors", full)
    job = make_job(max_steps=2)

    end = run(job, signals=Signals())

    assert end.reason == "disk_full"
    assert list((Path(job.output_dir) / "checkpoints").iterdir()) == []


def test_what_killed_attempts_left_half_written_is_cleared_by_the_next_save(
    make_job: Callable[..., TrainerJob],
) -> None:
    job = make_job(max_steps=2, job={"attempt": 3})
    checkpoints = Path(job.output_dir) / "checkpoints"
    for name in (".stage-1", ".stage-2", ".trash-checkpoint-2"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "model.safetensors").write_bytes(b"half")

    run(job, signals=Signals())

    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"]


def test_sigterm_stops_between_steps_without_a_new_checkpoint(make_job: Callable[..., TrainerJob]) -> None:
    job = make_job(max_steps=100_000, save_steps=100_000)
    process = start_trainer(job)
    wait_for(process, lambda: steps_done(Path(job.output_dir)) >= 2)

    os.killpg(process.pid, signal.SIGTERM)
    run = finish_trainer(job, process)

    assert run.returncode == 0
    assert run.end is not None
    assert run.end.outcome == "stopped"
    assert not (run.folder / "checkpoints").exists()


def test_sigusr1_saves_a_checkpoint_and_stops(make_job: Callable[..., TrainerJob]) -> None:
    job = make_job(max_steps=100_000, save_steps=100_000)
    process = start_trainer(job)
    wait_for(process, lambda: steps_done(Path(job.output_dir)) >= 2)

    os.killpg(process.pid, signal.SIGUSR1)
    run = finish_trainer(job, process)

    assert run.returncode == 0
    assert run.end is not None
    assert run.end.outcome == "stopped"
    saved = [line for line in run.lines if line.type == "checkpoint"]
    assert [line.name for line in saved] == [path.name for path in (run.folder / "checkpoints").iterdir()]
    assert verify(run.folder / "checkpoints" / saved[0].name)


def test_the_trainer_dies_with_its_parent(make_job: Callable[..., TrainerJob], tmp_path: Path) -> None:
    """However the worker ends, no training goes on unseen."""
    import subprocess
    import sys

    job = make_job(max_steps=100_000, save_steps=100_000)
    folder = Path(job.output_dir)
    (folder / "job.json").write_text(job.model_dump_json())
    code = f"import subprocess,sys; subprocess.Popen([sys.executable,'-m','sftd_worker.trainer',{str(folder)!r}]).wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(parent, lambda: steps_done(folder) >= 1)

    parent.kill()
    parent.wait()

    before = -1
    deadline = time.monotonic() + 20
    while before != steps_done(folder):
        assert time.monotonic() < deadline
        before = steps_done(folder)
        time.sleep(1.0)  # real time: the question is whether anything still happens in it
