"""TRL's SFTTrainer on the rows of a bench: `python -m bench.peers.trl_sft SETTINGS.json`.

Modes: `default` (a padded batch, as shipped), `packing` (best fit decreasing), `padding_free`, and `single` (one row
a micro-batch: neither padding nor a mask).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from bench.peers.clock import PeerSettings, common_arguments, put_clock_on, quantization, read_rows
from peft import LoraConfig
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer


def main() -> None:
    """Train, with the clock on; say first whether packed rows are kept apart."""
    settings = PeerSettings.read(Path(sys.argv[1]))
    torch.set_num_threads(1)
    trainer = make_trainer(settings)
    if settings.mode in ("packing", "padding_free"):
        error = packed_error(trainer)
        (Path(settings.folder) / "peer.json").write_text(json.dumps({"packed_error": error}))
    put_clock_on(trainer, settings)
    trainer.train()


def make_trainer(settings: PeerSettings) -> SFTTrainer:
    """SFTTrainer as a user would set it up for this mode."""
    arguments: dict[str, Any] = common_arguments(settings)
    if settings.mode == "packing":
        # One bin a micro-batch: two would be attended to with one mask over both.
        arguments |= {"packing": True, "per_device_train_batch_size": 1}
    if settings.mode == "padding_free":
        arguments["padding_free"] = True
    frozen = settings.method != "full"
    return SFTTrainer(
        model=settings.model,
        args=SFTConfig(
            **arguments,
            max_length=None if settings.mode == "padding_free" else settings.max_length,
            completion_only_loss=True,
            model_init_kwargs={"dtype": settings.frozen_dtype if frozen else "float32"},
        ),
        train_dataset=read_rows(settings),
        quantization_config=quantization(settings),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        if frozen
        else None,
    )


@torch.no_grad()
def packed_error(trainer: SFTTrainer) -> float:
    """Largest difference in a token's log-probability between the first packed micro-batch and its rows alone."""
    trainer.model.train()  # out of it, bitsandbytes lays 4-bit weights out anew; there is no dropout
    size = trainer.args.per_device_train_batch_size
    examples = [trainer.train_dataset[i] for i in range(min(size, len(trainer.train_dataset)))]
    together = _log_probs(trainer, trainer.data_collator(examples))
    alone = []
    for example in examples:
        at = 0
        for length in example.get("seq_lengths", [len(example["input_ids"])]):
            row = {name: example[name][at : at + length] for name in ("input_ids", "labels")}
            alone.append(_log_probs(trainer, trainer.data_collator([row])))
            at += length
    return float((together - torch.cat(alone)).abs().max())


def _log_probs(trainer: SFTTrainer, inputs: dict[str, Any]) -> torch.Tensor:
    """Of the supervised tokens, in order: (n,)."""
    inputs = {
        name: value.to(trainer.args.device) if torch.is_tensor(value) else value
        for name, value in inputs.items()
    }
    found: torch.Tensor = trainer.model(**inputs, fused_lm_head=True).log_probs
    return found[found != 0].float()


if __name__ == "__main__":
    main()
