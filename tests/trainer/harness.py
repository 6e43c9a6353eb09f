"""How the tests start the trainer, and what they read of what it left."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftd.protocol import TRAINER_JOB_FILE, TRAINER_LINE, EndLine, TrainerJob, TrainerLine

ROOT = Path(__file__).resolve().parents[2]
Q_BASICS = ROOT / "examples" / "q_basics.jsonl"


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
