"""The pipeline's own command: its flags, its config file, its folder, and the launchers people start it with."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from tests.trainer.harness import Q_BASICS, ROOT

from sftd_worker.run_sft import UsageError, make_job, parse
from sftd_worker.trainer.checkpoint import verify

SCRIPT = str(ROOT / "worker" / "sftd_worker" / "run_sft.py")
BIN = Path(sys.executable).parent


def flags(tiny: Path, output: Path, *more: str) -> list[str]:
    return [
        "--base_model", str(tiny), "--train_file", str(Q_BASICS), "--eval_file", str(Q_BASICS), "--use_lora",
        "--max_steps", "2", "--learning_rate", "1e-2", "--warmup_steps", "1", "--eval_steps", "2",
        "--output_dir", str(output), "--device", "cpu", *more,
    ]  # fmt: skip


def launch(*command: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=env, check=False)


def test_a_run_leaves_the_agreed_folder_without_a_server(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model:\n  learning_rate: 2e-5\n  lora_rank: 4\n  save_steps: 1\n")

    done = launch(
        sys.executable, SCRIPT, *flags(tiny, tmp_path / "out", "--config", str(config), "--use_no_test_cases")
    )

    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "out" / "tiny"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    assert verify(folder / "results")
    assert "left out: 11 test-case translation" in (folder / "logs" / "training_log.txt").read_text()
    assert [e["step"] for e in json.loads((folder / "logs" / "eval_results.json").read_text())] == [0, 2]
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["learning_rate"] == 1e-2  # the flag wins over the file
    assert written["lora"]["rank"] == 4

    other = launch(sys.executable, SCRIPT, *flags(tiny, tmp_path / "out"))
    assert other.returncode == 2
    assert "already holds a finished run" in other.stderr
    again = launch(
        sys.executable, SCRIPT, *flags(tiny, tmp_path / "out", "--config", str(config), "--use_no_test_cases")
    )
    assert again.returncode == 0, again.stderr
    assert "holds the result already" in again.stdout
    other_rows = launch(sys.executable, SCRIPT, *flags(tiny, tmp_path / "out", "--config", str(config)))
    assert other_rows.returncode == 2
    assert "with other flags or rows" in other_rows.stderr


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_there(
    tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "tiny").mkdir(parents=True)
    with (tmp_path / "out" / "tiny" / ".run.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        second = launch(sys.executable, SCRIPT, *flags(tiny, tmp_path / "out"))

    assert second.returncode == 2
    assert "another run is writing into" in second.stderr


def test_ranks_end_with_their_launcher(tiny: Path, tmp_path: Path) -> None:
    """A torchrun that is killed by SIGKILL cannot end them; they would train on beside the next run in this folder."""
    command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", SCRIPT]
    command += [*flags(tiny, tmp_path / "out"), "--max_steps", "100000"]
    events = tmp_path / "out" / "tiny" / "logs" / "events.jsonl"
    launcher = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (events.exists() and '"type":"step"' in events.read_text()):
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        assert len([rank for rank in ranks if SCRIPT in rank.cmdline()]) == 2
    finally:
        launcher.kill()
        launcher.wait()

    _, alive = psutil.wait_procs(ranks, timeout=20)

    assert alive == []


def test_a_folder_with_checkpoints_of_other_flags_is_refused(tiny: Path, tmp_path: Path) -> None:
    """Else old checkpoints of higher steps would lie among the new ones."""
    done = launch(sys.executable, SCRIPT, *flags(tiny, tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "out" / "tiny" / "results" / "manifest.json").unlink()  # as if it had been interrupted

    other = launch(sys.executable, SCRIPT, *flags(tiny, tmp_path / "out", "--seed", "7"))

    assert other.returncode != 0
    assert "holds checkpoints of a run with other flags" in other.stderr


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tiny: Path, tmp_path: Path) -> None:
    """Also when none is left: then the run begins anew, and says so."""
    command = [sys.executable, SCRIPT, *flags(tiny, tmp_path / "out", "--save_steps", "1")]
    assert launch(*command).returncode == 0
    folder = tmp_path / "out" / "tiny"

    def damage_and_run_again(*names: str) -> list[str]:
        (folder / "results" / "manifest.json").unlink()  # as if it had been interrupted
        for name in names:
            weights = folder / "checkpoints" / name / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1])
        (folder / "logs" / "events.jsonl").unlink()
        done = launch(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [json.loads(line) for line in (folder / "logs" / "events.jsonl").read_text().splitlines()]
        notices = [line["message"] for line in lines if line["type"] == "notice"]
        assert all(notice in done.stdout for notice in notices)
        return [notice for notice in notices if "manifest" in notice]

    assert damage_and_run_again("checkpoint-2") == [
        "checkpoint-2 does not match its manifest and is not used; the run goes on from checkpoint-1. Check the disk."
    ]
    one, other = damage_and_run_again("checkpoint-1", "checkpoint-2")
    assert one.startswith("checkpoint-2 does not match its manifest")
    assert other.startswith("checkpoint-1 does not match its manifest")
    assert "the run begins anew" in one
    assert verify(folder / "checkpoints" / "checkpoint-2")  # written again


@pytest.mark.parametrize(
    "launcher",
    [
        ["torchrun", "--nproc_per_node=2", "--master_port=29611"],
        ["accelerate", "launch", "--num_processes=2", "--main_process_port=29612"],
        ["accelerate", "launch", "--cpu", "--num_processes", "2", "--main_process_port", "29613"],
    ],
    ids=["torchrun", "accelerate", "accelerate --cpu"],
)
def test_two_processes_train_under_each_launcher(launcher: list[str], tiny: Path, tmp_path: Path) -> None:
    done = launch(str(BIN / launcher[0]), *launcher[1:], SCRIPT, *flags(tiny, tmp_path / "out"))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "lora on CPU, 2 process(es)" in done.stdout
    assert verify(tmp_path / "out" / "tiny" / "results")


def test_a_world_that_cannot_be_told_is_refused(tiny: Path, tmp_path: Path) -> None:
    """accelerate asked for several processes and started one, and its command line does not say how many."""
    env = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}
    env.pop("WORLD_SIZE", None)

    done = subprocess.run(
        [sys.executable, SCRIPT, *flags(tiny, tmp_path / "out")],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode != 0
    assert "use torchrun --nproc_per_node=N" in done.stderr
    assert "Traceback" not in done.stderr


def test_fsdp_is_refused_instead_of_turned_into_something_else(tiny: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, *flags(tiny, tmp_path / "out")],
        env={**os.environ, "ACCELERATE_USE_FSDP": "true"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode != 0
    assert "FSDP" in done.stderr


def test_all_flags_of_the_pipeline_are_known(tiny: Path, tmp_path: Path) -> None:
    given = parse(
        flags(
            tiny, tmp_path, "--use_no_test_cases", "--max_seq_length", "99", "--batch_size", "3",
            "--gradient_accumulation_steps", "5", "--use_qlora", "--lora_rank", "4", "--lora_alpha", "8",
            "--lora_dropout", "0.2", "--save_every_n_steps", "7", "--logging_steps", "2", "--bf16",
            "--experiment_name", "e", "--wandb", "--wandb_project", "p", "--run_name", "r", "--seed", "5",
        )
    )  # fmt: skip

    spec = make_job(given, world_size=1).spec

    assert (spec.method, spec.max_seq_length, spec.batch_size, spec.gradient_accumulation_steps) == (
        "qlora",
        99,
        3,
        5,
    )
    assert (spec.lora.rank, spec.lora.alpha, spec.lora.dropout) == (4, 8.0, 0.2)
    assert (spec.save_steps, spec.logging_steps, spec.precision, spec.seed, spec.name) == (
        7,
        2,
        "bf16",
        5,
        "r",
    )
    assert spec.wandb is not None
    assert (spec.wandb.project, spec.wandb.name) == ("p", "r")
    assert parse(flags(tiny, tmp_path, "--save_steps", "9")).save_steps == 9


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--train_file", "/nowhere.jsonl"], "--train_file: there is no file /nowhere.jsonl"),
        (["--max_steps", "-3"], "--max_steps: Input should be greater than or equal to 1"),
        (["--lora_dropout", "2"], "--lora_dropout"),
        (["--config", "/nowhere.yaml"], "--config: /nowhere.yaml cannot be read"),
    ],
)
def test_wrong_flags_are_named(more: list[str], words: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        make_job(parse([*flags(tiny, tmp_path), *more]), world_size=1)


def test_wrong_config_names_and_values_are_named(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    for text, words in [
        ("model: {lr: 1}", "unknown name model.lr"),
        ("model: {max_steps: many}", "model.max_steps is 'many', not a number"),
        ("lora_rank: 3", "has no `model:` section"),
    ]:
        config.write_text(text)
        with pytest.raises(UsageError, match=words):
            parse(flags(tiny, tmp_path, "--config", str(config)))
