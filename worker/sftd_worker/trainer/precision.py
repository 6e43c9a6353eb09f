"""In which type the matrix products of a run are computed, and why."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from sftd.spec import JobSpec


@dataclass(frozen=True)
class Precision:
    """bf16 or fp32, and why."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.name == "bf16" else torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Matrix products in bf16, where that is the precision."""
        if self.name != "bf16":
            return nullcontext()
        # Its cache would keep bf16 copies of all layers until the pass ends, and each is needed once.
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def choose_precision(spec: JobSpec, device: torch.device) -> Precision:
    """Settle `precision: auto`, with the reason."""
    if spec.precision != "auto":
        return Precision(spec.precision, "as the spec says")
    if spec.method == "qlora":
        return Precision("bf16", "qlora computes in bf16")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", f"{torch.cuda.get_device_name(device)} has bf16")
        return Precision("fp32", f"{torch.cuda.get_device_name(device)} has no bf16")
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return Precision("bf16", "this CPU multiplies bf16 matrices")
    return Precision("fp32", "this CPU has no instructions for bf16; it would be slower")


def compute_dtype(states: torch.Tensor) -> torch.dtype:
    """The type that autocast gives to a product of `states`, or their own.

    Rotary positions leave queries and keys in fp32 where weights are, also under autocast.
    """
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
