"""Which rows make a step, and how a step's rows are laid out in micro-batches.

Both are pure functions: rows of (seed, epoch, step), layout of the rows' lengths. Nothing here has state, so there is
no sampler to save, and packing changes the speed of a run but never which rows an optimizer step sees.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


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


def lay_out(lengths: Sequence[int], *, batch_size: int, max_tokens: int, packing: bool) -> list[list[int]]:
    """Micro-batches as lists of positions into `lengths`.

    Without packing: `batch_size` rows each, in order. With packing: best fit decreasing (Johnson 1973) into bins of
    `max_tokens`, whatever the number of rows in a bin. A row longer than a bin gets one of its own.
    """
    if not packing:
        return [list(range(i, min(i + batch_size, len(lengths)))) for i in range(0, len(lengths), batch_size)]
    bins: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[position]]
        if fitting:
            best = min(fitting, key=lambda b: (room[b], b))
            bins[best].append(position)
            room[best] -= lengths[position]
        else:
            bins.append([position])
            room.append(max_tokens - lengths[position])
    return [sorted(positions) for positions in bins]


@dataclass(frozen=True)
class MicroBatch:
    """Rows laid end to end (`row_lengths` given) or padded to one length (`attention_mask` given)."""

    input_ids: torch.Tensor  # (1, T) end to end, or (B, T) padded
    position_ids: torch.Tensor  # same shape; restarts at 0 in every row
    attention_mask: torch.Tensor | None  # (B, T), padded only
    row_lengths: list[int] | None  # end to end only
    predict_at: torch.Tensor  # (n,) flat positions whose next token is supervised
    targets: torch.Tensor  # (n,) those next tokens
    num_tokens: int  # without padding


def collate(
    rows: Sequence[tuple[np.ndarray, np.ndarray]],  # (ids, supervised) per row
    *,
    device: torch.device,
    padded: bool,
    pad_id: int,
) -> MicroBatch:
    """Make tensors of a micro-batch. A row's first token has no predecessor and is never a target."""
    lengths = [len(ids) for ids, _ in rows]
    width = max(lengths)
    starts = [i * width for i in range(len(rows))] if padded else list(np.cumsum([0, *lengths[:-1]]))
    ids = np.full(width * len(rows) if padded else sum(lengths), pad_id, dtype=np.int64)
    positions = np.zeros_like(ids)
    present = np.zeros_like(ids)
    predict_at, targets = [], []
    for start, length, (row_ids, supervised) in zip(starts, lengths, rows, strict=True):
        ids[start : start + length] = row_ids
        positions[start : start + length] = np.arange(length)
        present[start : start + length] = 1
        wanted = np.flatnonzero(supervised[1:])  # i: token i + 1 is supervised, predicted at i
        predict_at.append(wanted + start)
        targets.append(row_ids[wanted + 1])
    shape = (len(rows), width) if padded else (1, -1)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)

    return MicroBatch(
        input_ids=tensor(ids).view(shape),
        position_ids=tensor(positions).view(shape),
        attention_mask=tensor(present).view(shape) if padded else None,
        row_lengths=None if padded else lengths,
        predict_at=tensor(np.concatenate(predict_at)),
        targets=tensor(np.concatenate(targets)),
        num_tokens=sum(lengths),
    )
