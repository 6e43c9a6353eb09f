"""Sums in a fixed order, so that a step done twice is the same to the bit.

Where torch is strict about it, the backward passes of attention and of embeddings add in a fixed order, and an
operation that cannot raises; where it only warns, attention adds as it comes, in less memory.
https://docs.pytorch.org/docs/stable/notes/randomness.html
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CANNOT = re.compile(r"^(.+?) does not have a deterministic implementation")


def keep_threads(told: int | None) -> int:
    """Compute with as many threads as the run did before: sums on a CPU are cut into as many parts. Returns how many."""
    if told is not None and told != torch.get_num_threads():
        torch.set_num_threads(told)
    return torch.get_num_threads()


class FixedOrder:
    """Strict for as long as the model's operations allow; the first that cannot ends that for the rest of the run.

    torch's mode is one for all threads. The one that writes checkpoints only looks at values and moves them.
    """

    def __init__(self) -> None:
        self.given_up = False
        self.because = ""  # the operation that cannot, where this process has met it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over each
        torch.set_deterministic_debug_mode("warn")

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Strict inside, with the backward passes that run there."""
        torch.set_deterministic_debug_mode("warn" if self.given_up else "error")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode("warn")

    def give_up_for(self, error: BaseException) -> bool:
        """Is this torch's word that an operation has no fixed order? Then the work can be done again without."""
        found = _CANNOT.match(str(error)) if isinstance(error, RuntimeError) else None
        if found is None or self.given_up:
            return False
        self.because = found[1]
        self.give_up()
        return True

    def give_up(self) -> None:
        """For the rest of the run."""
        self.given_up = True
        torch.set_deterministic_debug_mode("warn")

    def end(self) -> None:
        """Leave torch as it is without a run."""
        torch.set_deterministic_debug_mode("default")
