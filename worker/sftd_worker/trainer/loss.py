"""Cross-entropy over the supervised positions alone, in chunks: the full logits are never made.

The gradient of a chunk is made right behind its loss, while its logits are at hand: they are neither kept for the
backward pass nor computed twice. (The derivative is softmax - onehot; chunking and gradient-in-forward as in Liger
Kernel, arXiv:2410.10989.) Only sums are computed; the caller's `scale` divides them by the tokens of the whole step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sftd.footprint import CHUNK_LOGITS
from sftd_worker.trainer.memory import give_back_freed_memory
from sftd_worker.trainer.precision import compute_dtype

_BLOCK_LOGITS = (
    2 * 1024 * 1024
)  # on a CPU the passes over a chunk go piece by piece, each small enough for its cache
_BLOCK_WEIGHTS = 16 * 1024 * 1024  # of the head, whose product of lower precision is made before it is added
_LARGE_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True)
class Head:
    """How hidden states become logits."""

    logits: Callable[[torch.Tensor], torch.Tensor]  # (n, d) -> (n, V)
    vocab_size: int
    weight: torch.Tensor | None  # (V, d), where logits are hidden @ weight.T and nothing else
    parameters: tuple[torch.nn.Parameter, ...]  # all of the head's that learn
    adds_up: bool = False  # the gradient of `weight` may go into its `.grad` at once, past autograd


@dataclass(frozen=True)
class Scores:
    """Sums over supervised tokens."""

    loss_sum: torch.Tensor  # scalar, fp64
    num_correct: torch.Tensor  # scalar, int64
    num_tokens: int


def scaled_loss(head: Head, hidden: torch.Tensor, targets: torch.Tensor, *, scale: float) -> torch.Tensor:
    """`scale` × the summed cross-entropy of `hidden` (n, d) against `targets` (n,), with gradient; a scalar in fp64.

    Logits are made in the type of autocast where it is on; the loss itself is computed in fp32 and summed in fp64. Where
    the head `adds_up`, the loss must be the end of the chain: its weight has its gradient before `backward` is called.
    """
    if head.weight is not None:
        # Where no backward pass follows, what went into `.grad` would stay there.
        adds_up = head.adds_up and hidden.requires_grad and torch.is_grad_enabled()
        return _PlainHead.apply(hidden, head.weight, targets, scale, adds_up)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply unannotated
    return _AnyHead.apply(head, hidden, targets, scale, *head.parameters)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply unannotated


@torch.no_grad()
def score(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> Scores:
    """Summed cross-entropy and number of right top-1 predictions, without gradient."""
    loss = hidden.new_zeros((), dtype=torch.float64)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    for rows in _pieces(targets.numel(), CHUNK_LOGITS, head.vocab_size):
        logits = head.logits(hidden[rows])
        for part in _blocks(logits):
            wanted = targets[rows][part]
            block = logits[part].float()
            correct += (block.argmax(-1) == wanted).sum()
            losses, _ = _exponentiate(block, wanted)
            loss += losses
    return Scores(loss, correct, targets.numel())


class _PlainHead(torch.autograd.Function):
    """logits = hidden @ weight.T. Two matrix products more than the forward alone, and passes over logits in cache.

    With `adds_up` the gradient of the weight is never held beside its `.grad`: of large vocabularies it is the largest
    tensor of all, and where the weight is the embedding's too, it would wait for the whole backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        scale: float,
        adds_up: bool,
    ) -> torch.Tensor:
        kind = hidden.device.type
        dtype, vocab_size = compute_dtype(weight), len(weight)
        learns_hidden, learns_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if learns_hidden else None
        grad_weight = _Sum(weight, weight.grad if adds_up else None)
        if kind == "cpu" and learns_weight and weight.nbytes >= _LARGE_BYTES:
            give_back_freed_memory()  # a run's memory is at its fullest here
        loss = hidden.new_zeros((), dtype=torch.float64)
        with torch.autocast(kind, enabled=False):
            states, matrix = hidden.to(dtype), _Matrix(weight, dtype)
            chunks = list(_pieces(targets.numel(), CHUNK_LOGITS, vocab_size))
            most = max((rows.stop - rows.start for rows in chunks), default=0)
            room = states.new_empty(most * vocab_size)  # the logits of every chunk lie in the same memory
            for rows in chunks:
                chunk = states[rows]
                logits = room[: len(chunk) * vocab_size].view(len(chunk), vocab_size)  # (c, V)
                matrix.make_logits(chunk, logits)
                loss += _loss_and_gradient(logits, targets[rows], scale)
                if grad_hidden is not None:
                    grad_hidden[rows] = matrix.gradient_of_states(logits)
                if learns_weight:
                    grad_weight.add(logits, chunk)
        if adds_up and learns_weight:
            weight.grad = grad_weight.total
        ctx.save_for_backward(grad_hidden, None if adds_up else grad_weight.total)
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        return (*(_times(grad, outer[0]) for grad in ctx.saved_tensors), None, None, None)


class _Matrix:
    """A head's weight (V, d) in the type that products are computed in.

    Where that is not its own, a CPU makes the copy piece by piece, each time anew: of a large vocabulary it would be as
    large as the logits, and so would what the library lays out anew for a product with all of it.
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        pieces = list(_pieces(len(weight), _BLOCK_WEIGHTS, weight.shape[1]))
        self._whole = weight.device.type != "cpu" or weight.dtype == dtype or len(pieces) == 1
        self._weight = weight.to(dtype) if self._whole else weight
        self._pieces = [slice(0, len(weight))] if self._whole else pieces
        self._dtype = dtype

    def make_logits(self, states: torch.Tensor, logits: torch.Tensor) -> None:
        """states (c, d) @ weight.T into `logits` (c, V)."""
        for piece in self._pieces:
            torch.mm(states, self._weight[piece].to(self._dtype).T, out=logits[:, piece])

    def gradient_of_states(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (c, V) @ weight: (c, d)."""
        if self._whole:
            return logits @ self._weight
        total = torch.zeros(len(logits), self._weight.shape[1])
        for piece in self._pieces:
            total += logits[:, piece] @ self._weight[piece].to(self._dtype)
        return total


class _Sum:
    """The gradient of a head's weight (V, d), chunk by chunk, in its own type. None before the first."""

    def __init__(self, weight: torch.Tensor, total: torch.Tensor | None) -> None:
        self._weight = weight
        self.total = total

    def add(self, logits: torch.Tensor, states: torch.Tensor) -> None:
        """Gradients of logits (c, V) at states (c, d)."""
        parts = _pieces(len(self._weight), _BLOCK_WEIGHTS, states.shape[1])
        if self.total is None:
            self.total = torch.empty_like(self._weight)
            for part in parts:
                self.total[part] = logits[:, part].T @ states
        elif logits.dtype == self.total.dtype:
            self.total.addmm_(logits.T, states)
        else:
            for part in parts:
                self.total[part] += logits[:, part].T @ states


class _AnyHead(torch.autograd.Function):
    """A head with a bias, an adapter or a scaling behind it: torch differentiates each chunk on the spot."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        scale: float,
        *parameters: torch.nn.Parameter,
    ) -> torch.Tensor:
        grad_hidden = torch.zeros_like(hidden)
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        loss = hidden.new_zeros((), dtype=torch.float64)
        for rows in _pieces(targets.numel(), CHUNK_LOGITS, head.vocab_size):
            with torch.enable_grad():
                states = hidden[rows].detach().requires_grad_()
                part = F.cross_entropy(head.logits(states).float(), targets[rows], reduction="sum")
                found = torch.autograd.grad(part * scale, [states, *parameters])
            grad_hidden[rows] = found[0]
            for grad, more in zip(grads, found[1:], strict=True):
                grad += more
            loss += part.detach().double()
        ctx.save_for_backward(grad_hidden, *grads)
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        grad_hidden, *grads = (_times(grad, outer[0]) for grad in ctx.saved_tensors)
        return (None, grad_hidden, None, None, *grads)


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
    """Summed loss of `logits` (n, V), which become `scale` × their own gradient, in place."""
    if logits.device.type != "cpu":
        return _loss_and_gradient_at_once(logits, targets, scale)
    loss = logits.new_zeros((), dtype=torch.float64)
    for part in _blocks(logits):
        wanted = targets[part]
        block = logits[part].float()  # the very memory where logits are fp32
        losses, sums = _exponentiate(block, wanted)
        loss += losses
        block.mul_(scale / sums)
        block[torch.arange(len(wanted), device=block.device), wanted] -= scale
        if block.data_ptr() != logits[part].data_ptr():
            logits[part] = block
    return loss


def _loss_and_gradient_at_once(logits: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
    """The same numbers for a GPU, whose memory is passed over less often, and which nothing here waits for.

    An ordinary assignment by index looks at the largest index first where sums are in a fixed order.
    """
    aim = logits.gather(1, targets[:, None]).float()
    largest = logits.amax(-1, keepdim=True).float()
    block = torch.sub(logits, largest).exp_()  # fp32
    sums = block.sum(-1, keepdim=True)
    loss = (sums.log().double() + largest.double() - aim.double()).sum()
    factor = scale / sums
    at_target = (block.gather(1, targets[:, None]) * factor - scale).squeeze(1).to(logits.dtype)
    torch.mul(block, factor, out=logits)
    places = [torch.arange(len(targets), device=logits.device), targets]
    torch.ops.aten._index_put_impl_(logits, places, at_target, False, True)  # unsafe: no look at the indices
    return loss


def _exponentiate(block: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed loss, sum of exponentials (n, 1)) of fp32 logits (n, V), which become exp(logits - their maximum)."""
    wanted = block.gather(1, targets[:, None])
    largest = block.amax(-1, keepdim=True)
    sums = block.sub_(largest).exp_().sum(-1, keepdim=True)
    return (sums.log().double() + largest.double() - wanted.double()).sum(), sums


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    most = _BLOCK_LOGITS if logits.device.type == "cpu" else logits.numel()
    return _pieces(logits.shape[0], most, logits.shape[1])


def _pieces(num_rows: int, most: int, width: int) -> Iterator[slice]:
    """Cut `num_rows` rows of `width` into slices of at most `most` elements (but one row at least)."""
    size = max(1, most // max(1, width))
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def _times(grad: torch.Tensor | None, outer: torch.Tensor) -> torch.Tensor | None:
    """The chain rule; nothing to do where the loss is the end of the chain, as in training on a CPU."""
    if grad is None or (outer.device.type == "cpu" and outer.item() == 1.0):
        return grad
    return grad * outer.to(grad.dtype)
