"""What others find on the rows of a job: plain transformers, its `Trainer`, and TRL's `SFTTrainer`.

All of them read a job's model folder and its rows as the trainer does, in the trainer's order, and go their own way
from there: their own batches, full logits or chunks of their own, their own loop, optimizer and scheduler.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench.rows import order_of_rows, tokenized
from datasets import Dataset
from peft import PeftModel
from tests.trainer.comparison import saved_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from sftd.protocol import TrainerJob

IGNORED = -100  # a label that carries no loss


@dataclass(frozen=True)
class Example:
    """One row as tokens; `labels[t]` is the token itself where it is learned, else IGNORED."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class PeerRun:
    """What another trainer logged after each step, and the weights that it ended with."""

    loss: list[float]
    learning_rate: list[float]
    grad_norm: list[float]
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Score:
    """What a model makes of the learned tokens of some rows."""

    loss: float  # mean over all learned tokens
    accuracy: float
    num_tokens: int
    grad_norm: float


def examples_of(job: TrainerJob) -> list[Example]:
    """A job's rows as the trainer tokenises them, in the order of the file."""
    return [
        Example(
            list(row["input_ids"]),
            [t if s else IGNORED for t, s in zip(row["input_ids"], row["supervised"], strict=True)],
        )
        for row in tokenized(job)
    ]


def load_plain(job: TrainerJob) -> Any:
    """The job's model in fp32, with its first adapter if the job has one, as transformers and peft load it."""
    model = AutoModelForCausalLM.from_pretrained(job.model_path, dtype=torch.float32)
    if job.adapter_path is None:
        return model
    return PeftModel.from_pretrained(model, job.adapter_path, is_trainable=True)


def score_one_by_one(model: Any, examples: Iterable[Example]) -> Score:
    """Mean loss over all learned tokens, its gradient's norm over all weights: no batch, no padding, full logits."""
    model.requires_grad_(True)
    loss = torch.zeros(())
    correct = num_tokens = 0
    for example in examples:
        wanted = torch.tensor(example.labels[1:])
        logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
        correct += int((logits.argmax(-1) == wanted).sum())
        num_tokens += int((wanted != IGNORED).sum())
    loss = loss / num_tokens
    model.zero_grad()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    return Score(loss.item(), correct / num_tokens, num_tokens, norm)


def run_transformers_trainer(job: TrainerJob, folder: Path) -> PeerRun:
    """transformers' Trainer on the job's tokens, padded."""
    examples = examples_of(job)
    rows = [examples[i] for i in order_of_rows(job, len(examples))]
    trainer = Trainer(
        model=load_plain(job),
        args=TrainingArguments(**_arguments(job, folder)),
        train_dataset=rows,  # type: ignore[arg-type]  # a list has length and items, which is all that it asks for
        data_collator=_pad,
    )
    return _finish(trainer, folder)


def run_sft_trainer(job: TrainerJob, folder: Path, *, padding_free: bool = False, **more: Any) -> PeerRun:
    """TRL's SFTTrainer on the job's tokens with their completion masks."""
    examples = examples_of(job)
    ordered = [examples[i] for i in order_of_rows(job, len(examples))]
    rows = {
        "input_ids": [example.input_ids for example in ordered],
        "completion_mask": [[int(label != IGNORED) for label in example.labels] for example in ordered],
    }
    return _run_sft(job, folder, rows, completion_only_loss=True, padding_free=padding_free, **more)


def run_sft_trainer_on_messages(
    job: TrainerJob, folder: Path, messages: list[list[dict[str, Any]]]
) -> PeerRun:
    """TRL's SFTTrainer on conversations: its own tokens and its own mask of what the assistant says."""
    rows = {"messages": [messages[i] for i in order_of_rows(job, len(messages))]}
    return _run_sft(job, folder, rows, assistant_only_loss=True)


def _run_sft(job: TrainerJob, folder: Path, rows: dict[str, list[Any]], **options: Any) -> PeerRun:
    trainer = SFTTrainer(
        model=load_plain(job),
        args=SFTConfig(
            **_arguments(job, folder), bf16=False, max_length=None, gradient_checkpointing=False, **options
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model_path),
    )
    return _finish(trainer, folder)


def _arguments(job: TrainerJob, folder: Path) -> dict[str, Any]:
    spec = job.spec
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": spec.batch_size,
        "gradient_accumulation_steps": spec.gradient_accumulation_steps,
        "learning_rate": spec.learning_rate,
        "max_steps": spec.max_steps,
        "warmup_steps": spec.warmup_steps,
        "weight_decay": spec.weight_decay,
        "lr_scheduler_type": spec.lr_scheduler if spec.lr_scheduler != "constant" else "constant_with_warmup",
        "max_grad_norm": spec.max_grad_norm,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }


def _pad(rows: list[Example]) -> dict[str, torch.Tensor]:
    """Rows to the right of which stands padding that nobody looks at: each (B, T)."""
    width = max(len(row.input_ids) for row in rows)

    def stack(values: Callable[[Example], list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([values(row) + [filler] * (width - len(row.input_ids)) for row in rows])

    return {
        "input_ids": stack(lambda row: row.input_ids, 0),
        "labels": stack(lambda row: row.labels, IGNORED),
        "attention_mask": stack(lambda row: [1] * len(row.input_ids), 0),
    }


def _finish(trainer: Trainer, folder: Path) -> PeerRun:
    trainer.train()
    trainer.model.save_pretrained(folder / "result")  # type: ignore[union-attr]  # it has one by now
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return PeerRun(
        loss=[entry["loss"] for entry in steps],
        learning_rate=[entry["learning_rate"] for entry in steps],
        grad_norm=[entry["grad_norm"] for entry in steps],
        weights=saved_weights(folder / "result"),
    )
