"""A plan through the whole service, beside the run that it was made for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.e2e.conftest import Q_BASICS, Service

from sftd.plan import Plan
from sftd.schemas import Job


@pytest.fixture(scope="module")
def planned(service: Service) -> tuple[Plan, Job, Plan]:
    """A plan, the run that it was made for, and the plan that is made after it."""
    service.wait(lambda: service.call("GET", "/workers").json()["data"], "a worker")
    spec = service.spec(num_epochs=2, max_steps=None)
    with service.client as client:
        plan = client.jobs.plan(spec=spec)
        job = client.jobs.wait(client.jobs.create(spec=spec).id)
        again = client.jobs.plan(spec={**spec, "seed": 7})
    return plan, job, again


def test_a_plan_says_what_the_run_then_does(planned: tuple[Plan, Job, Plan]) -> None:
    plan, job, _ = planned
    derived = yaml.safe_load((Path(job.folder) / "config.yaml").read_text())["derived"]

    assert (plan.ok, plan.complete, plan.incomplete) == (True, True, None)
    assert plan.steps is not None
    assert plan.training is not None
    assert plan.parameters is not None
    assert plan.steps.total_steps == job.total_steps == job.step
    assert plan.training.num_used == derived["num_rows"]
    assert plan.parameters.trainable == derived["trainable_parameters"]
    assert plan.steps.total_tokens == pytest.approx(job.tokens_seen, rel=0.02)
    assert plan.disk is not None
    saved = sum(
        p.stat().st_size
        for p in (Path(job.folder) / "checkpoints" / f"checkpoint-{job.step}").glob("*.safetensors")
    )
    assert plan.disk.checkpoint_bytes == pytest.approx(saved, rel=0.1)


def test_after_a_run_its_speed_is_measured(planned: tuple[Plan, Job, Plan]) -> None:
    _, job, again = planned

    assert again.time is not None
    assert "measured in" in again.time.basis
    assert again.time.tokens_per_second
    assert job.tokens_per_second
    assert again.time.seconds


def test_rows_are_shown_with_what_is_learned(service: Service) -> None:
    with service.client as client:
        file = client.files.upload(Q_BASICS)
        (row,) = client.files.preview(file.id, base_model=service.model, after=1, limit=1).data
        (understood,) = client.files.rows(file.id, after=1, limit=1)

    assert row.line == understood.line == 2
    assert understood.messages is not None
    answer = understood.messages[-1]["content"]
    assert "".join(s.text for s in row.segments if s.supervised).startswith(answer)


def test_the_command_line_prints_a_plan(service: Service, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "2+2?", "completion": "4"}\n' * 3 + '{"prompt": "3+3?", "completion": " "}\n')
    spec = tmp_path / "job.yaml"
    spec.write_text(
        f"base_model: {service.model}\ntraining_file: rows.jsonl\nmax_steps: 5\nwarmup_steps: 5\n"
    )

    def sftd(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "sftd.cli", *arguments],
            env=service.environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    refused = sftd("plan", "job.yaml")
    rows.write_text(Q_BASICS.read_text())
    shown = sftd("plan", "job.yaml")
    told = json.loads(sftd("plan", "job.yaml", "--json").stdout)

    assert refused.returncode != 0
    assert "line 4" in refused.stderr + refused.stdout
    assert shown.returncode == 0, shown.stderr
    assert "warmup_steps" in shown.stdout
    assert "⟦" in shown.stdout
    assert told["memory"][0]["device"] == "cpu"
