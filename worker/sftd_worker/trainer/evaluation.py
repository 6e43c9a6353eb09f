"""Evaluation: loss, perplexity and token accuracy over all supervised tokens of the validation rows.

Sums over tokens, divided once: not a mean of means. The full logits are never held.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from sftd.schemas import FailureReason
from sftd_worker.trainer.data import TokenRows
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.events import Events
from sftd_worker.trainer.loss import Scores, score
from sftd_worker.trainer.memory import Budget, release_memory
from sftd_worker.trainer.model import Model
from sftd_worker.trainer.packing import Prefix, TokenRow, idle_row, lay_out
from sftd_worker.trainer.sharding import run_passes
from sftd_worker.trainer.world import World, any_rank, most_of_ranks, sum_over_ranks

_ROWS_AT_ONCE = 512  # rows that are looked at together to lay them out


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
    budget: Budget,
    pad_id: int,
    events: Events,
) -> tuple[Result, Budget]:
    """Evaluate `rows`, spread over all ranks. Uses no random numbers. Out of memory: smaller batches, and said.

    Returns what was found, and the budget for the next time.
    """
    mine = list(range(world.rank, len(rows), world.size))
    model.net.eval()
    try:
        while True:
            sums, full = _sums(model, rows, mine, budget, pad_id, events.alive)
            # Without shards each rank has batches of its own size; with them all go through the same number.
            if not (full if model.shards is None else any_rank(world, full)[0]):
                break
            release_memory()
            if budget.is_spent:
                raise RunFailed(
                    FailureReason.OUT_OF_MEMORY,
                    f"evaluation: memory ran out for batches of {budget.max_tokens} tokens, which had been made smaller "
                    "three times already; lower max_tokens_per_step or batch_size",
                )
            rows_here, tokens_here = len(mine), int(rows.lengths[mine].sum())
            if model.shards is not None:
                rows_here, tokens_here = most_of_ranks(world, rows_here), most_of_ranks(world, tokens_here)
            budget = budget.halved(rows=max(1, rows_here), tokens=max(1, tokens_here))
            events.notice(f"evaluation: out of memory; going on with batches of {budget.max_tokens} tokens")
    finally:
        model.net.train()
    if model.shards is None:  # a rank's own: what is saved, and goes on, is one for all
        budget = Budget(
            batch_size=-most_of_ranks(world, -budget.batch_size),
            max_tokens=-most_of_ranks(world, -budget.max_tokens),
            halvings=most_of_ranks(world, budget.halvings),
        )
    loss, correct, tokens = sum_over_ranks(world, sums)
    mean = loss / tokens
    result = Result(
        eval_loss=mean,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        token_accuracy=correct / tokens,
        num_tokens=int(tokens),
    )
    return result, budget


@torch.no_grad()
def _sums(
    model: Model, rows: TokenRows, mine: list[int], budget: Budget, pad_id: int, alive: Callable[[], None]
) -> tuple[list[float], bool]:
    """([summed loss, right predictions, supervised tokens] of this rank's rows, did its memory run out)."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    num_tokens = 0

    def score_rows(chosen: list[TokenRow], prefixes: list[Prefix | None]) -> Scores:
        batch = model.batch(chosen, pad_id=pad_id, prefixes=prefixes)
        with model.autocast():
            return model.whole(lambda: score(model.head, model.hidden(batch), batch.targets))

    def add(chosen: list[TokenRow], prefixes: list[Prefix | None]) -> None:
        nonlocal num_tokens
        alive()
        scores = score_rows(chosen, prefixes)
        found.append((scores.loss_sum, scores.num_correct))  # read at the end: a GPU is not waited for
        num_tokens += scores.num_tokens

    passes: list[Callable[[], None]] = []
    for start in range(0, len(mine), _ROWS_AT_ONCE):
        near = mine[start : start + _ROWS_AT_ONCE]
        passes += [partial(add, *group) for group in _groups(model, [rows.row(i) for i in near], budget)]
    full = run_passes(model.shards, passes, idle=lambda: score_rows([idle_row(pad_id)], [None]))
    alive()
    loss_sum = math.fsum(float(loss) for loss, _ in found)
    return [loss_sum, float(sum(int(correct) for _, correct in found)), float(num_tokens)], full


def _groups(
    model: Model, rows: list[TokenRow], budget: Budget
) -> Iterator[tuple[list[TokenRow], list[Prefix | None]]]:
    """Rows as micro-batches, with the prefixes that they share."""
    prefixes = model.prefixes(rows)
    layout = lay_out(
        [len(ids) for ids, _ in rows],
        batch_size=budget.batch_size,
        max_tokens=budget.max_tokens,
        packing=model.end_to_end,
        prefixes=prefixes,
    )
    for group in layout:
        yield [rows[i] for i in group], [prefixes[i] for i in group]
