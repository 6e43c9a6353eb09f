"""Killed at random points and resumed, a run is the run that nobody killed, bit for bit: in every variant, by SIGKILL.

SFTD_KILL_SEED repeats a failure; it is printed. `bench/kills.py` does the same for as long as one likes.
"""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.trainer.harness import Q_BASICS, ROOT, finish_trainer, start_trainer
from tests.trainer.kill_runs import ENVIRONMENT, VARIANTS, make_job, record, resumed
from tests.trainer.test_resume import steps_done, wait_for

KILLS = 66
SEED = int(os.environ.get("SFTD_KILL_SEED", "1"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("kills")
    command = [sys.executable, "-m", "tests.trainer.kill_runs", str(folder)]
    done = subprocess.run(
        [*command, "--kills", str(KILLS), "--seed", str(SEED)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **ENVIRONMENT},
    )
    assert done.returncode == 0, f"SFTD_KILL_SEED={SEED}: {done.stderr[-4000:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_runs_end_as_if_nothing_had_happened(variant: str, outcomes: list[dict[str, Any]]) -> None:
    mine = [outcome for outcome in outcomes if outcome["variant"] == variant]

    assert sum(len(outcome["deaths"]) for outcome in mine) >= 5
    wrong = [outcome for outcome in mine if outcome["mismatch"]]
    assert not wrong, f"SFTD_KILL_SEED={SEED}: {json.dumps(wrong, indent=1)}"


@pytest.mark.slow
def test_the_kills_hit_every_phase_of_a_run(outcomes: list[dict[str, Any]]) -> None:
    hits = Counter(hit for outcome in outcomes for hit in outcome["hits"])

    assert sum(len(outcome["deaths"]) for outcome in outcomes) >= 60
    for phase, least in {
        "start": 1,
        "between": 3,
        "step": 8,
        "evaluation": 4,
        "export": 2,
        "writing": 8,  # a checkpoint is being written, by the thread
        "between files": 6,
        "unannounced": 1,  # it is whole, and nobody knows
    }.items():
        assert hits[phase] >= least, f"SFTD_KILL_SEED={SEED}: {phase} in {hits}"


@pytest.mark.slow
def test_one_rank_killed_under_torchrun_then_resumed(tmp_path: Path, tiny: Path) -> None:
    """The launcher as it is: the death of a rank ends the run, which goes on bit-identically."""
    (tmp_path / "rows.jsonl").write_text("\n".join(Q_BASICS.read_text().splitlines()[:72]) + "\n")
    whole = make_job("two ranks", tiny, tmp_path / "whole")
    reference = finish_trainer(whole, start_trainer(whole))
    job = make_job("two ranks", tiny, tmp_path / "killed")
    process = start_trainer(job)
    wait_for(process, lambda: steps_done(tmp_path / "killed") >= 5)
    victim = psutil.Process(process.pid).children()[SEED % 2]
    victim.kill()
    finish_trainer(job, process)

    again = resumed(job, random.Random(SEED))
    finished = finish_trainer(again, start_trainer(again))

    assert finished.returncode == 0, finished.output
    assert again.resume_from is not None
    assert record(tmp_path / "killed") == record(tmp_path / "whole"), reference.output
