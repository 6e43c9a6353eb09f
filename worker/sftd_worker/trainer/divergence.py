"""When a run has diverged, and which of its checkpoints to go back to.

A loss that is not finite has diverged, and so has one above twice what the run began with or what guessing would cost.
Weights saved at a step are good when the loss that was computed from them was fine: the loss of the step after.
"""

import math
from pathlib import Path

from sftd.schemas import FailureReason
from sftd_worker.trainer.checkpoint import MANIFEST, RunState, step_of
from sftd_worker.trainer.errors import RunFailed

_TIMES = 2.0


def has_exploded(loss: float, state: RunState, *, vocab_size: int) -> str | None:
    """What is wrong with a training loss, or None. The run's first loss is in its state."""
    begin = [] if state.first_loss is None else [state.first_loss]
    return _exploded(loss, begin, vocab_size)


def evaluation_has_exploded(loss: float, state: RunState, *, vocab_size: int) -> str | None:
    """The same of an evaluation loss, which may begin elsewhere: rows to evaluate on can be of another kind."""
    begin = [row["eval_loss"] for row in state.evaluations[:1]]
    return _exploded(loss, begin if state.first_loss is None else [*begin, state.first_loss], vocab_size)


def diverged(what: str, checkpoints: Path, *, good_through: int) -> RunFailed:
    """The failure, naming the last checkpoint whose weights are known to be good: of step `good_through` or before."""
    steps = sorted(step_of(path) for path in checkpoints.glob("checkpoint-*") if (path / MANIFEST).exists())
    good = [step for step in steps if step <= good_through]
    bad = [step for step in steps if step > good_through]
    said = [f"checkpoint-{step} holds weights that had diverged" for step in bad[-1:]]
    if good:
        said.append(f"checkpoint-{good[-1]} is the last good one")
    else:
        said.append("there is no good one before it" if bad else "there is no checkpoint yet")
    return RunFailed(FailureReason.DIVERGED, f"{what}; {', '.join(said)}")


def _exploded(loss: float, begin: list[float], vocab_size: int) -> str | None:
    if not math.isfinite(loss):
        return f"is {loss}"
    limit = _TIMES * max([math.log(vocab_size), *begin])
    if begin and loss > limit:
        return f"is {loss:.4g}, above {limit:.4g} (twice the first loss, or that of guessing)"
    return None
