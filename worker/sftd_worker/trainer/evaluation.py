"""Evaluation: loss, perplexity and token accuracy over all supervised tokens of the validation rows.

Sums over tokens, divided once: not a mean of means. The full logits are never held.
"""

import math
from dataclasses import dataclass

import torch

from sftd.schemas import FailureReason
from sftd_worker.trainer.batching import collate, lay_out
from sftd_worker.trainer.data import TokenRows
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.events import Events
from sftd_worker.trainer.loss import score
from sftd_worker.trainer.memory import is_out_of_memory, release_memory
from sftd_worker.trainer.model import Model
from sftd_worker.trainer.world import World, sum_over_ranks


@dataclass(frozen=True)
class Result:
    """What an evaluation found."""

    eval_loss: float
    perplexity: float
    token_accuracy: float
    num_tokens: int


def evaluate(
    model: Model,
    rows: TokenRows,
    *,
    world: World,
    max_tokens: int,
    batch_size: int,
    pad_id: int,
    events: Events,
) -> Result:
    """Evaluate `rows`, spread over all ranks. Uses no random numbers. Out of memory: smaller batches, and said."""
    mine = list(range(world.rank, len(rows), world.size))
    model.net.eval()
    try:
        while True:
            try:
                loss, correct, tokens = _sums(model, rows, mine, max_tokens, batch_size, pad_id)
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            release_memory()
            if max_tokens <= 1:
                raise RunFailed(FailureReason.OUT_OF_MEMORY, "evaluation: not even one row fits into memory")
            max_tokens, batch_size = max_tokens // 2, max(1, batch_size // 2)
            events.notice(f"evaluation: out of memory; going on with batches of {max_tokens} tokens")
    finally:
        model.net.train()
    loss, correct, tokens = sum_over_ranks(world, [loss, correct, tokens])
    mean = loss / tokens
    return Result(
        eval_loss=mean,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        token_accuracy=correct / tokens,
        num_tokens=int(tokens),
    )


@torch.no_grad()
def _sums(
    model: Model, rows: TokenRows, mine: list[int], max_tokens: int, batch_size: int, pad_id: int
) -> tuple[float, float, float]:
    """(summed loss, right predictions, supervised tokens) of this rank's rows."""
    lengths = [int(rows.lengths[i]) for i in mine]
    loss, correct, tokens = 0.0, 0.0, 0.0
    for group in lay_out(lengths, batch_size=batch_size, max_tokens=max_tokens, packing=model.end_to_end):
        batch = collate(
            [rows.row(mine[i]) for i in group],
            device=model.device,
            padded=not model.end_to_end,
            pad_id=pad_id,
        )
        with model.autocast():
            scores = score(model.head, model.hidden(batch), batch.targets, vocab_size=model.vocab_size)
        loss += float(scores.loss_sum)
        correct += float(scores.num_correct)
        tokens += scores.num_tokens
    return loss, correct, tokens
