"""Our trainer through its own entry point, with a clock: `python -m bench.ours WORKDIR`.

What `python -m sftd_worker.trainer WORKDIR` does, and a line in WORKDIR/steps.jsonl at the end of each step:
the process's CPU seconds and memory high-water so far, and what the trainer itself says of the step.
"""

import json
import resource
import runpy
import sys
import time
from pathlib import Path

from sftd_worker.trainer.events import Events


def main() -> None:
    """Put the clock into Events.step, then be the trainer."""
    out = (Path(sys.argv[1]) / "steps.jsonl").open("w")
    tell = Events.step

    def step(self: Events, step: int, values: dict[str, float]) -> None:
        clock = {
            "step": step,
            "cpu_seconds": time.process_time(),
            "at": time.time(),
            "begun_at": time.time() - values["seconds"],
            "peak_bytes": _peak_bytes(),
            "tokens": values["tokens"],
            "supervised_tokens": values["supervised_tokens"],
            "loss": values["loss"],
        }
        out.write(json.dumps(clock) + "\n")
        out.flush()
        tell(self, step, values)

    Events.step = step  # type: ignore[method-assign]  # the one place where every step is told
    runpy.run_module("sftd_worker.trainer", run_name="__main__", alter_sys=True)


def _peak_bytes() -> int:
    """Of the GPU where there is one, else of the process."""
    import torch  # the trainer has loaded it by now; not before, so that signals are obeyed from the beginning

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it so
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
