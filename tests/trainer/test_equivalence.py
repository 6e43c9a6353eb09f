"""Configurations that must give the same run: each through the real entry point on a small model.

The mean difference is looked at as well as the largest: a dropped gradient is a drift, not a spike.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tests.trainer.harness import Finished, finish_trainer, start_trainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Phi3Config,
    Phi3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from sftd.protocol import TrainerJob
from sftd_worker.trainer import train as train_module
from sftd_worker.trainer.batching import make_plan
from sftd_worker.trainer.checkpoint import hash_file
from sftd_worker.trainer.data import Tokenizing, TokenRows, tokenize_file
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.events import Events
from sftd_worker.trainer.model import Model, Precision, load_tokenizer
from sftd_worker.trainer.world import World

RunJob = Callable[..., Finished]
FULL: dict[str, Any] = {"method": "full", "learning_rate": 1e-3, "max_steps": 6, "validation_split": 0.1}


def weights(run: Finished) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}/{name}": value.float()
        for path in sorted((run.folder / "results").glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def assert_same_run(one: Finished, other: Finished, *, rtol: float = 1e-5, mean_rtol: float = 1e-6) -> None:
    assert one.end is not None
    assert other.end is not None
    assert one.end.outcome == other.end.outcome == "succeeded", (one.end.message, other.end.message)
    for name in ("loss", "learning_rate", "eval_loss"):
        first, second = one.values(name), other.values(name)
        assert first.keys() == second.keys()
        assert np.array(list(first.values())) == pytest.approx(np.array(list(second.values())), rel=rtol)
    differences, sizes = [], []
    other_weights = weights(other)
    for name, value in weights(one).items():
        differences.append((value - other_weights[name]).abs().mean().item())
        sizes.append(value.abs().mean().item())
    assert np.mean(differences) / np.mean(sizes) < mean_rtol * 10


@pytest.fixture
def reference(run_job: RunJob) -> Finished:
    return run_job("reference", **FULL)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 8, "gradient_accumulation_steps": 1},
        {"batch_size": 1, "gradient_accumulation_steps": 8},
        {"batch_size": 2, "gradient_accumulation_steps": 4},
        {"packing": False},
        {"packing": False, "batch_size": 1, "gradient_accumulation_steps": 8},
        {"gradient_checkpointing": False},
    ],
    ids=str,
)
def test_how_a_step_is_cut_into_micro_batches_does_not_matter(
    change: dict[str, Any], reference: Finished, run_job: RunJob
) -> None:
    assert_same_run(reference, run_job("changed", **{**FULL, **change}))


def test_padded_batches_give_the_same_run(
    reference: Finished, run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sftd_worker.trainer.model._try_end_to_end", lambda causal, device: (False, "told so by a test")
    )

    padded = run_job("padded", **FULL)

    assert "packing is off for this model: told so by a test" in padded.log
    assert_same_run(reference, padded)


def test_rows_beside_a_long_one_keep_their_rotary_positions(
    run_job: RunJob, tiny: Path, tmp_path: Path
) -> None:
    """longrope takes other frequencies for all of a micro-batch once one row of it is long."""
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [8.0] * 8,
    }
    config = Phi3Config(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        max_position_embeddings=4096,
        original_max_position_embeddings=64,
        rope_parameters={**longrope, "original_max_position_embeddings": 64},
    )
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "long")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "long")
    fields = {**FULL, "base_model": str(tmp_path / "long"), "max_steps": 2}

    alone = run_job(
        "alone", **{**fields, "packing": False, "batch_size": 1, "gradient_accumulation_steps": 8}
    )

    assert_same_run(alone, run_job("packed", **fields), rtol=1e-6)
    assert_same_run(alone, run_job("padded", **{**fields, "packing": False}), rtol=1e-6)


def test_out_of_memory_on_a_rank_without_rows_is_told_as_such(
    make_job: Callable[..., TrainerJob], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An epoch's last step may leave a rank nothing, while another cannot fit its one row."""
    monkeypatch.setattr(train_module, "any_rank", lambda world, *flags: [True, True])
    world = World(rank=1, size=2, device=torch.device("cpu"))
    rows = TokenRows(Dataset.from_dict({}), np.array([], int), np.array([], int), 64)
    model = Model(torch.nn.Linear(1, 1), None, Precision("fp32", ""), world.device, True, None, torch.float32)
    events = Events(tmp_path, attempt=1, silent=True)

    with pytest.raises(RunFailed) as failed:
        train_module._accumulate(
            model, rows, [], 1, train_module._Budget(1, 64), True, 0, 0, 0, world, events
        )

    assert failed.value.reason == "out_of_memory"


def test_chunks_of_the_head_do_not_matter(
    reference: Finished, run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftd_worker.trainer.loss.CHUNK_LOGITS", 1024 * 7)  # 7 positions at a time

    assert_same_run(reference, run_job("chunked", **FULL))


def test_two_ranks_give_the_run_of_one(make_job: Callable[..., TrainerJob]) -> None:
    alone = make_job("alone", **FULL)
    together = make_job("together", **{**FULL, "batch_size": 2, "gpus": 2})

    processes = [start_trainer(alone), start_trainer(together)]
    one, two = [
        finish_trainer(job, process) for job, process in zip((alone, together), processes, strict=True)
    ]

    assert two.returncode == 0, two.output
    assert "2 process(es)" in two.log
    assert_same_run(one, two, rtol=1e-5)


def test_a_run_of_two_ranks_ends_once_with_the_reason_of_the_one_that_failed(
    make_job: Callable[..., TrainerJob], tmp_path: Path
) -> None:
    """The other rank sees a broken connection: that is no reason."""
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n')
    job = make_job(gpus=2, job={"training_path": str(tmp_path / "bad.jsonl")})

    run = finish_trainer(job, start_trainer(job))

    assert run.returncode != 0
    assert [line.reason for line in run.lines if line.type == "end"] == ["bad_data"]


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(
    reference: Finished, run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Model.hidden

    def small_memory(self: Model, batch: Any) -> torch.Tensor:
        if self.net.training and batch.input_ids.numel() > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return whole(self, batch)

    monkeypatch.setattr(Model, "hidden", small_memory)

    squeezed = run_job("squeezed", **FULL)

    assert "out of memory; the same step again" in squeezed.log
    assert_same_run(reference, squeezed)


def test_memory_too_small_for_one_row_fails_with_that_reason(
    run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(self: Model, batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Model, "hidden", no_memory)

    run = run_job(max_steps=1)

    assert run.end is not None
    assert run.end.reason == "out_of_memory"
    assert "not even one row" in (run.end.message or "")


def test_losses_and_weights_are_those_of_transformers_trainer(
    make_job: Callable[..., TrainerJob], run_job: RunJob, tmp_path: Path
) -> None:
    """The oracle: transformers' Trainer on the same rows in the same order, padded, full logits, its own loop."""
    fields = {
        "method": "full",
        "learning_rate": 1e-3,
        "max_steps": 20,
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 100,
    }
    ours = run_job("ours", **fields)
    job = make_job("oracle", **fields)
    tokenizer, template, _ = load_tokenizer(job)
    table = tokenize_file(
        Path(job.training_path),
        sha256=hash_file(Path(job.training_path)),
        name="x",
        how=Tokenizing(tokenizer, template, "completion"),
        cache_dir=tmp_path / "c",
    )
    plan = make_plan(num_rows=len(table), rows_per_step=4, max_steps=20, num_epochs=None, seed=42)
    rows = []
    for index in [i for step in range(20) for i in plan.rows_of_step(step)]:
        row = table[index]
        labels = [t if s else -100 for t, s in zip(row["input_ids"], row["supervised"], strict=True)]
        rows.append({"input_ids": row["input_ids"], "labels": labels})

    def pad(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        short = [width - len(row["input_ids"]) for row in batch]
        return {
            "input_ids": torch.tensor([r["input_ids"] + [0] * n for r, n in zip(batch, short, strict=True)]),
            "labels": torch.tensor([r["labels"] + [-100] * n for r, n in zip(batch, short, strict=True)]),
            "attention_mask": torch.tensor(
                [[1] * len(r["input_ids"]) + [0] * n for r, n in zip(batch, short, strict=True)]
            ),
        }

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(rows)  # type: ignore[arg-type]

    oracle = InOrder(
        model=AutoModelForCausalLM.from_pretrained(job.model_path, dtype=torch.float32),
        args=TrainingArguments(
            output_dir=str(tmp_path / "oracle"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            max_steps=20,
            warmup_steps=3,
            weight_decay=0.1,
            lr_scheduler_type="linear",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            optim="adamw_torch",
            max_grad_norm=1.0,
            disable_tqdm=True,
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=pad,
    )
    oracle.train()

    wanted = [entry["loss"] for entry in oracle.state.log_history if "loss" in entry]
    assert list(ours.values("loss").values()) == pytest.approx(wanted, rel=1e-5)
    own = {name.split("/", 1)[1]: value for name, value in weights(ours).items()}
    for name, value in oracle.model.state_dict().items():
        assert (own[name] - value).abs().mean() <= 1e-5 * value.abs().mean(), name
