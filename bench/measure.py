"""Measured runs: each side is a process of its own with one thread, started in turns A B B A."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.clock import PeerSettings

from sftd.protocol import TRAINER_JOB_FILE, TrainerJob

ROOT = Path(__file__).resolve().parents[1]


class SideFailed(RuntimeError):
    """A measured process ended with an error; the message holds the end of its output."""


@dataclass(frozen=True)
class Step:
    """The end of one optimizer step, as the process's own clock has it."""

    step: int
    cpu_seconds: float  # of the process, from its start
    at: float  # seconds since the epoch
    begun_at: float
    peak_bytes: int  # memory high-water so far
    tokens: float  # without padding
    supervised_tokens: float
    loss: float


@dataclass(frozen=True)
class Measured:
    """One run of one side."""

    steps: list[Step]
    started_at: float  # when the process was started, seconds since the epoch
    facts: dict[str, Any] = field(default_factory=dict)  # what else the peer found

    @property
    def steady_tokens(self) -> float:
        """Of all steps but the first."""
        return sum(step.tokens for step in self.steps[1:])

    @property
    def tokens_per_cpu_second(self) -> float:
        if len(self.steps) < 2:
            raise SideFailed("a run of one step has no steady steps; raise --steps")
        return self.steady_tokens / (self.steps[-1].cpu_seconds - self.steps[0].cpu_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.steady_tokens / (self.steps[-1].at - self.steps[0].at)

    @property
    def first_step_seconds(self) -> float:
        """Wall seconds from the start of the process to the end of its first step."""
        return self.steps[0].at - self.started_at

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    @property
    def mean_loss(self) -> float:
        """Over all supervised tokens of the run."""
        total = sum(step.supervised_tokens for step in self.steps)
        return sum(step.loss * step.supervised_tokens for step in self.steps) / total

    @property
    def peak_bytes(self) -> int:
        return self.steps[-1].peak_bytes


Side = Callable[[Path], Measured]  # an empty folder -> a run in it


def in_turns(sides: list[Side], folder: Path, *, rounds: int) -> list[list[Measured]]:
    """Run every side twice a round, there and back (A B B A); the runs of each side."""
    runs: list[list[Measured]] = [[] for _ in sides]
    for round_ in range(rounds):
        order = list(range(len(sides)))
        for turn, i in enumerate(order + order[::-1]):
            here = folder / f"{round_}-{turn}"
            here.mkdir(parents=True)
            runs[i].append(sides[i](here))
    return runs


def median(runs: list[Measured], figure: Callable[[Measured], float]) -> float:
    return statistics.median(figure(run) for run in runs)


def run_ours(job: TrainerJob) -> Measured:
    """Our trainer on a job, in the job's own folder."""
    folder = Path(job.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAINER_JOB_FILE).write_text(job.model_dump_json())
    return _run(["-m", "bench.ours", str(folder)], folder)


def run_peer(module: str, settings: PeerSettings) -> Measured:
    """`module` is trl_sft or hf_trainer."""
    folder = Path(settings.folder)
    path = folder / "settings.json"
    path.write_text(json.dumps(asdict(settings)))
    return _run(["-m", f"bench.peers.{module}", str(path)], folder)


def start(arguments: list[str], output: Path) -> None:
    """Run a Python process with one thread to its end, from the root of the repository. Raises SideFailed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with output.open("w") as file:
        done = subprocess.run([sys.executable, *arguments], stdout=file, stderr=file, cwd=ROOT, env=env)
    if done.returncode:
        raise SideFailed(f"{' '.join(arguments)} ended with {done.returncode}: {output.read_text()[-2000:]}")


def _run(arguments: list[str], folder: Path) -> Measured:
    started_at = time.time()
    start(arguments, folder / "output.txt")
    steps = [Step(**json.loads(line)) for line in (folder / "steps.jsonl").read_text().splitlines()]
    if not steps:
        raise SideFailed(f"{' '.join(arguments)} made no step: {(folder / 'output.txt').read_text()[-2000:]}")
    facts = folder / "peer.json"
    return Measured(steps, started_at, json.loads(facts.read_text()) if facts.exists() else {})
