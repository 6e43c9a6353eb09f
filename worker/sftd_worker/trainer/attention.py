"""Attention over rows laid end to end: no token sees a token of another row.

The batch is (1, T): several rows in one sequence, their lengths passed along as `row_lengths`. Registered with
transformers as the attention `sftd_rows`; it attends row by row, so that no dense T x T mask is ever made.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "sftd_rows"


class NotSeparable(RuntimeError):
    """This model's attention takes an option that cannot be kept apart row by row."""


def register() -> None:
    """Make `attn_implementation="sftd_rows"` known to transformers. Safe to call again."""
    AttentionInterface.register(NAME, rows_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def rows_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, H, T, D)
    key: torch.Tensor,  # (1, H_kv, T, D)
    value: torch.Tensor,  # (1, H_kv, T, D_v)
    attention_mask: torch.Tensor | None,
    *,
    row_lengths: list[int] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **options: Any,  # whatever else a model hands its attention; refused below where it would change the result
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row. Returns ((1, T, H, D_v), None)."""
    _refuse_unknown(module, query, attention_mask, is_causal, options)
    lengths = row_lengths or [query.shape[2]]
    q, k, v = (list(torch.split(states, lengths, 2)) for states in (query, key, value))
    parts = [
        _attend(q[i], k[i], v[i], dropout=dropout, scaling=scaling, window=sliding_window, softcap=softcap)
        for i in range(len(lengths))
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _refuse_unknown(
    module: torch.nn.Module,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None,
    options: dict[str, Any],
) -> None:
    if query.shape[0] != 1:
        raise NotSeparable("a batch of more than one sequence")
    if attention_mask is not None:
        raise NotSeparable("a mask of the model's own")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not causal:
        raise NotSeparable("attention that is not causal")
    for name in ("s_aux", "position_bias", "cache"):
        if options.get(name) is not None:
            raise NotSeparable(f"the attention option {name}")


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One row: (1, H, L, D), (1, H_kv, L, D), (1, H_kv, L, D_v) -> (1, H, L, D_v)."""
    length = q.shape[2]
    band = _band(length, window, q.device) if window is not None and window < length else None
    if softcap is not None:
        return _attend_softcapped(q, k, v, dropout=dropout, scaling=scaling, band=band, softcap=softcap)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=band,
        dropout_p=dropout,
        is_causal=band is None,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _attend_softcapped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    dropout: float,
    scaling: float | None,
    band: torch.Tensor | None,
    softcap: float,
) -> torch.Tensor:
    """Scores squashed to (-softcap, softcap) by tanh (Gemma 2, arXiv:2408.00118); SDPA has no such option."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    scores = torch.tanh(q @ k.transpose(2, 3) * scale / softcap) * softcap
    if band is None:
        band = _band(q.shape[2], q.shape[2], q.device)
    scores = scores.masked_fill(~band, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, p=dropout, training=dropout > 0) @ v


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """(L, L) mask: a token sees itself and the window - 1 tokens before it, as transformers counts windows."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def _no_mask(**_: Any) -> None:  # called by transformers with its own keyword arguments
    """The attention itself keeps rows apart and causal: no mask is made."""
    return
