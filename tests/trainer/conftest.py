"""A small model built on the spot, and a way to run the trainer on it through its real entry point."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sftd.protocol import TRAINER_JOB_FILE, TRAINER_LINE, EndLine, TrainerJob, TrainerLine
from sftd.spec import JobSpec
from sftd_worker.trainer.run import run
from sftd_worker.trainer.signals import Signals

ROOT = Path(__file__).resolve().parents[2]
Q_BASICS = ROOT / "examples" / "q_basics.jsonl"
SHARED = ROOT.parent / "shared" / "data"
SMALL = {
    "method": "lora",
    "max_steps": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "save_steps": 2,
    "eval_steps": 2,
    "max_seq_length": 512,
    "precision": "fp32",
}


@dataclass
class Finished:
    """A run that has ended, and what it left."""

    end: EndLine | None
    folder: Path
    returncode: int = 0
    output: str = ""

    @property
    def lines(self) -> list[TrainerLine]:
        raw = (self.folder / "logs" / "events.jsonl").read_text().splitlines()
        return [TRAINER_LINE.validate_json(line) for line in raw]

    def values(self, name: str) -> dict[int, float]:
        """step -> value of one metric; where an attempt did a step again, the later one counts."""
        found = {}
        for line in self.lines:
            if line.type == "step" and name in line.values:
                found[line.step] = line.values[name]
        return found

    @property
    def log(self) -> str:
        return "\n".join(line.text for line in self.lines if line.type == "log")

    def evaluations(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "logs" / "eval_results.json").read_text())


def load_tiny_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_model", ROOT / "examples" / "tiny_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def build_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Build a small model; the same arguments give the same folder."""
    tiny_model = load_tiny_model()
    made: dict[str, Path] = {}

    def build(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("model") / "tiny"
            made[key] = tiny_model.build(
                folder, Q_BASICS, **{"hidden_size": 64, "vocab_size": 1024, **options}
            )
        return made[key]

    return build


@pytest.fixture(scope="session")
def tiny(build_model: Callable[..., Path]) -> Path:
    return build_model()


@pytest.fixture
def make_job(tiny: Path, tmp_path: Path) -> Callable[..., TrainerJob]:
    """A trainer's job over the example data; keyword arguments are fields of the spec, or of the job with job_=…"""

    def make(name: str = "run", *, job: dict[str, Any] | None = None, **spec: Any) -> TrainerJob:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        fields = {**SMALL, "base_model": str(tiny), "training_file": "file_1", **spec}
        made = {
            "job_id": "job_1",
            "attempt": 1,
            "model_path": fields["base_model"],
            "training_path": str(Q_BASICS),
            "training_name": "q_basics.jsonl",
            "output_dir": str(folder),
            "cache_dir": str(tmp_path / "cache"),
            "device": "cpu",
            **(job or {}),
        }
        return TrainerJob(spec=JobSpec.model_validate(fields), **made)

    return make


@pytest.fixture
def run_job(make_job: Callable[..., TrainerJob]) -> Callable[..., Finished]:
    """Run a job in this process and return what it left."""

    def start(name: str = "run", **options: Any) -> Finished:
        job = make_job(name, **options)
        return Finished(run(job, signals=Signals()), Path(job.output_dir))

    return start


def start_trainer(job: TrainerJob, **env: str) -> "subprocess.Popen[str]":
    """Start `python -m sftd_worker.trainer` on a job as the worker does."""
    folder = Path(job.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAINER_JOB_FILE).write_text(job.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "sftd_worker.trainer", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def finish_trainer(job: TrainerJob, process: "subprocess.Popen[str]", timeout: float = 180) -> Finished:
    output, _ = process.communicate(timeout=timeout)
    done = Finished(None, Path(job.output_dir), process.returncode, output)
    ends = [line for line in done.lines if line.type == "end" and line.attempt == job.attempt]
    done.end = ends[-1] if ends else None
    return done
