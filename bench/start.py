"""From the request for a trainer to the end of its first step, a tiny LoRA job: started, forked off the warm parent, and
a plain TRL script beside them.

    python -m bench.start [--rounds N] > bench/results/start.jsonl

Ours are started as the agent starts them (`sftd_worker/process.py`), and read as it reads them: the time of the first
step's line in events.jsonl. All have one thread, a process of their own, and their data in a cache from a run before.
Wall seconds are of use on a quiet machine only, so the CPU seconds of the process (of a forked one: since the fork) are
given too. They run in turns, A B C C B A; one JSON line a way.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from examples import tiny_model

from sftd.protocol import TRAINER_JOB_FILE, TRAINER_LINES_FILE, TrainerJob
from sftd.spec import JobSpec
from sftd_worker.family import adopt_orphans, descendants
from sftd_worker.process import Trainer, trainer_environment
from sftd_worker.settings import WorkerSettings
from sftd_worker.warm import WarmParent

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "examples" / "q_basics.jsonl"
GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class FirstStep:
    """One start."""

    seconds: float  # wall, from the request to the end of the first step
    cpu_seconds: float  # of the process until then


def main() -> None:
    """Measure, and print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="each way is started twice in a round")
    rounds = parser.parse_args().rounds
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="sftd-bench-") as work:
        found = measure(Path(work), rounds)
    trl = found["trl"]
    for way, starts in found.items():
        print(
            json.dumps(
                {
                    "case": f"start, {way}",
                    "seconds": round(_median(starts, "seconds"), 3),
                    "cpu_seconds": round(_median(starts, "cpu_seconds"), 3),
                    "ratio_to_trl": round(_median(starts, "seconds") / _median(trl, "seconds"), 3),
                    "cpu_ratio_to_trl": round(
                        _median(starts, "cpu_seconds") / _median(trl, "cpu_seconds"), 3
                    ),
                    "all_seconds": [round(start.seconds, 3) for start in starts],
                    "load_average": round(os.getloadavg()[0], 1),
                }
            ),
            flush=True,
        )


def measure(work: Path, rounds: int) -> dict[str, list[FirstStep]]:
    """All starts of each way."""
    model = tiny_model.build(work / "model", ROWS)
    environment = trainer_environment(os.environ, cuda_visible_devices="", offline=True)
    warm = WarmParent(WorkerSettings().warm_argv, environment=environment)
    warm.keep()
    while warm.starting:
        time.sleep(0.05)
    ways: dict[str, Callable[[Path], FirstStep]] = {
        "cold": lambda folder: start_ours(model, folder, environment, warm, cold=True),
        "warm": lambda folder: start_ours(model, folder, environment, warm, cold=False),
        "trl": lambda folder: start_trl(model, folder),
    }
    found: dict[str, list[FirstStep]] = {way: [] for way in ways}
    for turn in range(-1, 2 * rounds):  # the first one fills caches, and counts for nothing
        for way in list(ways)[:: 1 if turn % 2 else -1]:
            folder = work / f"{way}{turn}"
            (folder / "logs").mkdir(parents=True)
            start = ways[way](folder)
            if turn >= 0:
                found[way].append(start)
    warm.end()
    return found


def start_ours(
    model: Path, folder: Path, environment: dict[str, str], warm: WarmParent, *, cold: bool
) -> FirstStep:
    """Our trainer on a job of one step, to its end."""
    spec = JobSpec(
        base_model=str(model),
        training_file="file_1",
        method="lora",
        max_steps=1,
        batch_size=4,
        gradient_accumulation_steps=1,
        max_seq_length=512,
        warmup_steps=0,
        precision="fp32",
    )
    job = TrainerJob(
        job_id="bench",
        attempt=1,
        spec=spec,
        model_path=str(model),
        training_path=str(ROWS),
        training_name=ROWS.name,
        output_dir=str(folder),
        cache_dir=str(folder.parent / "cache"),
        device="cpu",
    )
    (folder / TRAINER_JOB_FILE).write_text(job.model_dump_json())
    begun_at = time.time()
    trainer = Trainer(
        WorkerSettings().trainer_argv,
        folder=folder,
        attempt=1,
        environment=environment,
        lock_fds=[],
        save_grace_seconds=GRACE_SECONDS,
        stop_grace_seconds=GRACE_SECONDS,
        on_exit=lambda: None,
        warm=warm,
        cold=cold,
    )
    pid = next(pid for pid in descendants(os.getpid()) if pid != warm.pid)
    cpu_seconds, at = None, None
    while at is None and trainer.running:
        time.sleep(0.005)
        at = _first_step_at(folder / TRAINER_LINES_FILE)
        cpu_seconds = _cpu_seconds(pid) or cpu_seconds
    while trainer.running:
        time.sleep(0.01)
    if at is None or cpu_seconds is None or trainer.returncode:
        raise RuntimeError(f"{trainer.describe_exit()} {trainer.output_tail(20)}")
    return FirstStep(at - begun_at, cpu_seconds)


def start_trl(model: Path, folder: Path) -> FirstStep:
    """The plain script, to its end."""
    begun_at = time.time()
    script = str(ROOT / "bench" / "peers" / "trl_start.py")
    with (folder / "output.txt").open("w") as output:
        subprocess.run(
            [sys.executable, script, str(model), str(ROWS), str(folder)],
            stdout=output,
            stderr=output,
            check=True,
        )
    line = json.loads((folder / "first_step.json").read_text())
    return FirstStep(line["at"] - begun_at, line["cpu_seconds"])


def _first_step_at(path: Path) -> float | None:
    """When the trainer told of its first step, by its own clock."""
    if not path.exists():
        return None
    for text in path.read_text().splitlines():
        if text.startswith('{"type":"step"') and text.endswith("}"):
            return float(json.loads(text)["at"])
    return None


def _cpu_seconds(pid: int) -> float | None:
    """User and system time of a process until now; None once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _median(starts: list[FirstStep], name: str) -> float:
    return statistics.median(getattr(start, name) for start in starts)


if __name__ == "__main__":
    main()
