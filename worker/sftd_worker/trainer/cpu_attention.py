"""Attention on a CPU, a block of queries at a time: torch's own kernel is busy with other things than products there.

The weights of a block are made in fp32, are gone before they leave the cache, and are made again for the backward pass
(as in FlashAttention, arXiv:2205.14135). Everything else is multiplied in the type of the inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sftd_worker.trainer.packing import RowLayout
from sftd_worker.trainer.precision import compute_dtype

_BLOCK = {torch.float32: 32, torch.bfloat16: 64}  # queries at a time
_FEWEST = 8
_MOST_WEIGHTS = 4 * 2**20  # of a block, which bounds its memory for long rows


def fits(query: torch.Tensor) -> bool:
    """Is this something for here?"""
    return query.device.type == "cpu" and compute_dtype(query) in _BLOCK


def attend(
    query: torch.Tensor,  # (1, H, T, D)
    key: torch.Tensor,  # (1, H_kv, T, D)
    value: torch.Tensor,  # (1, H_kv, T, D_v)
    layout: RowLayout,
    *,
    scale: float,
    window: int | None,
) -> torch.Tensor:  # (1, T, H, D_v)
    """Causal attention within each row; a token sees `window` tokens with itself, or all before it.

    Under autocast in its type, as torch's own.
    """
    query, key, value = (states.to(compute_dtype(query)) for states in (query, key, value))
    return _Attention.apply(query, key, value, layout, scale, window)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply unannotated


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: RowLayout,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.how = layout, scale, window
        heads = _Heads(query.shape[1], key.shape[1])
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        with torch.autocast("cpu", enabled=False):
            for row in _rows(layout):
                keys, values = row.of(key[0]), row.of(value[0])
                wide = keys.float()
                for block in row.blocks(_block_size(query, wide, window), window):
                    weights = _weights(heads.fold(query[0, :, block.queries]), wide, block, scale, heads)
                    made = torch.bmm(weights.to(value.dtype), values[:, block.keys])
                    heads.unfold(made, into=out[block.queries].transpose(0, 1))
        return out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        layout, scale, window = ctx.how
        heads = _Heads(query.shape[1], key.shape[1])
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_key, grad_value = (torch.zeros(states.shape[1:]) for states in (key, value))
        with torch.autocast("cpu", enabled=False):
            for row in _rows(layout):
                keys, values = row.of(key[0]), row.of(value[0])
                wide = keys.float()
                row_grad_key, row_grad_value = (torch.zeros(states.shape) for states in (keys, values))
                for block in row.blocks(_block_size(query, wide, window), window):
                    q = heads.fold(query[0, :, block.queries])
                    g = heads.fold(grad[0, block.queries].transpose(0, 1))
                    weights = _weights(q, wide, block, scale, heads)
                    row_grad_value[:, block.keys] += torch.bmm(weights.to(g.dtype).transpose(1, 2), g)
                    grad_weights = torch.bmm(g, values[:, block.keys].transpose(1, 2)).float()
                    scores = _softmax_backward(grad_weights, weights).to(q.dtype)
                    made = torch.bmm(scores, keys[:, block.keys]).mul_(scale)
                    heads.unfold(made, into=grad_query[0, :, block.queries])
                    row_grad_key[:, block.keys] += torch.bmm(scores.transpose(1, 2), q)
                row.add(row_grad_key.mul_(scale), to=grad_key)
                row.add(row_grad_value, to=grad_value)
        return grad_query, grad_key[None].to(key.dtype), grad_value[None].to(value.dtype), None, None, None


def _block_size(query: torch.Tensor, keys: torch.Tensor, window: int | None) -> int:
    """Queries at a time of (1, H, T, D) that attend to the (H_kv, L, D) keys of a row."""
    size, num_keys = _BLOCK[query.dtype], max(1, keys.shape[1])
    seen = num_keys if window is None else min(num_keys, window + size)
    return min(size, max(_FEWEST, _MOST_WEIGHTS // (query.shape[1] * seen)))


@dataclass(frozen=True)
class _Heads:
    """Query heads share key heads, in groups: those of a group lie behind one another, one query after the other."""

    num_heads: int
    num_kv_heads: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def fold(self, states: torch.Tensor) -> torch.Tensor:
        """(H, b, D) -> (H_kv, b * group, D)."""
        _, length, width = states.shape
        grouped = states.view(self.num_kv_heads, self.group, length, width).transpose(1, 2)
        return grouped.reshape(self.num_kv_heads, length * self.group, width)

    def unfold(self, states: torch.Tensor, *, into: torch.Tensor) -> None:
        """(H_kv, b * group, D) into (H, b, D)."""
        _, length, width = into.shape
        grouped = states.view(self.num_kv_heads, length, self.group, width).transpose(1, 2)
        into.view(self.num_kv_heads, self.group, length, width).copy_(grouped)


@dataclass(frozen=True)
class _Block:
    """Queries of a row, and the keys that any of them sees."""

    queries: slice  # of the sequence
    keys: slice  # of the row with its prefix
    size: int
    window: int | None  # where not all queries see all keys but those that come after them


@dataclass(frozen=True)
class _Row:
    own: slice  # of the sequence
    prefix: slice | None

    @property
    def before(self) -> int:
        """Tokens of the prefix."""
        return 0 if self.prefix is None else self.prefix.stop - self.prefix.start

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """(H_kv, T, D) -> (H_kv, L, D): the row with its prefix, one behind the other."""
        own = states[:, self.own]
        return own.contiguous() if self.prefix is None else torch.cat([states[:, self.prefix], own], 1)

    def add(self, states: torch.Tensor, *, to: torch.Tensor) -> None:
        """The way back."""
        if self.prefix is not None:
            to[:, self.prefix] += states[:, : self.before]
        to[:, self.own] += states[:, self.before :]

    def blocks(self, size: int, window: int | None) -> Iterator[_Block]:
        ahead = self.before - self.own.start  # of places in the sequence, those in the row
        for start in range(self.own.start, self.own.stop, size):
            stop = min(start + size, self.own.stop)
            first, last = ahead + start, ahead + stop
            cut = None if window is None or window >= last else window
            seen = 0 if cut is None else max(0, first + 1 - cut)
            yield _Block(slice(start, stop), slice(seen, last), stop - start, cut)


def _rows(layout: RowLayout) -> Iterator[_Row]:
    start = 0
    for length, prefix in zip(layout.lengths, layout.prefixes, strict=True):
        yield _Row(slice(start, start + length), prefix)
        start += length


def _weights(
    query: torch.Tensor, keys: torch.Tensor, block: _Block, scale: float, heads: _Heads
) -> torch.Tensor:
    """Softmax of the scores of a block, in fp32: (H_kv, b * group, l)."""
    scores = torch.bmm(query.float() * scale, keys[:, block.keys].transpose(1, 2))
    if block.window is None:
        scores[:, :, -block.size :] += _future(query.dtype, heads.group)[
            : block.size * heads.group, : block.size
        ]
    else:
        at = torch.arange(scores.shape[2] - block.size, scores.shape[2]).repeat_interleave(heads.group)
        distance = at[:, None] - torch.arange(scores.shape[2])
        scores.masked_fill_((distance < 0) | (distance >= block.window), float("-inf"))
    return torch.softmax(scores, -1, out=scores)


@cache
def _future(dtype: torch.dtype, group: int) -> torch.Tensor:
    """-inf where a key comes after the query: (block * group, block)."""
    size = _BLOCK[dtype]
    return torch.full((size, size), float("-inf")).triu(1).repeat_interleave(group, 0)


def _softmax_backward(grad: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = torch.ops.aten._softmax_backward_data(grad, weights, -1, torch.float32)
    return made
