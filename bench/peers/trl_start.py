"""A plain script with TRL's SFTTrainer, LoRA on a chat file: `python bench/peers/trl_start.py MODEL ROWS FOLDER`.

Writes FOLDER/first_step.json at the end of the first step: the time, and the CPU seconds of this process so far.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from datasets import load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Tells when the first step has ended."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self._path.write_text(json.dumps({"at": time.time(), "cpu_seconds": time.process_time()}))


def main() -> None:
    """Train for one step."""
    model, rows, folder = sys.argv[1:]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=f"{folder}/out",
            max_steps=1,
            per_device_train_batch_size=4,
            max_length=512,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=load_dataset("json", data_files=rows, split="train").select_columns(["messages"]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.add_callback(Clock(Path(folder) / "first_step.json"))
    trainer.train()


if __name__ == "__main__":
    main()
