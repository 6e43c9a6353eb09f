"""Running out of memory: how to tell, how to tidy up, and what a run will need."""

import ctypes
import gc
import os
import re
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from sftd.footprint import moment_bytes, saved_bytes
from sftd.spec import JobSpec

# torch on a CPU raises a plain RuntimeError; bitsandbytes and cuBLAS have words of their own.
_WORDS = re.compile(
    r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED|failed to allocate", re.I
)


_MOST_HALVINGS = 3
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_SHAPES_KEPT = "64"
_LARGE_BYTES = 32 * 1024 * 1024  # the most that M_MMAP_THRESHOLD takes


@dataclass(frozen=True)
class Budget:
    """How much goes through the model at once. It shrinks when memory runs out, and stays so for the rest of the run."""

    batch_size: int  # rows, where they are padded
    max_tokens: int  # tokens, where they lie end to end
    halvings: int = 0

    @property
    def is_spent(self) -> bool:
        return self.halvings >= _MOST_HALVINGS

    def halved(self, *, rows: int, tokens: int) -> "Budget":
        """Half of what was too much: `rows` and `tokens` of the largest micro-batch, which may be far below the budget."""
        batch_size, max_tokens = min(self.batch_size, rows), min(self.max_tokens, tokens)
        return Budget(max(1, batch_size // 2), max(1, max_tokens // 2), self.halvings + 1)


def settle_host_memory() -> None:
    """How memory is held where tensors are this machine's. Call it before the first product.

    The C library keeps what torch frees for the next step, and does not fault every page in again; all but the largest
    tensors, which would leave holes that nothing else fits into (https://man7.org/linux/man-pages/man3/mallopt.3.html;
    other libraries than glibc have no such call). oneDNN, and torch's layer above it, keep half a MiB of code for each
    shape that they have multiplied: of a thousand shapes, if they are let. With packed rows every step brings new ones.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, _SHAPES_KEPT)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


def keep_gradients_together(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Let the gradients of a CPU's parameters lie in memory that is taken once, before the first step.

    Made anew in each backward pass they would come to lie between activations, and what is freed around them is too small
    for the next ones of the same size by the few bytes that an aligned allocation asks for besides (glibc bug 14581): with
    gradient checkpointing the heap would grow by a layer's activations at every layer. Numbers stay as they are, and what
    has no gradient has none.
    """
    for parameter in parameters:
        if (
            parameter.device.type == "cpu" and parameter.nbytes < _LARGE_BYTES
        ):  # larger ones are mapped by themselves
            kept = _Kept(torch.zeros_like(parameter))
            parameter.register_post_accumulate_grad_hook(kept)  # type: ignore[no-untyped-call]  # torch leaves it so


class _Kept:
    """Moves a gradient that was just made into memory of its own."""

    def __init__(self, place: torch.Tensor) -> None:
        self._place = place

    def __call__(self, parameter: torch.Tensor) -> None:
        grad = parameter.grad
        if grad is not None and grad.data_ptr() != self._place.data_ptr():
            parameter.grad = self._place.copy_(grad)


def give_back_freed_memory() -> None:
    """Give the system what the C library holds for later steps: before something large is made on a CPU."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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
        "optimizer": moment_bytes(spec) * trainable,
        "activations": per_token * spec.max_seq_length * spec.batch_size,
    }


def checkpoint_bytes(spec: JobSpec, parameters: list[torch.nn.Parameter]) -> int:
    """What a checkpoint will take on disk, about: all trained weights in fp32 and the optimizer's state of them.

    Of all ranks together. Without the tokenizer's files, which are small beside them in all but toy models.
    """
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return saved_bytes(spec, trainable)


def expected_host_bytes() -> int:
    """Memory that this process has held at its fullest moment and does not hold now: what a next step will take again.

    Next to nothing where freed memory is kept; other allocators (mimalloc, jemalloc) give it back.
    """
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return max(0, most - pages * resource.getpagesize())


def available_host_bytes() -> int:
    """Memory of this machine that can still be taken, or of the container where that is less."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        held = int((group / "memory.current").read_text())
        kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(free, limit - held + int(kept["inactive_file"]))  # cached files give way
    except (OSError, ValueError, KeyError):
        return free
