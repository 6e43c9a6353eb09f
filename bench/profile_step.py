"""Where a step of our trainer spends its time: `python -m bench.profile_step --shape 30m --method full`.

The real run (`sftd_worker.trainer.run`) with torch's profiler around its second step, one thread. Prints one JSON line:
seconds of each class of operator, and the operators that cost most. `python and the rest` is what no operator accounts
for; the profiler's own cost is in it. Operators are timed by the wall: where `cpu_seconds` is well below
`wall_seconds`, other programs had the core and the shares are not to be trusted.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from bench import model as models
from bench import rows
from bench.training import Options, synthetic
from torch.profiler import ProfilerActivity, profile

from sftd_worker.trainer.events import Events
from sftd_worker.trainer.run import run
from sftd_worker.trainer.signals import Signals

# First match wins; an operator inside the optimizer's step counts as optimizer whatever it is.
_CLASSES = (
    ("attention", ("scaled_dot_product", "flash_attention")),
    ("matmul", ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear", "mkldnn", "gemm")),
    ("cross-entropy", ("softmax", "nll_loss", "cross_entropy")),
    ("casts and copies", ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous")),
    ("embedding and gather", ("embedding", "aten::index", "aten::gather")),
    ("layout", ("aten::cat", "aten::split", "aten::narrow", "aten::stack", "aten::slice")),
)


class _StepProfile:
    """Profiles what happens between the end of the first step and the end of the second."""

    def __init__(self) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.cpu_seconds = 0.0
        self.wall_seconds = 0.0

    def step_ended(self, step: int) -> None:
        if step == 1:
            self.profiler.start()
            self.cpu_seconds, self.wall_seconds = -time.process_time(), -time.perf_counter()
        elif step == 2:
            self.cpu_seconds += time.process_time()
            self.wall_seconds += time.perf_counter()
            self.profiler.stop()


def main() -> None:
    """Profile one step and print where it went."""
    args = _arguments()
    torch.set_num_threads(1)
    watch = _StepProfile()
    tell = Events.step

    def step(self: Events, step: int, values: dict[str, float]) -> None:
        tell(self, step, values)
        watch.step_ended(step)

    Events.step = step  # type: ignore[method-assign]  # the one place where every step is told
    with tempfile.TemporaryDirectory(prefix="sftd-profile-") as work:
        options = Options(args.seed, args.dist, args.shape, 1, 3, args.precision, [], Path(), Path(work))
        setting = synthetic(options, method=args.method, shape=args.shape, dist=args.dist)
        job = setting.job(Path(work) / "run", gradient_checkpointing=args.gradient_checkpointing)
        end = run(job, signals=Signals())
    assert end.outcome == "succeeded", end.message
    print(json.dumps({"method": args.method, "precision": args.precision, **summary(watch)}))


def summary(watch: _StepProfile) -> dict[str, Any]:
    """Seconds by class, and the dearest operators of all."""
    by_class: dict[str, float] = defaultdict(float)
    by_name: dict[str, float] = defaultdict(float)
    for event in watch.profiler.events() or []:  # type: ignore[no-untyped-call]  # torch leaves it so
        seconds = event.self_cpu_time_total / 1e6
        by_class[_class_of(event)] += seconds
        by_name[event.name] += seconds
    by_class["python and the rest"] = watch.wall_seconds - sum(by_class.values())
    share = {name: round(value / watch.wall_seconds, 4) for name, value in _largest(by_class).items()}
    return {
        "cpu_seconds": round(watch.cpu_seconds, 3),
        "wall_seconds": round(watch.wall_seconds, 3),
        "share": share,
        "operators": {name: round(value, 4) for name, value in list(_largest(by_name).items())[:14]},
    }


def _largest(seconds: dict[str, float]) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _class_of(event: Any) -> str:  # torch.autograd.profiler_util.FunctionEvent
    above = event
    while above is not None:
        if above.name.startswith("Optimizer."):
            return "optimizer"
        if above.name in ("aten::linalg_vector_norm", "aten::_foreach_norm"):
            return "clipping"
        above = above.cpu_parent
    for name, marks in _CLASSES:
        if any(mark in event.name for mark in marks):
            return name
    return "elementwise and other" if event.name.startswith("aten::") else "autograd engine"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=("full", "lora", "qlora"), default="full")
    parser.add_argument("--shape", choices=list(models.SHAPES), default="30m")
    parser.add_argument("--dist", choices=rows.DISTS, default="lognormal")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
