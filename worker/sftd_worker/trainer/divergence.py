"""When a run has diverged, and which of its checkpoints to go back to.

A loss that is not finite has diverged, and so has one above twice what the run began with or what guessing would cost:
over a hundred supervised tokens, of one step or of several in a row, for a single answer that is wrong in the data can
cost a sure model as much. Weights saved at a step are good when the loss that was computed from them was fine: the loss
of the step after.
"""

import math
from pathlib import Path

from sftd.schemas import FailureReason
from sftd_worker.trainer.checkpoint import MANIFEST, RunState, step_of
from sftd_worker.trainer.errors import RunFailed

_TIMES = 2.0
_MANY_TOKENS = 100


def has_exploded(loss: float, state: RunState, *, vocab_size: int, num_tokens: int) -> str | None:
    """What is wrong with the loss of the step behind `state.step`, over `num_tokens`, or None.

    The run's first loss is in its state, and so is how long its losses have been far off: this adds to it.
    """
    begin = [] if state.first_loss is None else [state.first_loss]
    wrong = _far_off(loss, begin, vocab_size)
    if wrong is None:
        state.far_off_since, state.tokens_far_off = None, 0
        return None
    if state.far_off_since is None:
        state.far_off_since = state.step
    state.tokens_far_off += num_tokens
    return wrong if not math.isfinite(loss) or state.tokens_far_off >= _MANY_TOKENS else None


def last_good(state: RunState, step: int) -> int:
    """The last step whose weights are known to be good, where those of `step` would be but for losses far off before."""
    return step if state.far_off_since is None else min(step, state.far_off_since - 1)


def evaluation_has_exploded(loss: float, state: RunState, *, vocab_size: int, num_tokens: int) -> str | None:
    """The same of an evaluation loss, which may begin elsewhere: rows to evaluate on can be of another kind."""
    begin = [row["eval_loss"] for row in state.evaluations[:1]]
    wrong = _far_off(loss, begin if state.first_loss is None else [*begin, state.first_loss], vocab_size)
    return wrong if not math.isfinite(loss) or num_tokens >= _MANY_TOKENS else None


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


def _far_off(loss: float, begin: list[float], vocab_size: int) -> str | None:
    if not math.isfinite(loss):
        return f"is {loss}"
    limit = _TIMES * max([math.log(vocab_size), *begin])
    if begin and loss > limit:
        return f"is {loss:.4g}, above {limit:.4g} (twice the first loss, or that of guessing)"
    return None
