"""Cross-entropy over the supervised positions alone, in chunks: the full logits are never made.

The loss of a step is the sum over its supervised tokens divided by their number. Here only sums are computed; the
caller divides, once, by the number of the whole step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 32 * 1024 * 1024  # logits alive at once; 128 MiB in fp32

Head = Callable[[torch.Tensor], torch.Tensor]  # (n, d) hidden states -> (n, V) logits


@dataclass(frozen=True)
class Scores:
    """Sums over supervised tokens."""

    loss_sum: torch.Tensor  # scalar, fp32
    num_correct: torch.Tensor  # scalar, int64
    num_tokens: int


def loss_sum(head: Head, hidden: torch.Tensor, targets: torch.Tensor, *, vocab_size: int) -> torch.Tensor:
    """Summed cross-entropy of `hidden` (n, d) against `targets` (n,), with gradient; a scalar in fp32.

    Each chunk's logits are made again in the backward pass instead of being kept.
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, wanted in _chunks(hidden, targets, vocab_size):
        total = total + checkpoint(_chunk_loss, head, rows, wanted, use_reentrant=False)
    return total


@torch.no_grad()
def score(head: Head, hidden: torch.Tensor, targets: torch.Tensor, *, vocab_size: int) -> Scores:
    """Summed cross-entropy and number of right top-1 predictions, without gradient."""
    loss = hidden.new_zeros((), dtype=torch.float64)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    for rows, wanted in _chunks(hidden, targets, vocab_size):
        logits = head(rows).float()
        loss += F.cross_entropy(logits, wanted, reduction="sum").double()
        correct += (logits.argmax(-1) == wanted).sum()
    return Scores(loss, correct, targets.numel())


def _chunk_loss(head: Head, rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(rows).float(), wanted, reduction="sum")


def _chunks(
    hidden: torch.Tensor, targets: torch.Tensor, vocab_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    size = max(1, CHUNK_LOGITS // vocab_size)
    return list(zip(torch.split(hidden, size), torch.split(targets, size), strict=True))
