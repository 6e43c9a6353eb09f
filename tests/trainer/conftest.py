"""A small model built on the spot, and a way to run the trainer on it through its real entry point."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import tiny_model
from peft import LoraConfig, get_peft_model
from tests.trainer.harness import Q_BASICS, Finished
from transformers import AutoModelForCausalLM

from sftd.protocol import TrainerJob
from sftd.spec import JobSpec
from sftd_worker.trainer.run import run
from sftd_worker.trainer.signals import Signals

SMALL = {
    "method": "lora",
    "max_steps": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "save_steps": 2,
    "eval_steps": 2,
    "max_seq_length": 512,
    "precision": "fp32",
}


@pytest.fixture(scope="session")
def build_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Build a small model; the same arguments give the same folder."""
    made: dict[str, Path] = {}

    def build(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("model") / "tiny"
            made[key] = tiny_model.build(
                folder, Q_BASICS, **{"hidden_size": 64, "vocab_size": 1024, **options}
            )
        return made[key]

    return build


@pytest.fixture(scope="session")
def tiny(build_model: Callable[..., Path]) -> Path:
    return build_model()


@pytest.fixture(scope="session")
def draw_adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a new adapter of the small model, as peft draws it; keyword arguments are fields of LoraConfig."""

    def draw(*, seed: int, **options: Any) -> Path:
        model = AutoModelForCausalLM.from_pretrained(tiny)
        torch.manual_seed(seed)
        config = LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
        folder = tmp_path_factory.mktemp("adapter")
        get_peft_model(model, config).save_pretrained(folder)
        return folder

    return draw


@pytest.fixture(scope="session")
def first_adapter(draw_adapter: Callable[..., Path]) -> Path:
    """An adapter to begin with, both of whose factors are random: each has a gradient from the first step on."""
    return draw_adapter(seed=7, init_lora_weights=False, r=8, lora_alpha=16)


@pytest.fixture
def make_job(tiny: Path, tmp_path: Path) -> Callable[..., TrainerJob]:
    """A trainer's job over the example data; keyword arguments are fields of the spec, or of the job with job_=…"""

    def make(name: str = "run", *, job: dict[str, Any] | None = None, **spec: Any) -> TrainerJob:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        fields = {**SMALL, "base_model": str(tiny), "training_file": "file_1", **spec}
        made = {
            "job_id": "job_1",
            "attempt": 1,
            "model_path": fields["base_model"],
            "training_path": str(Q_BASICS),
            "training_name": "q_basics.jsonl",
            "output_dir": str(folder),
            "cache_dir": str(tmp_path / "cache"),
            "device": "cpu",
            **(job or {}),
        }
        return TrainerJob(spec=JobSpec.model_validate(fields), **made)

    return make


@pytest.fixture
def run_job(make_job: Callable[..., TrainerJob]) -> Callable[..., Finished]:
    """Run a job in this process and return what it left."""

    def start(name: str = "run", **options: Any) -> Finished:
        job = make_job(name, **options)
        return Finished(run(job, signals=Signals()), Path(job.output_dir))

    return start
