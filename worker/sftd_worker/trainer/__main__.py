"""Start one run: `python -m sftd_worker.trainer WORKDIR`. Reads WORKDIR/job.json; exit code 0 unless the run failed.

A job of several gpus starts itself again under torchrun, one process a GPU.
"""

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from sftd_worker.trainer.signals import Signals, die_with_parent, show_stacks_on_signal

# Where ranks meet, torch looks up the name of each one's address, for its log: at a name server that is slow or silent
# all would wait for it. What is looked up otherwise (a hub) is the ranks' business, so that they forget this again.
_QUICK_LOOKUPS = "timeout:1 attempts:1"


def main() -> None:
    """Obey signals first, import torch after."""
    forget_quick_lookups()
    die_with_parent()
    signals = Signals().install()
    if len(sys.argv) != 2:
        sys.exit("usage: python -m sftd_worker.trainer WORKDIR")
    work(Path(sys.argv[1]), signals)


def work(workdir: Path, signals: Signals) -> NoReturn:
    """Read the folder's job and run it, or count what a plan asks for. Does not return."""
    from sftd.protocol import ANALYSIS_FILE, TRAINER_JOB_FILE, TRAINER_STACKS_FILE, TrainerJob

    if (workdir / ANALYSIS_FILE).exists():
        from sftd_worker.trainer.analysis import analyse_and_end

        analyse_and_end(workdir)
    show_stacks_on_signal(workdir / TRAINER_STACKS_FILE)
    from sftd_worker.trainer.imports import import_run

    job = TrainerJob.model_validate_json((workdir / TRAINER_JOB_FILE).read_text())
    if job.spec.gpus > 1 and "WORLD_SIZE" not in os.environ:
        start_ranks(job.spec.gpus, ["-m", "sftd_worker.trainer", str(workdir)])

    import_run(job)
    from sftd_worker.trainer.run import run_and_end

    run_and_end(job, signals=signals)


def forget_quick_lookups() -> None:
    """In a rank, before it looks up anything."""
    if os.environ.get("RES_OPTIONS") == _QUICK_LOOKUPS:
        del os.environ["RES_OPTIONS"]


def start_ranks(num_processes: int, command: list[str]) -> None:
    """Become torchrun with `num_processes` processes of `python COMMAND`. Does not return."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # meant for the ranks, which take it over again
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",  # else ranks look for each other by the machine's name, which nothing may know
        f"--nproc_per_node={num_processes}",
    ]
    os.environ.setdefault("RES_OPTIONS", _QUICK_LOOKUPS)
    os.execv(sys.executable, [*torchrun, *command])


if __name__ == "__main__":
    main()
