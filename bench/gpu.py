"""The trainer on one GPU beside transformers' Trainer and TRL: `python -m bench.gpu --case 1.5b-lora`.

Random models in the shape of Qwen2.5-1.5B and Llama-3-8B, bf16, rows of up to 4,096 tokens, gradient checkpointing on
for all. Prints one JSON line a comparison: un-padded tokens a second of the steps after the first, the share of the
bf16 matmul peak measured here, peak memory of the GPU, loss of each step. Without a CUDA device it says so and ends
with exit code 0. The gate (bench/gate.py) runs on the tiny shape, ours on the GPU in fp32.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import peak
from bench.measure import Measured, Side, SideFailed, in_turns, median, run_ours, run_peer
from bench.model import SHAPES
from bench.training import LOSS_LIMIT, Options, Setting, facts, gate, synthetic

MAX_LENGTH = 4096


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    shape: str
    method: str
    dist: str  # long: all rows 4,000 tokens; skewed: lognormal, most of them far shorter
    batch: int
    peers: tuple[str, ...]
    optimizer: str = "adamw"  # of ours
    peer_optimizer: str | None = None


CASES = {
    "1.5b-lora": Case("1.5b", "lora", "long", 8, ("trainer",)),
    "1.5b-full": Case("1.5b", "full", "long", 8, ("trainer",)),
    "1.5b-lora-skewed": Case("1.5b", "lora", "skewed", 16, ("trainer", "default", "packing")),
    "8b-lora": Case("8b", "lora", "long", 4, ("trainer",)),
    "8b-full-8bit": Case("8b", "full", "long", 4, ("trainer",), "paged_adamw_8bit", "paged_adamw_8bit"),
    "8b-lora-skewed": Case("8b", "lora", "skewed", 8, ("trainer", "default", "packing")),
}


def main() -> None:
    """Measure the cases asked for, or say that there is no GPU."""
    args = _arguments()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured")
        return
    names = list(CASES) if args.case == "all" else args.case.split(",")
    if unknown := [name for name in names if name not in CASES]:
        sys.exit(f"--case: {', '.join(unknown)} is none of {', '.join(CASES)}, all")
    failed = False
    for name in names:
        with tempfile.TemporaryDirectory(prefix="sftd-bench-") as work:  # an 8B model is 16 GB: one at a time
            case = CASES[name]
            options = Options(
                args.seed, case.dist, case.shape, args.rounds, args.steps, "bf16", [], Path(), Path(work)
            )
            device = {"device": torch.cuda.get_device_name()}
            try:
                lines = list(measure(case, options))
            except SideFailed as error:
                lines = [{"failed": str(error)}]
            for line in lines:
                failed |= "failed" in line
                print(json.dumps({"case": name, **line, **device, **facts(options)}), flush=True)
    sys.exit(1 if failed else 0)


def measure(case: Case, options: Options) -> Iterator[dict[str, Any]]:
    """Lines of one case: ours against each peer."""
    small = synthetic(options, method=case.method, shape="tiny", dist="short", device="cuda")
    if (failure := gate(small)) is not None:
        yield failure
        return
    setting = synthetic(
        options,
        method=case.method,
        shape=case.shape,
        dist=case.dist,
        device="cuda",
        batch=case.batch,
        max_length=MAX_LENGTH,
    )
    gc.collect()
    torch.cuda.empty_cache()  # the model was made here; its memory is the measured processes' now
    top = peak.best_flops_per_second("bf16", device="cuda", size=8192)
    torch.cuda.empty_cache()
    sides: list[Side] = [lambda folder: run_ours(setting.job(folder, optimizer=case.optimizer))]
    sides += [_peer(setting, case, mode) for mode in case.peers]
    ours, *others = in_turns(sides, setting.folder / "runs", rounds=options.rounds)
    for mode, theirs in zip(case.peers, others, strict=True):
        yield compare(setting, mode, ours, theirs, top)


def compare(
    setting: Setting, mode: str, ours: list[Measured], theirs: list[Measured], top: float
) -> dict[str, Any]:
    """One line; a failure where the same rows gave another loss."""
    mine, other = ours[0], theirs[0]
    line: dict[str, Any] = {"method": setting.method, "peer_is": mode, "shape": setting.shape}
    if [step.tokens for step in mine.steps] == [step.tokens for step in other.steps]:
        apart = max(abs(a - b) / abs(b) for a, b in zip(mine.losses, other.losses, strict=True))
        if apart > LOSS_LIMIT:
            return {**line, "failed": f"losses differ by {apart:.3g}: {mine.losses}, {other.losses}"}
    speeds = [median(runs, lambda run: run.tokens_per_second) for runs in (ours, theirs)]
    return {
        **line,
        "unit": "un-padded tokens a second",
        "ours": round(speeds[0]),
        "peer": round(speeds[1]),
        "ratio": round(speeds[0] / speeds[1], 2),
        "peak_tflops": round(top / 1e12, 1),
        "share_ours": round(flops_per_second(setting, mine) / top, 3),
        "formula": peak.FORMULA[setting.method],
        "peak_bytes_ours": mine.peak_bytes,
        "peak_bytes_peer": other.peak_bytes,
        "loss_ours": [round(loss, 4) for loss in mine.losses],
        "loss_peer": [round(loss, 4) for loss in other.losses],
        "packed_error": other.facts.get("packed_error"),
    }


def flops_per_second(setting: Setting, run: Measured) -> float:
    """Model FLOPs a second of the steady steps of a run of ours."""
    with setting.tokens.open() as file:
        lengths = [len(json.loads(line)["input_ids"]) for line in file]
    work = peak.Work(
        tokens=run.steady_tokens,
        supervised=sum(step.supervised_tokens for step in run.steps[1:]),
        squares=float(sum(n * n for n in lengths[setting.batch :])),
    )
    seconds = run.steps[-1].at - run.steps[0].at
    return peak.model_flops(SHAPES[setting.shape], work, method=setting.method) / seconds


def _peer(setting: Setting, case: Case, mode: str) -> Side:
    module = "hf_trainer" if mode == "trainer" else "trl_sft"
    return lambda folder: run_peer(
        module,
        setting.peer(
            folder, mode, gradient_checkpointing=True, frozen_dtype="bfloat16", optimizer=case.peer_optimizer
        ),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="all", help=f"comma-separated: {', '.join(CASES)}; or all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1, help="turns there and back")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps; the first is left out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
