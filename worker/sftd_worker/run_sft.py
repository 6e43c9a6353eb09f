#!/usr/bin/env python
"""One run without a server, from flags or YAML: the command of the pipeline that this service grew from.

    python worker/sftd_worker/run_sft.py --base_model Qwen/Qwen2.5-7B-Instruct --train_file train.jsonl --use_lora
    torchrun --nproc_per_node=2 worker/sftd_worker/run_sft.py --base_model … --train_file …
    accelerate launch --num_processes=2 worker/sftd_worker/run_sft.py --base_model … --train_file …

Writes `<output_dir>/<model name>/` with config.yaml, checkpoints/, logs/ and results/. An interrupted run started
again with the same flags goes on from its newest checkpoint.
"""

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NoReturn

if __name__ == "__main__":
    # Run as a file, Python puts this folder first on the path, where `files` or `process` would hide other modules.
    sys.path[:] = [
        entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent
    ]

import yaml
from pydantic import ValidationError

from sftd.protocol import TrainerJob
from sftd.spec import JobSpec
from sftd_worker.trainer.__main__ import forget_quick_lookups, start_ranks
from sftd_worker.trainer.signals import Signals, die_with_parent

# Names that the `model:` section of a --config file may hold, and the spec's fields that they set.
_CONFIG_NAMES = {
    "learning_rate",
    "batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "max_steps",
    "save_steps",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
}


class UsageError(Exception):
    """A flag or the config file is wrong; the message says which and how."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line. Exit code 0 when the run succeeded (or stopped as asked), 1 when it failed, 2 for wrong flags."""
    forget_quick_lookups()
    signals = Signals().install(interrupt_saves=True)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # else ranks would go on when torchrun is killed
        die_with_parent()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        flags = parse(arguments)
        wanted = asked_world()
        if wanted is not None and wanted > 1 and "WORLD_SIZE" not in os.environ:
            _start_missing_ranks(wanted, arguments)
        job = make_job(flags, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        if _is_finished(job):  # every rank looks: one that ended alone would be waited for
            print(f"run_sft: {job.output_dir} holds the result already", flush=True)
            sys.exit(0)
        is_main = os.environ.get("RANK", "0") == "0"
        lock = _lock(Path(job.output_dir)) if is_main else None
    except UsageError as error:
        _refuse(error)

    from sftd_worker.trainer.imports import import_run

    import_run(job)
    from sftd_worker.trainer.run import run_and_end

    notices: list[str] = []
    if is_main:  # its word counts for all ranks
        assert lock is not None
        try:
            job, notices = _go_on(job)
        except UsageError as error:
            _refuse(error)
    run_and_end(job, signals=signals, notices=notices)


def _refuse(error: UsageError) -> NoReturn:
    print(f"run_sft: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def _is_finished(job: TrainerJob) -> bool:
    """Has a run of this job come to its end here? Raises UsageError where another one has."""
    manifest = Path(job.output_dir) / "results" / "manifest.json"
    if not manifest.exists():
        return False
    from sftd_worker.trainer.checkpoint import data_sha_of, is_of_run

    try:
        found = json.loads(manifest.read_text())
        same = is_of_run(found, job.spec) and found.get("data_sha") == data_sha_of(job)
    except (ValueError, AttributeError):  # not ours
        same = False
    if not same:
        raise UsageError(
            f"--output_dir: {job.output_dir} already holds a finished run, with other flags or rows; choose another folder "
            "or remove it"
        )
    return True


def _go_on(job: TrainerJob) -> tuple[TrainerJob, list[str]]:
    """(the job from where an earlier run of it was interrupted, what to tell of that).

    Raises UsageError where the folder holds another run.
    """
    from sftd_worker.trainer.checkpoint import find_checkpoint, verify

    checkpoints = Path(job.output_dir) / "checkpoints"
    found = find_checkpoint(checkpoints, job.spec)
    if found.newest is not None:
        job = job.model_copy(update={"resume_from": str(found.newest)})
    elif any(verify(folder) for folder in checkpoints.glob("checkpoint-*")):
        raise UsageError(
            f"--output_dir: {job.output_dir} holds checkpoints of a run with other flags; give the same flags to go on "
            "with it, or choose another folder"
        )
    return job, found.notices()


def _lock(folder: Path) -> IO[bytes]:
    """Keep other runs out of a folder for as long as this process lives. Raises UsageError where there is one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".run.lock").open("ab")
    except OSError as error:
        raise UsageError(f"--output_dir: {folder} cannot be written to ({error.strerror})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"--output_dir: another run is writing into {folder}; wait for it or choose another folder"
        ) from None
    except OSError as error:  # some file systems have no locks
        print(
            f"run_sft: {folder} cannot be locked ({error.strerror}); let no other run write there", flush=True
        )
    return lock


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Flags, with the --config file's values where a flag was not given."""
    parser = _parser()
    flags = parser.parse_args(argv)
    config = _read_config(flags.config) if flags.config else {}
    for name, value in config.items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    return flags


def make_job(flags: argparse.Namespace, *, world_size: int) -> TrainerJob:
    """The trainer's job from the flags. Raises UsageError naming the flag."""
    training = _data_file("--train_file", flags.train_file)
    validation = _data_file("--eval_file", flags.eval_file) if flags.eval_file else None
    method = "qlora" if flags.use_qlora else "lora" if flags.use_lora else "full"
    fields: dict[str, Any] = {
        "base_model": _base_model(flags.base_model),
        "method": method,
        "training_file": str(training),
        "validation_file": None if validation is None else str(validation),
        "max_seq_length": flags.max_seq_length,
        "learning_rate": flags.learning_rate,
        "batch_size": flags.batch_size,
        "gradient_accumulation_steps": flags.gradient_accumulation_steps,
        "warmup_steps": flags.warmup_steps,
        "max_steps": flags.max_steps,
        "save_steps": flags.save_steps,
        "eval_steps": flags.eval_steps,
        "logging_steps": flags.logging_steps,
        "seed": flags.seed,
        "precision": "bf16" if flags.bf16 else None,
        "gpus": world_size,
        "name": flags.run_name or flags.experiment_name,
        "lora": _given(rank=flags.lora_rank, alpha=flags.lora_alpha, dropout=flags.lora_dropout),
    }
    if flags.wandb:
        fields["wandb"] = {"project": flags.wandb_project, "name": flags.run_name or flags.experiment_name}
    try:
        spec = JobSpec.model_validate(_given(**fields))
    except ValidationError as error:
        raise UsageError(
            "; ".join(f"--{_flag_of(line['loc'])}: {line['msg']}" for line in error.errors())
        ) from error
    output = _output_folder(flags, method)
    return TrainerJob(
        job_id=flags.experiment_name or output.name,
        attempt=1,
        spec=spec,
        model_path=spec.base_model,
        training_path=str(training),
        training_name=training.name,
        validation_path=None if validation is None else str(validation),
        validation_name=None if validation is None else validation.name,
        output_dir=str(output),
        cache_dir=str(output / ".cache"),
        device=flags.device,
        skip_test_translation=flags.use_no_test_cases,
    )


def asked_world() -> int | None:
    """How many processes `accelerate launch` was asked for, where it can be told; None otherwise.

    accelerate 1.15 starts ONE process for `launch --num_processes=2` on a machine without GPUs, and says nothing. It
    leaves two traces: MASTER_PORT without WORLD_SIZE in the environment, and its own command line.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        # On a CPU accelerate would turn it into DDP without a word.
        raise UsageError(
            "accelerate was configured for FSDP, which this version does not have; use a plain config"
        )
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if not by_accelerate or "WORLD_SIZE" in os.environ or "MASTER_PORT" not in os.environ:
        return None
    number = _num_processes(_command_line_of(os.getppid()))
    if number is None:
        raise UsageError(
            "accelerate launch was asked for several processes and started one; use torchrun --nproc_per_node=N"
        )
    return number


# ---------------------------------------------------------------- flags


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run_sft", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--base_model", required=True, help="hub id or folder")
    add("--train_file", required=True, help="training rows: JSONL or a JSON array")
    add("--eval_file", help="rows to evaluate on")
    add("--use_no_test_cases", action="store_true", help="leave out rows whose task is test-case translation")
    add("--max_steps", type=int, help="optimizer steps (1000)")
    add("--max_seq_length", type=int, help="longest row in tokens (2048)")
    add("--learning_rate", type=float, help="peak rate (2e-5)")
    add("--batch_size", type=int, help="rows per device per micro-step (1)")
    add("--gradient_accumulation_steps", type=int, help="micro-steps per optimizer step (8)")
    add("--warmup_steps", type=int, help="linear warm-up (100)")
    add("--use_lora", action="store_true", help="train an adapter")
    add("--use_qlora", action="store_true", help="train an adapter on NF4 weights")
    add("--lora_rank", type=int, help="16")
    add("--lora_alpha", type=float, help="32")
    add("--lora_dropout", type=float, help="0.1")
    add(
        "--save_steps",
        "--save_every_n_steps",
        dest="save_steps",
        type=int,
        help="checkpoint every so many steps (50)",
    )
    add("--eval_steps", type=int, help="evaluate every so many steps (20)")
    add("--logging_steps", type=int, help="report every so many steps (1)")
    add("--bf16", action="store_true", help="compute in bf16 (default: where the device has it)")
    add("--output_dir", help="where the run's folder goes (outputs/sft_<model>_<time>)")
    add("--experiment_name", help="name of the experiment")
    add("--wandb", action="store_true", help="log to Weights & Biases")
    add("--wandb_project", default="q-sft", help="W&B project (q-sft)")
    add("--run_name", help="W&B run name (the experiment name)")
    add("--seed", type=int, help="42")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto takes a GPU if there is one")
    add("--config", help="YAML with a `model:` section; flags win over it")
    return parser


def _read_config(path: str) -> dict[str, Any]:
    """The `model:` section of a config file. PyYAML reads 2e-5 as text, so numbers are made of it here."""
    try:
        body = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config: {path} cannot be read: {error}") from error
    section = body.get("model") if isinstance(body, dict) else None
    if not isinstance(section, dict):
        raise UsageError(f"--config: {path} has no `model:` section")
    unknown = sorted(set(section) - _CONFIG_NAMES)
    if unknown:
        raise UsageError(
            f"--config: {path}: unknown name model.{unknown[0]}; known: {', '.join(sorted(_CONFIG_NAMES))}"
        )
    floats = {"learning_rate", "lora_alpha", "lora_dropout"}
    values: dict[str, Any] = {}
    for name, value in section.items():
        try:
            values[name] = float(value) if name in floats else int(value)
        except (TypeError, ValueError):
            raise UsageError(f"--config: {path}: model.{name} is {value!r}, not a number") from None
        if name not in floats and isinstance(value, float) and value != int(value):
            raise UsageError(f"--config: {path}: model.{name} is {value!r}, not a whole number")
    return values


def _given(**fields: Any) -> dict[str, Any]:
    """The fields that were given: the rest keep the spec's defaults."""
    return {name: value for name, value in fields.items() if value is not None}


def _flag_of(location: tuple[int | str, ...]) -> str:
    """The flag behind a field of the spec."""
    names = [str(part) for part in location]
    if names[:1] == ["lora"]:
        return "_".join(names)
    return {"training_file": "train_file", "validation_file": "eval_file", "wandb": "wandb_project"}.get(
        names[0], names[0]
    )


def _data_file(flag: str, given: str) -> Path:
    path = Path(given).expanduser().resolve()
    if not path.is_file():
        raise UsageError(f"{flag}: there is no file {given}")
    return path


def _base_model(given: str) -> str:
    """A folder becomes absolute; anything else is a hub id."""
    folder = Path(given).expanduser()
    return str(folder.resolve()) if folder.is_dir() else given


def _output_folder(flags: argparse.Namespace, method: str) -> Path:
    model = Path(flags.base_model.rstrip("/")).name
    if flags.output_dir is not None:
        base = Path(flags.output_dir)
    else:
        if "WORLD_SIZE" in os.environ:
            raise UsageError("--output_dir: give one when several processes train together")
        base = Path("outputs") / f"sft_{model}_{method}_{datetime.now():%Y%m%d_%H%M%S}"
    return base.expanduser().resolve() / model


# ---------------------------------------------------------------- several processes


def _start_missing_ranks(number: int, arguments: list[str]) -> None:
    print(
        f"accelerate launch was asked for {number} processes and started 1: starting {number} by torchrun",
        flush=True,
    )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    start_ranks(number, [str(Path(__file__).resolve()), *arguments])


def _command_line_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _num_processes(command: list[str]) -> int | None:
    """The value of --num_processes (or --num-processes) in a command line."""
    for i, word in enumerate(command):
        name, _, value = word.partition("=")
        if name.replace("-", "_") == "__num_processes":
            text = value or (command[i + 1] if i + 1 < len(command) else "")
            return int(text) if text.isdigit() else None
    return None


if __name__ == "__main__":
    main()
