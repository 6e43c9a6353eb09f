"""The spec reports every mistake at once, under the field's own name."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sftd.spec import JobSpec

LEAST = {"base_model": "Qwen/Qwen2.5-7B-Instruct", "training_file": "file_1"}


def mistakes(**fields: Any) -> dict[str, str]:
    with pytest.raises(ValidationError) as invalid:
        JobSpec.model_validate_json(json.dumps({**LEAST, **fields}))
    return {".".join(map(str, line["loc"])): line["msg"] for line in invalid.value.errors()}


def test_two_fields_are_enough_and_the_rest_are_the_agreed_defaults() -> None:
    spec = JobSpec.model_validate(LEAST)

    assert spec.model_dump(exclude={"base_model", "training_file"}) == {
        "method": "lora", "validation_file": None, "validation_split": None, "max_seq_length": 2048,
        "learning_rate": 2e-5, "batch_size": 1, "gradient_accumulation_steps": 8, "warmup_steps": 100,
        "warmup_ratio": None, "max_steps": 1000, "num_epochs": None, "save_steps": 50, "eval_steps": 20,
        "logging_steps": 1, "lr_scheduler": "linear", "optimizer": "adamw", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "seed": 42, "precision": "auto", "gradient_checkpointing": True, "packing": True,
        "max_tokens_per_step": None, "train_on": "completion", "on_overlong": "error",
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.1, "target_modules": "all-linear", "use_rslora": False, "use_dora": False},
        "evaluation": None, "wandb": None, "gpus": 1, "sharding": "auto", "priority": 0, "name": None, "metadata": {},
        "after": [], "requires": None, "max_seconds": None, "max_gpu_seconds": None, "max_tokens": None,
        "keep_checkpoints": None,
    }  # fmt: skip


def test_mistakes_in_fields_and_between_fields_come_together() -> None:
    found = mistakes(
        learning_rat=1, max_steps=-1, num_epochs=2, lora={"rank": "8"}, metadata={"a": 1}, batch_size="4"
    )

    assert set(found) == {"learning_rat", "max_steps", "num_epochs", "lora.rank", "metadata.a", "batch_size"}


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_ratio"),
        ({"validation_file": "file_2", "validation_split": 0.1}, "validation_split"),
        ({"evaluation": {"problems_file": "file_3"}}, "evaluation"),
        ({"method": "qlora", "precision": "fp32"}, "precision"),
        ({"method": "qlora", "sharding": "fsdp"}, "sharding"),
        ({"sharding": "fsdp", "optimizer": "paged_adamw_8bit"}, "optimizer"),
        ({"base_model": "../secrets"}, "base_model"),
        ({"base_model": "/models/../etc"}, "base_model"),
        ({"base_model": "a/b/c"}, "base_model"),
        ({"lora": {"target_modules": []}}, "lora.target_modules"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"name": "two\nlines"}, "name"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout"),
        ({"seed": True}, "seed"),
        ({"wandb": {"project": "p", "api_key": "secret"}}, "wandb.api_key"),
    ],
)
def test_each_mistake_stands_under_its_field(fields: dict[str, Any], where: str) -> None:
    assert any(name.startswith(where) for name in mistakes(**fields))


@pytest.mark.parametrize("model", ["gpt2", "Qwen/Qwen2.5-7B", "/models/a", "job:job_1", "job:job_1@50"])
def test_a_base_is_a_hub_id_a_folder_or_a_job(model: str) -> None:
    assert JobSpec.model_validate({**LEAST, "base_model": model}).base_model == model


def test_epochs_leave_max_steps_open_and_a_spec_survives_a_round_trip() -> None:
    spec = JobSpec.model_validate({**LEAST, "num_epochs": 2, "warmup_ratio": 0.1})

    assert (spec.max_steps, spec.warmup_steps) == (None, None)
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


def test_infinities_are_refused() -> None:
    with pytest.raises(ValidationError):
        JobSpec.model_validate({**LEAST, "learning_rate": float("inf")})


def test_importing_the_client_brings_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, sftd, sftd.spec; print([m for m in ('torch', 'fastapi', 'httpx', 'typer', 'rich') if m in sys.modules])"

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path("/")
    )

    assert done.stdout.strip() == "[]"
