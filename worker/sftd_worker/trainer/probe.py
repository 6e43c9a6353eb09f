"""Can rows be laid end to end for this model? Tried on short random rows when it is loaded, not believed.

A model whose rows cannot be kept apart is padded instead, with the reason: slower, and just as right.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sftd_worker.trainer import attention
from sftd_worker.trainer.packing import Kernel, Prefix, TokenRow, collate
from sftd_worker.trainer.precision import Precision

_LENGTHS = (19, 23, 17)  # two short rows, long enough to tell whether one leaks into the other; a prefix


@dataclass(frozen=True)
class Apart:
    """What is known about a model's rows laid end to end."""

    end_to_end: bool
    because: str | None = None  # where they cannot be
    kernel: Kernel = "rows"
    shares_prefixes: bool = False


def try_end_to_end(causal: Any, device: torch.device, precision: Precision) -> Apart:
    """Switch to row-by-row attention and prove it: two rows end to end must give what each gives alone.

    Where that fails the model keeps its own attention and rows are padded: slower, and just as right.
    """
    own = causal.config._attn_implementation
    linear = [kind for kind in _layer_kinds(causal) if kind not in ("full_attention", "sliding_attention")]
    if linear:
        return Apart(False, f"it has layers of the kind {linear[0]}, which carry state from row to row")
    because = None
    kernels: list[Kernel] = ["varlen", "rows"] if device.type == "cuda" else ["rows"]
    for kernel in kernels:
        try:
            probe = _Probe(causal, device, precision, kernel)
            because = probe.what_is_wrong()
            if because is None:
                return Apart(True, None, kernel, probe.may_share())
        except torch.OutOfMemoryError:
            raise  # says nothing about rows; and of ranks that share weights all must take the same way
        except (attention.NotSeparable, ValueError, TypeError, RuntimeError, KeyError) as error:
            because = f"its attention cannot be kept apart ({str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__})"
        finally:
            causal.set_attn_implementation(own)
    return Apart(False, because)


class _Probe:
    """Short random rows through the decoder: alone, end to end, beside another row, with a prefix in common."""

    def __init__(self, causal: Any, device: torch.device, precision: Precision, kernel: Kernel) -> None:
        self._causal = causal
        self._device = device
        self._kernel: Kernel = kernel
        self._autocast = precision.autocast(device)
        # How far the same numbers may lie apart when matrix products are cut differently, as a share of their size.
        self._noise = 1e-2 if precision.name == "fp32" else 1e-1
        vocab = causal.get_input_embeddings().weight.shape[0]
        generator = np.random.default_rng(0)
        first, second, third = (generator.integers(0, vocab, length) for length in _LENGTHS)
        self._rows = [self._row(first), self._row(second)]
        self._changed = [self._row(np.roll(first, 1)), self._rows[1]]
        self._same_start = [self._row(np.concatenate([third, row])) for row in (first, second)]

    def what_is_wrong(self) -> str | None:
        """None where rows end to end are what they are alone, and what the model's own attention makes of them."""
        own = self._states([self._rows[1]], own=True)
        self._causal.set_attn_implementation(attention.NAME)
        if self._causal.config._attn_implementation != attention.NAME:  # transformers only warns
            raise attention.NotSeparable("the model computes it by itself and takes no other")
        alone = torch.cat([self._states([row]) for row in self._rows])
        together = self._states(self._rows)
        beside_another = self._states(self._changed)
        behind = len(self._rows[0][0])
        for far, most in (
            (
                _distance(beside_another[behind:], together[behind:]),
                1e-3,
            ),  # the same shapes: the same numbers
            (_distance(together, alone), self._noise),
            (_distance(alone[behind:], own), self._noise),
        ):
            if not far <= most:
                return f"rows laid end to end influence each other (by {far:.2g} of a hidden state)"
        return None

    def may_share(self) -> bool:
        """Rows with a common prefix that is computed once, against the same rows without."""
        prefix = Prefix(0, _LENGTHS[2])
        shared = self._states(self._same_start, [prefix, prefix])
        apart = self._states(self._same_start)
        whole = len(self._same_start[0][0])
        kept = torch.cat([apart[:whole], apart[whole + prefix.length :]])
        return shared.shape == kept.shape and bool(_distance(shared, kept) <= self._noise)

    def _row(self, ids: np.ndarray) -> TokenRow:
        return ids, np.ones(len(ids), dtype=bool)

    @torch.no_grad()
    def _states(
        self, rows: list[TokenRow], prefixes: list[Prefix | None] | None = None, *, own: bool = False
    ) -> torch.Tensor:
        """Hidden states (T, d) of rows laid end to end, in evaluation mode."""
        batch = collate(rows, device=self._device, prefixes=prefixes, kernel=self._kernel)
        extra = {} if own else {"row_layout": batch.layout}
        training = self._causal.training
        self._causal.eval()
        try:
            with self._autocast:
                decoder = self._causal.get_decoder()
                states = decoder(
                    input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **extra
                )
        finally:
            self._causal.train(training)
        return states.last_hidden_state[0]  # type: ignore[no-any-return]  # transformers is untyped here


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean difference as a share of the mean size; nan where a state is."""
    size = other.float().abs().mean().clamp_min(1e-12)
    return ((one - other).float().abs().mean() / size).item()


def _layer_kinds(causal: Any) -> list[str]:
    return list(getattr(causal.config.get_text_config(), "layer_types", None) or [])
