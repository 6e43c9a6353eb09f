"""A run whose numbers go off ends within the step, saves nothing of it, and names the last good checkpoint."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.harness import Finished
from tests.trainer.test_resume import resumed, run_some_steps, steps_done
from torch.optim.optimizer import register_optimizer_step_post_hook

from sftd.protocol import TrainerJob
from sftd_worker.trainer import train as train_module
from sftd_worker.trainer.checkpoint import RunState, verify
from sftd_worker.trainer.divergence import evaluation_has_exploded, has_exploded, last_good
from sftd_worker.trainer.run import run
from sftd_worker.trainer.signals import Signals

MakeJob = Callable[..., TrainerJob]
# The rate of the first step is 0 in the warm-up; the second step throws the weights far off.
EXPLODING: dict[str, Any] = {
    "method": "full",
    "learning_rate": 10.0,
    "max_grad_norm": 0,
    "warmup_steps": 1,
    "max_steps": 8,
    "save_steps": 1,
}


def names(job: TrainerJob) -> list[str]:
    return sorted(path.name for path in (Path(job.output_dir) / "checkpoints").iterdir())


def saved(job: TrainerJob) -> list[int]:
    return [line.step for line in Finished(None, Path(job.output_dir)).lines if line.type == "checkpoint"]


def test_an_exploding_loss_ends_the_run_within_its_step(make_job: MakeJob) -> None:
    job = make_job(**EXPLODING)

    end = run(job, signals=Signals())

    assert (end.outcome, end.reason) == ("failed", "diverged")
    assert (end.message or "").startswith("the loss of step 3 is ")
    assert "checkpoint-1 is the last good one" in (end.message or "")
    assert steps_done(Path(job.output_dir)) == 2
    assert verify(Path(job.output_dir) / "checkpoints" / "checkpoint-1")
    assert not (Path(job.output_dir) / "results").exists()


def test_a_published_checkpoint_of_diverged_weights_is_named_and_a_resumed_run_decides_the_same(
    make_job: MakeJob,
) -> None:
    """A pause after the step that threw the weights off: they are finite, so that they are saved."""
    job = make_job(**EXPLODING)
    asked = Signals()
    asked.save_and_stop = True
    assert run_some_steps(job, asked, steps=2) == "stopped"
    assert names(job) == ["checkpoint-1", "checkpoint-2"]

    ends = [
        run(again, signals=Signals())
        for again in (
            resumed(job),
            job.model_copy(
                update={"attempt": 3, "resume_from": f"{job.output_dir}/checkpoints/checkpoint-1"}
            ),
        )
    ]

    assert [end.reason for end in ends] == ["diverged", "diverged"]
    assert ends[0].message == ends[1].message
    assert "checkpoint-2 holds weights that had diverged" in (ends[0].message or "")
    assert "checkpoint-1 is the last good one" in (ends[0].message or "")


def test_an_exploding_evaluation_blocks_the_checkpoint_of_its_step(make_job: MakeJob) -> None:
    job = make_job(**{**EXPLODING, "save_steps": 2, "eval_steps": 2, "validation_split": 0.1})

    end = run(job, signals=Signals())

    assert end.reason == "diverged"
    assert (end.message or "").startswith("the evaluation loss at step 2 is ")
    assert (end.message or "").endswith("there is no checkpoint yet")
    assert not (Path(job.output_dir) / "checkpoints").exists()


@contextmanager
def infinite_weight_after(step: int) -> Iterator[None]:
    """One weight becomes infinite in the update of a step."""
    done = 0

    def overflow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal done
        done += 1
        if done == step:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0][0, 0] = math.inf

    hook = register_optimizer_step_post_hook(overflow)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_weights_that_are_not_finite_are_never_saved(method: str, make_job: MakeJob) -> None:
    """Also after the last step, when no loss is computed from them any more."""
    job = make_job(method=method, max_steps=2, save_steps=1, learning_rate=1e-3)

    with infinite_weight_after(step=2):
        end = run(job, signals=Signals())

    assert end.reason == "diverged"
    assert "after step 2 the weights are not finite" in (end.message or "")
    assert "checkpoint-1 is the last good one" in (end.message or "")
    assert names(job) == ["checkpoint-1"]
    assert saved(job) == [1]
    assert not (Path(job.output_dir) / "results").exists()


def test_weights_that_are_not_finite_in_the_middle_of_a_run_are_not_saved_either(make_job: MakeJob) -> None:
    job = make_job(method="full", max_steps=6, save_steps=1, learning_rate=1e-3)

    with infinite_weight_after(step=3):
        end = run(job, signals=Signals())

    assert end.reason == "diverged"
    assert "checkpoint-2 is the last good one" in (end.message or "")
    assert names(job) == ["checkpoint-1", "checkpoint-2"]
    assert steps_done(Path(job.output_dir)) <= 4


def test_a_gradient_that_is_no_number_leaves_the_checkpoint_of_a_fine_loss_good(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(method="full", max_steps=6, save_steps=2, learning_rate=1e-3)
    real, done = train_module.sum_gradients, 0

    def broken(world: Any, parameters: Any) -> None:
        nonlocal done
        real(world, parameters)
        done += 1
        if done == 3:
            parameters[0].grad[0, 0] = math.nan

    monkeypatch.setattr(train_module, "sum_gradients", broken)
    end = run(job, signals=Signals())

    assert end.reason == "diverged"
    assert end.message == "the gradient of step 3 has the norm nan; checkpoint-2 is the last good one"
    assert saved(job) == [2]


@pytest.mark.parametrize(
    ("loss", "first", "verdict"),
    [
        (13.8, 1.0, None),  # 2 x ln(1000) is 13.816
        (13.9, 1.0, "is 13.9, above 13.82"),
        (39.9, 20.0, None),
        (40.1, 20.0, "is 40.1, above 40"),
        (math.nan, 1.0, "is nan"),
        (math.inf, None, "is inf"),
        (99.0, None, None),  # the run's first
    ],
)
def test_a_loss_is_measured_against_guessing_and_the_first_one(
    loss: float, first: float | None, verdict: str | None
) -> None:
    said = has_exploded(loss, RunState(first_loss=first), vocab_size=1000, num_tokens=100)

    assert (said is None) == (verdict is None)
    assert (said or "").startswith(verdict or "")


def test_a_wrong_answer_of_a_few_tokens_ends_no_run_but_a_hundred_in_a_row_do() -> None:
    """A model that is sure of itself pays more for one row that is wrong than for guessing."""
    state = RunState(step=7, first_loss=1.0)

    said = []
    for loss, num_tokens in [(15.0, 40), (0.0, 40), (15.0, 40), (16.0, 40), (17.0, 40)]:
        said.append(has_exploded(loss, state, vocab_size=1000, num_tokens=num_tokens))
        if said[-1] is None:
            state.step += 1

    assert said[:4] == [None] * 4
    assert said[4] is not None
    assert last_good(state, state.step - 1) == 8  # the weights of step 8 made a fine loss, those of 9 did not
    assert has_exploded(math.nan, RunState(first_loss=1.0), vocab_size=1000, num_tokens=1) is not None


def test_rows_to_evaluate_on_may_be_of_a_harder_kind_from_the_start() -> None:
    state = RunState(first_loss=2.0, evaluations=[{"step": 0, "eval_loss": 30.0}])

    def wrong(loss: float, state: RunState, num_tokens: int = 100) -> bool:
        return evaluation_has_exploded(loss, state, vocab_size=1000, num_tokens=num_tokens) is not None

    assert not wrong(29.0, state)
    assert wrong(61.0, state)
    assert not wrong(61.0, state, num_tokens=99)
    assert wrong(math.nan, state, num_tokens=1)
    assert not wrong(30.0, RunState())
