"""The peak of this machine's matrix products, measured, and the FLOPs that a training run asks of it."""

import time
from dataclasses import dataclass

import torch
from bench.model import Shape

FORMULA = {
    "full": "6·N_body·tokens + 6·N_head·supervised + 6·layers·hidden·Σ length²",
    "lora": "4·N_body·tokens + 4·N_head·supervised + 6·N_adapter·tokens + 6·layers·hidden·Σ length²",
}


@dataclass(frozen=True)
class Work:
    """What went through the model."""

    tokens: float
    supervised: float  # tokens that have logits
    squares: float  # sum over rows of length²


def model_flops(shape: Shape, work: Work, *, method: str, rank: int = 16) -> float:
    """FLOPs of forward and backward of the model, as FORMULA says; nothing that is computed twice counts twice.

    A product with a weight costs 2 a token forward and 4 backward, 2 where the weight is frozen. Causal attention
    costs 2·hidden·length² a layer forward (scores and values, half of the square each) and twice that backward.
    """
    attention = 6.0 * shape.layers * shape.hidden * work.squares
    a_weight = 6.0 if method == "full" else 4.0
    products = a_weight * (shape.body_parameters * work.tokens + shape.head_parameters * work.supervised)
    adapter = 0.0 if method == "full" else 6.0 * shape.adapter_parameters(rank) * work.tokens
    return products + adapter + attention


def best_flops_per_second(precision: str, *, device: str = "cpu", size: int = 2048, tries: int = 7) -> float:
    """FLOPs a second of one square matrix product, one thread on a CPU; the best of several tries.

    CPU seconds are counted on a CPU, so that other programs on the machine do not.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device == "cpu":
        torch.set_num_threads(1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = time.process_time if device == "cpu" else time.perf_counter
    best = float("inf")
    for _ in range(tries):
        _wait(device)
        begun = clock()
        a @ b
        _wait(device)
        best = min(best, clock() - begun)
    return 2.0 * size**3 / best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
