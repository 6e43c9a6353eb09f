"""The input embedding, whose gradient goes to the rows of the tokens that were there.

torch makes a gradient as large as the whole vocabulary in every backward pass, zeros but for a few rows, and adds it to
what there was: of a large vocabulary the largest tensor beside the weights.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def add_gradients_by_row(layer: torch.nn.Module) -> bool:
    """Have `layer`, a plain torch.nn.Embedding that learns, add gradients to its weight's `.grad` by itself, past autograd.

    False, and nothing changed, for any other layer. The loss must be the end of the chain: `backward`, not `autograd.grad`.
    """
    if type(layer) is not torch.nn.Embedding or not layer.weight.requires_grad:
        return False
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        return False
    layer.forward = partial(_look_up, layer)  # type: ignore[method-assign]  # of this one layer
    return True


def _look_up(layer: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    rows: torch.Tensor = _Rows.apply(layer.weight, ids, layer.padding_idx)  # type: ignore[no-untyped-call]  # torch leaves apply unannotated
    return rows


class _Rows(torch.autograd.Function):
    """weight (V, d) at ids (...): (..., d)."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
        ctx.save_for_backward(weight, ids)
        ctx.padding_idx = padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, ids = ctx.saved_tensors
        flat, grad = ids.reshape(-1), grad.reshape(-1, weight.shape[1]).to(weight.dtype)
        if ctx.padding_idx is not None:  # torch gives this row none
            grad = grad.masked_fill((flat == ctx.padding_idx)[:, None], 0.0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        # unsafe: indices that the forward has looked at are not looked at again, which would wait for a GPU
        torch.ops.aten._index_put_impl_(weight.grad, [flat], grad, True, True)
        return None, None, None
