"""The gate of the benches: it lets our trainer pass, and a loss or mask that is a little wrong not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bench.gate import LIMITS, compare, judge, our_step, reference_step
from bench.rows import write_tokens

from sftd.protocol import TrainerJob

STEP = {"max_steps": 1, "warmup_steps": 0, "max_grad_norm": 0.0, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_our_step_passes(method: str, make_job: Callable[..., TrainerJob]) -> None:
    job = make_job(method=method, lora={"rank": 4, "alpha": 8.0, "dropout": 0.0}, **STEP)

    verdict = judge(job)

    assert verdict.passed, verdict
    assert verdict.num_rows == 4


def test_one_token_that_is_not_learned_does_not_pass(make_job: Callable[..., TrainerJob]) -> None:
    job = make_job(method="full", **STEP)
    tokens = Path(job.output_dir) / "tokens.jsonl"
    write_tokens(tokens, job)
    rows = [json.loads(line) for line in tokens.read_text().splitlines()]
    learned = [i for i, label in enumerate(rows[0]["labels"]) if label != -100]
    rows[0]["labels"][learned[-1]] = -100

    loss, gradients = our_step(job)
    wanted_loss, wanted = reference_step(job, rows)

    assert abs(loss - wanted_loss) / wanted_loss > LIMITS[0]
    assert compare(gradients, wanted)[0] > LIMITS[1]


def test_a_parameter_without_gradient_does_not_pass(make_job: Callable[..., TrainerJob]) -> None:
    _, gradients = our_step(make_job(method="full", **STEP))
    short = dict(list(gradients.items())[1:])

    assert compare(short, gradients)[0] == float("inf")
