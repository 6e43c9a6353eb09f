"""The optimizer and the learning rate. The rate is a pure function of the step, so there is no scheduler to save."""

import math
from collections.abc import Iterable

import torch

from sftd.schemas import FailureReason
from sftd.spec import JobSpec
from sftd_worker.trainer.errors import RunFailed

_BETAS = (0.9, 0.999)
_EPS = 1e-8


def warmup_steps(spec: JobSpec, total_steps: int) -> int:
    """Steps of warm-up, from `warmup_steps` or `warmup_ratio`."""
    if spec.warmup_ratio is not None:
        return math.ceil(spec.warmup_ratio * total_steps)
    assert spec.warmup_steps is not None
    return spec.warmup_steps


def learning_rate(spec: JobSpec, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 0), as transformers' get_scheduler computes it.

    Linear from 0 over the warm-up; then constant, or to 0 at `total_steps` along a line or half a cosine.
    """
    warm = warmup_steps(spec, total_steps)
    if step < warm:
        return spec.learning_rate * step / warm
    if spec.lr_scheduler == "constant":
        return spec.learning_rate
    progress = (step - warm) / max(1, total_steps - warm)
    if spec.lr_scheduler == "linear":
        return spec.learning_rate * max(0.0, 1.0 - progress)
    return spec.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def make_optimizer(
    spec: JobSpec, named: Iterable[tuple[str, torch.nn.Parameter]], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), in full or in 8 bits (Dettmers et al. 2022). Biases and norms do not decay."""
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups = [
        {"params": [p for _, p in trainable if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for _, p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=spec.learning_rate,
            betas=_BETAS,
            eps=_EPS,
            fused=True if device.type == "cuda" else None,
        )
    import bitsandbytes as bnb

    make = bnb.optim.PagedAdamW8bit if spec.optimizer == "paged_adamw_8bit" else bnb.optim.AdamW8bit
    try:
        optimizer: torch.optim.Optimizer = make(groups, lr=spec.learning_rate, betas=_BETAS, eps=_EPS)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise RunFailed(
            FailureReason.BAD_SPEC,
            f"optimizer: {spec.optimizer} does not work on {device.type} ({error}); use adamw",
        ) from error
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
