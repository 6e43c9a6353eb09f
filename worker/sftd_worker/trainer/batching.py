"""Which rows make a step, and which of them a rank computes.

Pure functions of (seed, epoch, step): nothing here has state, so there is no sampler to save. How the rows of a step
are laid out for the model is `packing.py`'s business, and never changes which rows a step sees.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """How the rows are spread over the run."""

    num_rows: int
    rows_per_step: int  # batch_size * gradient_accumulation_steps * gpus
    steps_per_epoch: int
    total_steps: int
    seed: int

    def rows_of_step(self, step: int) -> list[int]:
        """Indices of the rows that optimizer step `step` (from 0) learns from. An epoch's last step may be short."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.num_rows, seed=self.seed, epoch=epoch)
        start = position * self.rows_per_step
        return [int(index) for index in order[start : start + self.rows_per_step]]

    def epoch_at(self, step: int) -> float:
        """Passes over the rows after `step` steps."""
        return step / self.steps_per_epoch


def make_plan(
    *, num_rows: int, rows_per_step: int, max_steps: int | None, num_epochs: float | None, seed: int
) -> Plan:
    """Settle the length of the run. Exactly one of `max_steps` and `num_epochs` is given."""
    steps_per_epoch = math.ceil(num_rows / rows_per_step)
    if max_steps is None:
        assert num_epochs is not None
        max_steps = math.ceil(num_epochs * steps_per_epoch)
    return Plan(num_rows, rows_per_step, steps_per_epoch, max_steps, seed)


_order_cache: dict[tuple[int, int, int], np.ndarray] = {}  # the newest epoch only


def epoch_order(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:  # int64 (num_rows,)
    """The order of the rows in one epoch: a permutation made from (seed, epoch) alone."""
    key = (num_rows, seed, epoch)
    if key not in _order_cache:
        _order_cache.clear()
        _order_cache[key] = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)
    return _order_cache[key]


def share_of_rank(lengths: Sequence[int], *, rank: int, world_size: int) -> list[int]:
    """Positions (into `lengths`) of the rows that one rank computes: longest first to the least loaded rank."""
    if world_size == 1:
        return list(range(len(lengths)))
    loads = [0] * world_size
    mine = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = min(range(world_size), key=lambda r: (loads[r], r))
        loads[lightest] += lengths[position]
        if lightest == rank:
            mine.append(position)
    return sorted(mine)
