"""Configurations that must give the same run: each through the real entry point on a small model.

The mean difference is looked at as well as the largest: a dropped gradient is a drift, not a spike.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.harness import Finished, finish_trainer, start_trainer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from sftd.protocol import TrainerJob
from sftd_worker.trainer.batching import make_plan
from sftd_worker.trainer.data import Tokenizing, tokenize_file
from sftd_worker.trainer.model import load_tokenizer

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


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(
    reference: Finished, run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftd_worker.trainer.model import Model

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
    from sftd_worker.trainer.model import Model

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
