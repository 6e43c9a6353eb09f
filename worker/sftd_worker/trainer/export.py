"""The result of a run: `results/`, a folder that transformers or peft load by themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sftd import __version__
from sftd.protocol import TrainerJob
from sftd.schemas import ManifestFile
from sftd_worker.trainer.checkpoint import (
    RunState,
    clear_unfinished,
    config_sha,
    disk_errors,
    publish,
    run_sha,
    save_weights,
    write_manifest,
)
from sftd_worker.trainer.model import Model


def export(
    output: Path,
    *,
    model: Model,
    tokenizer: Any,
    job: TrainerJob,
    state: RunState,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, ManifestFile]:
    """Write `output`/results: weights or adapter, tokenizer with its chat template, model card, manifest.

    A `full` model is saved in the type that its base is stored in (fp32 if the run computed in fp32), an adapter in
    fp32. Returns the manifest's files. Raises RunFailed(disk_full). Where weights are sharded all ranks call this, and
    rank 0 writes. `alive` is called between pieces of the work.
    """
    dtype = torch.float32 if model.precision.name == "fp32" else model.stored_dtype
    if model.shards is not None and not model.shards.world.is_main:
        save_weights(model, output, dtype=dtype)
        return {}
    stage = output / f".stage-results-{job.attempt}"
    with disk_errors("result", leaving=stage):
        clear_unfinished(output)
        stage.mkdir(parents=True)
        save_weights(model, stage, dtype=dtype)
        alive()
        tokenizer.save_pretrained(stage)
        (stage / "README.md").write_text(_card(job, state), encoding="utf-8")
        facts = {"step": state.step, "attempt": job.attempt, "metrics": state.metrics}
        hashes = {
            "config_sha": config_sha(job.spec),
            "run_sha": run_sha(job.spec),
            "data_sha": state.data_sha,
        }
        files, _ = write_manifest(stage, {**facts, **hashes}, alive=alive)
        publish(stage, output / "results")
    return files


def _card(job: TrainerJob, state: RunState) -> str:
    """A model card: what this is, from what, and with which numbers."""
    spec = job.spec
    library = "transformers" if spec.method == "full" else "peft"
    facts: dict[str, object] = {
        "base model": f"`{spec.base_model}`",
        "method": spec.method,
        "training data": f"`{job.training_name}`",
        "optimizer steps": state.step,
        "tokens seen": f"{state.tokens_seen:,}",
        "rows per step": spec.batch_size * spec.gradient_accumulation_steps * spec.gpus,
        "learning rate": f"{spec.learning_rate:g}, {spec.lr_scheduler}",
        "loss on": spec.train_on,
        "seed": spec.seed,
    }
    if spec.method != "full":
        facts["adapter"] = f"rank {spec.lora.rank}, alpha {spec.lora.alpha:g}, dropout {spec.lora.dropout:g}"
    facts |= {name.replace("_", " "): f"{value:.4f}" for name, value in state.metrics.items()}
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        f"---\nlibrary_name: {library}\nbase_model: {job.model_path}\ntags:\n- sftd\n- sft\n---\n\n"
        f"# {spec.name or job.job_id}\n\nTrained with sftd {__version__}.\n\n| | |\n|---|---|\n{rows}\n"
    )
