"""Running out of memory: how to tell, how to tidy up, and what a run will need."""

import gc
import re

import torch

from sftd.spec import JobSpec

# torch on a CPU raises a plain RuntimeError; bitsandbytes and cuBLAS have words of their own.
_WORDS = re.compile(
    r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED|failed to allocate", re.I
)


def is_out_of_memory(error: BaseException) -> bool:
    """Is this error the device's (or the machine's) memory running out?"""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None


def release_memory() -> None:
    """Give back what a failed step left behind. Call it outside the `except`, whose traceback holds tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def estimate_bytes(
    spec: JobSpec, parameters: list[torch.nn.Parameter], hidden_size: int, num_layers: int
) -> dict[str, int]:
    """Bytes for weights, gradients, optimizer state and activations of one micro-batch; the last is a rough guess.

    Activations: with gradient checkpointing one hidden state a layer is kept, without it about 16.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    per_token = hidden_size * num_layers * (1 if spec.gradient_checkpointing else 16) * 4
    return {
        "weights": weights,
        "gradients": 4 * trainable,
        "optimizer": (8 if spec.optimizer == "adamw" else 2) * trainable,
        "activations": per_token * spec.max_seq_length * spec.batch_size,
    }
