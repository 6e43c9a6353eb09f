"""Can rows be laid end to end for this model? Tried on short random rows when it is loaded, not believed.

A model whose rows cannot be kept apart is padded instead, with the reason: slower, and just as right. One whose tokens
see those that come after them cannot be trained here at all.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sftd.schemas import FailureReason
from sftd_worker.trainer import attention
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.packing import Kernel, Prefix, TokenRow, collate
from sftd_worker.trainer.precision import Precision

_SAME = 1e-3  # how far apart the same numbers may lie, made by products of the same shapes
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
    others = [kind for kind in _layer_kinds(causal) if kind not in ("full_attention", "sliding_attention")]
    if others:
        return Apart(False, f"it has layers of the kind {others[0]}, which are not known to keep rows apart")
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


def require_causal(causal: Any, device: torch.device, precision: Precision) -> None:
    """Raise RunFailed(model_unsupported) where the last token of a row changes what stands before it: such a model would
    be asked to predict what it sees."""
    probe = _Probe(causal, device, precision, "rows")
    before, after = probe.with_another_end()
    # What is before the last token comes out the same, but for experts that get other tokens with it.
    if _distance(before, after) > (1e-4 if precision.name == "fp32" else 1e-2):
        raise RunFailed(
            FailureReason.MODEL_UNSUPPORTED,
            f"base_model: tokens of {type(causal).__name__} see those that come after them (by its config, it is no "
            "causal language model); choose another model",
        )


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

    def with_another_end(self) -> tuple[torch.Tensor, torch.Tensor]:
        """States of all tokens of a row but its last, by the model's own attention, with two different last ones."""
        ids, supervised = self._rows[0]
        other = ids.copy()
        other[-1] = self._rows[1][0][0] if self._rows[1][0][0] != ids[-1] else self._rows[1][0][1]
        before, after = (self._states([(row, supervised)], own=True)[:-1] for row in (ids, other))
        return before, after

    def what_is_wrong(self) -> str | None:
        """None where rows end to end are what they are alone, and what the model's own attention makes of them."""
        own = self._states([self._rows[1]], own=True)
        watch = attention.Watch()
        watch.register()
        self._causal.set_attn_implementation(attention.WATCHED)
        if self._causal.config._attn_implementation != attention.WATCHED:  # transformers only warns
            raise attention.NotSeparable("the model computes it by itself and takes no other")
        alone = torch.cat([self._states([row]) for row in self._rows])
        together = self._states(self._rows)
        beside_another = self._states(self._changed)
        behind = len(self._rows[0][0])
        for far, most in (
            (
                _distance(beside_another[behind:], together[behind:]),
                _SAME,
            ),
            (_distance(together, alone), self._noise),
            (_distance(alone[behind:], own), self._noise),
        ):
            if not far <= most:
                return f"rows laid end to end influence each other (by {far:.2g} of a hidden state)"
        if watch.in_masks_alone:  # longer than these rows, so that nothing else would show it
            raise attention.NotSeparable(
                f"its window of {max(watch.in_masks_alone)} tokens is in a mask alone"
            )
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
                states = decoder_of(self._causal)(
                    input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **extra
                )
        finally:
            self._causal.train(training)
        return states.last_hidden_state[0]  # type: ignore[no-any-return]  # transformers is untyped here


def decoder_of(causal: Any) -> Any:
    """The part of a causal model that ends in hidden states, before its head. Raises RunFailed(model_unsupported)."""
    found = causal.get_decoder()
    if found is causal or found is causal.get_output_embeddings():  # transformers' guess went wrong (Llama 4)
        found = causal.base_model if causal.base_model is not causal else getattr(causal, "model", None)
    if found is None or found is causal:
        raise RunFailed(
            FailureReason.MODEL_UNSUPPORTED,
            f"base_model: where the hidden states of {type(causal).__name__} come from is not known here; choose another "
            "model",
        )
    return found


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean difference as a share of the mean size; nan where a state is."""
    size = other.float().abs().mean().clamp_min(1e-12)
    return ((one - other).float().abs().mean() / size).item()


def _layer_kinds(causal: Any) -> list[str]:
    return list(getattr(causal.config.get_text_config(), "layer_types", None) or [])
