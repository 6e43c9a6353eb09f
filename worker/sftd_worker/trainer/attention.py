"""Attention over rows laid end to end: no token sees a token of another row.

The batch is (1, T): several rows in one sequence, their places passed along as `row_layout`. Registered with
transformers as the attention `sftd_rows`; no dense T x T mask is ever made. Rows that begin with the same tokens may
share them: the keys and values of the prefix lie in the sequence once.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from sftd_worker.trainer import cpu_attention
from sftd_worker.trainer.packing import RowLayout
from sftd_worker.trainer.precision import compute_dtype

NAME = "sftd_rows"
WATCHED = "sftd_rows_watched"


class NotSeparable(RuntimeError):
    """This model's attention takes an option that cannot be kept apart row by row."""


def register() -> None:
    """Make `attn_implementation="sftd_rows"` known to transformers. Safe to call again.

    No mask is registered with it: transformers makes none for an attention that has none.
    """
    AttentionInterface.register(NAME, rows_attention)


@dataclass
class Watch:
    """Which windows a model asks its masks for, and which of them its attention is told: we see no masks."""

    in_masks: set[int] = field(default_factory=set)
    in_attention: set[int] = field(default_factory=set)

    def register(self) -> None:
        """Make `attn_implementation="sftd_rows_watched"` the attention that tells this watch."""
        AttentionInterface.register(WATCHED, self._attend)
        AttentionMaskInterface.register(WATCHED, self._make_no_mask)

    @property
    def in_masks_alone(self) -> set[int]:
        """Windows that a model would lose."""
        return self.in_masks - self.in_attention

    def _attend(self, *args: Any, **options: Any) -> tuple[torch.Tensor, None]:  # as transformers calls it
        if options.get("sliding_window") is not None:
            self.in_attention.add(options["sliding_window"])
        return rows_attention(*args, **options)

    def _make_no_mask(self, **options: Any) -> None:  # as transformers calls it
        if options.get("local_size") is not None:
            self.in_masks.add(options["local_size"])


def rows_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, H, T, D)
    key: torch.Tensor,  # (1, H_kv, T, D)
    value: torch.Tensor,  # (1, H_kv, T, D_v)
    attention_mask: torch.Tensor | None,
    *,
    row_layout: RowLayout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **options: Any,  # whatever else a model hands its attention; refused below where it would change the result
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row. Returns ((1, T, H, D_v), None)."""
    _refuse_unknown(module, query, attention_mask, is_causal, scaling, options)
    layout = row_layout or RowLayout((query.shape[2],), (None,), query.device)
    how = _How(dropout, scaling, sliding_window, softcap)
    if layout.kernel == "varlen" and how.fits_varlen(query, value):
        return _attend_varlen(query, key, value, layout, how), None
    if how.softcap is None and how.dropout == 0 and cpu_attention.fits(query):
        scale = how.scaling if how.scaling is not None else query.shape[-1] ** -0.5
        return cpu_attention.attend(query, key, value, layout, scale=scale, window=how.window), None
    return _attend_in_turn(query, key, value, layout, how), None


@dataclass(frozen=True)
class _How:
    dropout: float
    scaling: float | None
    window: int | None
    softcap: float | None

    def fits_varlen(self, query: torch.Tensor, value: torch.Tensor) -> bool:
        """The flash kernels know no softcap and no dropout, and half precision only."""
        plain = self.softcap is None and self.dropout == 0 and query.shape[-1] == value.shape[-1]
        return plain and compute_dtype(query) in (torch.bfloat16, torch.float16)


def _attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, how: _How
) -> torch.Tensor:
    """All rows in one call of torch's flash kernel (CUDA only). A row's queries are the last of its keys, as its
    causal mask counts them where there are fewer queries than keys."""
    from torch.nn.attention.varlen import varlen_attn

    dtype = compute_dtype(query)
    q, k, v = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # (T, H, D)
    if layout.key_index is not None:
        k, v = (_Gathered.apply(states, layout.key_index) for states in (k, v))  # type: ignore[no-untyped-call]  # torch leaves apply unannotated
    # Before torch 2.12 the kernel shares key heads without being told.
    grouped: dict[str, Any] = {}
    if q.shape[1] != k.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        grouped["enable_gqa"] = True
    out = varlen_attn(
        q,
        k,
        v,
        layout.query_ends,
        layout.key_ends,
        max(layout.lengths),
        max(layout.whole_lengths),
        scale=how.scaling,
        window_size=(-1 if how.window is None else how.window - 1, 0),
        **grouped,
    )
    assert isinstance(out, torch.Tensor)  # no statistics were asked for
    return out[None]


class _Gathered(torch.autograd.Function):
    """states[index] for (T, H, D) and (n,). Tokens of a prefix stand in it many times: their gradients are summed in
    fp32, in a fixed order, and without a look at the indices that would wait for the device."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.num_tokens = len(states)
        return states.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (index,) = ctx.saved_tensors
        total = grad.new_zeros((ctx.num_tokens, *grad.shape[1:]), dtype=torch.float32)
        torch.ops.aten._index_put_impl_(total, [index], grad.float(), True, True)
        return total.to(grad.dtype), None


def _attend_in_turn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, how: _How
) -> torch.Tensor:
    """One call of SDPA for each row: on a CPU eight times faster than one call with a mask over all of them."""
    q, k, v = (list(torch.split(states, list(layout.lengths), 2)) for states in (query, key, value))
    parts = []
    for own_q, own_k, own_v, prefix in zip(q, k, v, layout.prefixes, strict=True):
        if prefix is None:
            parts.append(_attend(own_q, own_k, own_v, how))
            continue
        before = slice(prefix.start, prefix.stop)
        whole_k, whole_v = (
            torch.cat([key[:, :, before], own_k], 2),
            torch.cat([value[:, :, before], own_v], 2),
        )
        if own_q.shape[2] > before.stop - before.start:
            # The prefix attends once more for nothing: cheaper than a mask, which looks at the future as well.
            whole_q = torch.cat([query[:, :, before], own_q], 2)
            parts.append(_attend(whole_q, whole_k, whole_v, how)[:, :, before.stop - before.start :])
        else:
            parts.append(_attend(own_q, whole_k, whole_v, how))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _refuse_unknown(
    module: torch.nn.Module,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None,
    scaling: object,
    options: dict[str, Any],
) -> None:
    if query.shape[0] != 1:
        raise NotSeparable("a batch of more than one sequence")
    if attention_mask is not None:
        raise NotSeparable("a mask of the model's own")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not causal:
        raise NotSeparable("attention that is not causal")
    if not (scaling is None or isinstance(scaling, int | float)):
        raise NotSeparable("a scaling that is not a number")
    for name in ("s_aux", "position_bias", "cache"):
        if options.get(name) is not None:
            raise NotSeparable(f"the attention option {name}")


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: _How) -> torch.Tensor:
    """One row: (1, H, n, D), (1, H_kv, L, D), (1, H_kv, L, D_v) -> (1, H, n, D_v). The n queries are the last of L."""
    num_queries, length = q.shape[2], k.shape[2]
    plain = num_queries == length and (how.window is None or how.window >= length)
    band = None if plain else _band(num_queries, length, how.window, q.device)
    if how.softcap is not None:
        return _attend_softcapped(q, k, v, how, band, how.softcap)
    if q.is_cuda and q.shape[1] != k.shape[1] and (band is not None or compute_dtype(q) == torch.float32):
        # Shared key heads are known to the flash kernel alone, which takes neither: the others would hold all scores.
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=band,
        dropout_p=how.dropout,
        is_causal=plain,
        scale=how.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _attend_softcapped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: _How, band: torch.Tensor | None, softcap: float
) -> torch.Tensor:
    """Scores squashed to (-softcap, softcap) by tanh (Gemma 2, arXiv:2408.00118); SDPA has no such option."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = how.scaling if how.scaling is not None else q.shape[-1] ** -0.5
    scores = torch.tanh(q @ k.transpose(2, 3) * scale / softcap) * softcap
    if band is None:
        band = _band(q.shape[2], k.shape[2], None, q.device)
    scores = scores.masked_fill(~band, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, p=how.dropout, training=how.dropout > 0) @ v


def _band(num_queries: int, length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(n, L) mask: a token sees itself and the window - 1 tokens before it, as transformers counts windows."""
    at = torch.arange(length, device=device)
    distance = at[length - num_queries :, None] - at[None, :]
    return (distance >= 0) & (distance < (length if window is None else window))
