"""What the peers have in common: their settings, their rows, and the clock that reads CPU seconds at each step's end."""

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import BitsAndBytesConfig, Trainer, TrainerCallback


@dataclass(frozen=True)
class PeerSettings:
    """What a peer is to do; written by bench/measure.py, read by the peer's process."""

    model: str
    rows: str  # JSONL: input_ids and labels, or a data file that the peer tokenises itself
    folder: str  # steps.jsonl goes here
    method: str  # full, lora, qlora
    mode: str  # default, packing, padding_free, single
    precision: str  # bf16, fp32
    gradient_checkpointing: bool
    learning_rate: float
    batch_size: int
    max_length: int
    max_steps: int  # -1: one pass over the rows
    save_steps: int  # 0: never
    frozen_dtype: str  # of weights that are not trained
    device: str = "cpu"
    optimizer: str | None = None  # transformers' name of one; None: as shipped

    @classmethod
    def read(cls, path: Path) -> "PeerSettings":
        return cls(**json.loads(path.read_text()))


def read_rows(settings: PeerSettings) -> Dataset:
    with Path(settings.rows).open() as file:
        return Dataset.from_list([json.loads(line) for line in file])


def common_arguments(settings: PeerSettings) -> dict[str, Any]:
    """Arguments of TrainingArguments that make a run comparable: constant rate, rows in order, nothing but training."""
    single = settings.mode == "single"
    arguments: dict[str, Any] = {
        "output_dir": str(Path(settings.folder) / "out"),
        "per_device_train_batch_size": 1 if single else settings.batch_size,
        "gradient_accumulation_steps": settings.batch_size if single else 1,
        "num_train_epochs": 1,
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "bf16": settings.precision == "bf16",
        "gradient_checkpointing": settings.gradient_checkpointing,
        "use_cpu": settings.device == "cpu",
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": 0,
        "logging_strategy": "no",
        "save_strategy": "steps" if settings.save_steps else "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if settings.save_steps:
        arguments["save_steps"] = settings.save_steps
    if settings.optimizer:
        arguments["optim"] = settings.optimizer
    return arguments


def quantization(settings: PeerSettings) -> BitsAndBytesConfig | None:
    """NF4 with double quantisation, as our qlora."""
    if settings.method != "qlora":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def put_clock_on(trainer: Trainer, settings: PeerSettings) -> None:
    """Write a line to steps.jsonl at each step's end. Costs the peer one addition a micro-batch."""
    micro: list[torch.Tensor] = []
    step_of_peer = trainer.training_step

    def training_step(*args: Any, **options: Any) -> torch.Tensor:
        loss: torch.Tensor = step_of_peer(*args, **options)
        micro.append(loss)
        return loss

    trainer.training_step = training_step
    trainer.add_callback(_Clock(trainer, settings, micro))


class _Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    def __init__(self, trainer: Trainer, settings: PeerSettings, micro: list[torch.Tensor]) -> None:
        data = trainer.train_dataset.with_format("numpy")
        self._tokens = [len(ids) for ids in data["input_ids"]]  # of a row, or of several packed into one
        self._supervised = [int((labels != -100).sum()) for labels in data["labels"]]
        self._rows_per_step = (
            trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
        )
        self._micro = micro
        self._out = (Path(settings.folder) / "steps.jsonl").open("w")
        self._cuda = settings.device == "cuda"
        self._begun_at = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begun_at = time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        first = (state.global_step - 1) * self._rows_per_step % len(self._tokens)
        rows = slice(first, first + self._rows_per_step)
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        clock = {
            "step": state.global_step,
            "cpu_seconds": time.process_time(),
            "at": time.time(),
            "begun_at": self._begun_at,
            "peak_bytes": torch.cuda.max_memory_allocated() if self._cuda else host,
            "tokens": sum(self._tokens[rows]),
            "supervised_tokens": sum(self._supervised[rows]),
            "loss": float(sum(float(loss) for loss in self._micro)),
        }
        self._micro.clear()
        self._out.write(json.dumps(clock) + "\n")
        self._out.flush()
