"""The optimizer and the learning rate. The rate is a pure function of the step, so there is no scheduler to save."""

import math
import re
from collections.abc import Iterator

import torch

from sftd.schemas import FailureReason
from sftd.spec import JobSpec
from sftd_worker.trainer.errors import RunFailed

_BETAS = (0.9, 0.999)
_EPS = 1e-8
# As transformers' Trainer tells them, by name: shapes do not tell. Norms of each head and biases of experts have two
# dimensions, DoRA's magnitudes one.
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


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


def make_optimizer(spec: JobSpec, net: torch.nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), in full or in 8 bits (Dettmers et al. 2022). Biases and norms do not decay."""
    keeps_size = set(_not_decayed(net))
    trainable = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name not in keeps_size], "weight_decay": spec.weight_decay},
        {"params": [p for name, p in trainable if name in keeps_size], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=spec.learning_rate,
            betas=_BETAS,
            eps=_EPS,
            fused=True,  # one pass over weights and moments, on GPUs and on CPUs
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


def names_in_order(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Name of each of the optimizer's parameters, by the number that its state knows it by."""
    names = {id(parameter): _without_slash(name) for name, parameter in net.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def names_by_shape(net: torch.nn.Module) -> list[str]:
    """The same as it was when all that has two dimensions was one group, and the rest the other."""
    trainable = [
        (_without_slash(name), parameter)
        for name, parameter in net.named_parameters()
        if parameter.requires_grad
    ]
    return [name for flat in (False, True) for name, parameter in trainable if (parameter.ndim < 2) is flat]


def _without_slash(name: str) -> str:
    """A slash divides the name of a parameter from what is kept for it."""
    return name.replace("%", "%25").replace("/", "%2F")


def _not_decayed(net: torch.nn.Module) -> Iterator[str]:
    """Names of the parameters that weight decay leaves alone."""
    layer_norms = [name for name, module in net.named_modules() if isinstance(module, torch.nn.LayerNorm)]
    inside = tuple(f"{name}." for name in layer_norms)
    for name, _ in net.named_parameters():
        if _NOT_DECAYED.search(name.lower()) or name.startswith(inside):
            yield name


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
