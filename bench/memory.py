"""The memory that a plan tells, beside what a run takes: peak resident memory over that before the model is loaded.

    python -m bench.memory [--shapes 30m 98m 200m] [--precisions auto] > bench/results/memory.jsonl

The estimate comes the way of a plan: rows and model are counted by `sftd_worker.trainer.analysis`, the parts added up by
`sftd.footprint`. Every run saves a checkpoint and evaluates on the way. How the C library's heap is cut up differs from run to run,
so that the median of some runs counts. One JSON line a case; `error` is estimate / measured - 1.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench import model as models
from bench import rows
from bench.measure import start

from sftd.footprint import BatchFacts, estimate, total
from sftd.protocol import (
    ANALYSIS_FILE,
    ANALYSIS_RESULT_FILE,
    TRAINER_JOB_FILE,
    Analysis,
    AnalysisJob,
    AnalysisReport,
    AnalysisRequest,
    InputFile,
    TrainerJob,
)
from sftd.spec import JobSpec
from sftd_worker.trainer.checkpoint import hash_file

SHAPES = ("30m", "98m", "200m")
METHODS = ("full", "lora", "qlora")


def main() -> None:
    """Measure, and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(models.SHAPES), default=SHAPES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--precisions", nargs="+", choices=("auto", "bf16", "fp32"), default=("auto",))
    parser.add_argument("--batch", type=int, default=4, help="rows of about 256 tokens in a micro-batch")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case; the median counts")
    parser.add_argument("--checkpointing", nargs="+", choices=("on", "off"), default=("on", "off"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sftd-bench-") as work:
        for shape in arguments.shapes:
            folder = _build(Path(work) / shape, shape)
            for precision in arguments.precisions:
                for method in arguments.methods:
                    for word in arguments.checkpointing:
                        spec = _spec(folder, method, precision, arguments.batch, checkpointing=word == "on")
                        line = {"case": "memory", "shape": shape, "method": method, "precision": precision}
                        print(json.dumps({**line, **_case(folder, spec, arguments.rounds)}), flush=True)


def _build(folder: Path, shape: str) -> Path:
    folder.mkdir()
    rows.write_corpus(folder / "corpus.jsonl", seed=1)
    tokenizer = models.build_tokenizer(folder / "corpus.jsonl", models.SHAPES[shape])
    models.build(folder / "model", models.SHAPES[shape], tokenizer, seed=1)
    rows.write_rows(
        folder / "rows.jsonl", rows.Words(tokenizer, seed=2), num_rows=80, dist="lognormal", seed=3
    )
    return folder


def _spec(folder: Path, method: str, precision: str, batch: int, *, checkpointing: bool) -> JobSpec:
    fields: dict[str, Any] = {
        "base_model": str(folder / "model"),
        "method": method,
        "training_file": "file_bench",
        "precision": "auto" if method == "qlora" else precision,
        "batch_size": batch,
        "gradient_accumulation_steps": 2,
        "max_seq_length": 256,
        "on_overlong": "truncate",
        "max_steps": 4,
        "warmup_steps": 0,
        "save_steps": 2,
        "eval_steps": 2,
        "validation_split": 0.1,
        "gradient_checkpointing": checkpointing,
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.0},
    }
    return JobSpec.model_validate(fields)


def _case(folder: Path, spec: JobSpec, rounds: int) -> dict[str, Any]:
    runs = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            runs.append(_measured(folder, spec, Path(name)))
    with tempfile.TemporaryDirectory(dir=folder) as name:
        counted = _counted(folder, spec, Path(name))
    measured = statistics.median(runs)
    assert counted.model is not None
    batch = BatchFacts(counted.largest_tokens, counted.largest_supervised, counted.longest_row)
    parts = estimate(spec, counted.model, batch, device="cpu", precision=_precision(spec, counted))
    return {
        "gradient_checkpointing": spec.gradient_checkpointing,
        "tokens": batch.num_tokens,
        "measured_mib": round(measured / 2**20),
        "all_measured_mib": [round(run / 2**20) for run in runs],
        "estimated_mib": round(total(parts) / 2**20),
        "error": round(total(parts) / measured - 1, 3),
        "parts_mib": {part: round(value / 2**20) for part, value in parts.model_dump().items()},
    }


def _precision(spec: JobSpec, counted: Analysis) -> Any:  # one of two words
    return counted.precision if spec.precision == "auto" else spec.precision


def _measured(folder: Path, spec: JobSpec, run: Path) -> int:
    """Peak over the baseline, in bytes."""
    job = TrainerJob(
        job_id="bench",
        attempt=1,
        spec=spec,
        model_path=str(folder / "model"),
        training_path=str(folder / "rows.jsonl"),
        training_name="rows.jsonl",
        output_dir=str(run),
        cache_dir=str(folder / "cache"),
        device="cpu",
    )
    (run / TRAINER_JOB_FILE).write_text(job.model_dump_json())
    start(["-m", "bench.resident", str(run)], run / "output.txt")
    seen = json.loads((run / "resident.json").read_text())
    return int(seen["peak_bytes"] - seen["baseline_bytes"])


def _counted(folder: Path, spec: JobSpec, run: Path) -> Analysis:
    path = folder / "rows.jsonl"
    file = InputFile(
        file_id="file_bench",
        filename=path.name,
        sha256=hash_file(path),
        bytes=path.stat().st_size,
        path=path.name,
    )
    job = AnalysisJob(
        request=AnalysisRequest(spec=spec, training_file=file),
        model_path=str(folder / "model"),
        training_path=str(path),
        cache_dir=str(folder / "cache"),
        local_files_only=True,
    )
    (run / ANALYSIS_FILE).write_text(job.model_dump_json())
    start(["-m", "sftd_worker.trainer", str(run)], run / "analysis.txt")
    report = AnalysisReport.model_validate_json((run / ANALYSIS_RESULT_FILE).read_bytes())
    assert report.analysis is not None, report.error
    return report.analysis


if __name__ == "__main__":
    main()
