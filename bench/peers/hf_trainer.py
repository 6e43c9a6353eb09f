"""transformers' own Trainer on the rows of a bench: `python -m bench.peers.hf_trainer SETTINGS.json`."""

import sys
from pathlib import Path

import torch
from bench.peers.clock import PeerSettings, common_arguments, put_clock_on, quantization, read_rows
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)


def main() -> None:
    """Train, with the clock on."""
    settings = PeerSettings.read(Path(sys.argv[1]))
    torch.set_num_threads(1)
    trainer = make_trainer(settings)
    put_clock_on(trainer, settings)
    trainer.train()


def make_trainer(settings: PeerSettings) -> Trainer:
    """Trainer over padded batches with labels."""
    full = settings.method == "full"
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    model = AutoModelForCausalLM.from_pretrained(
        settings.model,
        dtype=torch.float32 if full else getattr(torch, settings.frozen_dtype),
        quantization_config=quantization(settings),
        device_map={"": 0} if settings.device == "cuda" else None,
    )
    if not full:
        adapter = LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model.enable_input_require_grads()
        model = get_peft_model(model, adapter)
    return Trainer(
        model=model,
        args=TrainingArguments(**common_arguments(settings)),
        train_dataset=read_rows(settings),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main()
