"""The edge of a run: every way it can end becomes one EndLine and an exit code. `train.py` is the run itself."""

import atexit
import contextlib
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from transformers.utils.logging import disable_progress_bar

from sftd.protocol import TRAINER_LINE, EndLine, TrainerJob
from sftd.schemas import FailureReason
from sftd_worker.trainer.checkpoint import is_disk_full
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.events import Events
from sftd_worker.trainer.memory import is_out_of_memory
from sftd_worker.trainer.signals import Signals
from sftd_worker.trainer.train import Stopped, train
from sftd_worker.trainer.world import join_world, leave_world

_TIDY_SECONDS = 10.0


def run(job: TrainerJob, *, signals: Signals, notices: Sequence[str] = ()) -> EndLine:
    """Do a run and say how it ended. Never raises for what can go wrong in a run.

    `notices` are told first: what was found out before the run began.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries; nothing a user can mend
    # transformers looks at sharded weights through a type that torch gives up.
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
    disable_progress_bar()  # a log is no terminal
    is_main = os.environ.get("RANK", "0") == "0"
    logs = Path(job.output_dir) / "logs"
    begins_at = _size(logs / "events.jsonl")
    events = Events(logs, attempt=job.attempt, silent=not is_main)
    for notice in notices:
        events.notice(notice)
    world = None

    def end(
        outcome: str, reason: FailureReason | None = None, message: str | None = None, **more: object
    ) -> EndLine:
        return EndLine.model_validate(
            {
                "attempt": job.attempt,
                "at": time.time(),
                "outcome": outcome,
                "reason": reason,
                "message": message,
                **more,
            }
        )

    try:
        world = join_world(device=job.device, gpus=job.spec.gpus)
        files = train(job, world=world, events=events, signals=signals)
        line = end("succeeded", files=files)
    except Stopped as stopped:
        events.log(str(stopped))
        line = end("stopped", message=str(stopped))
    except RunFailed as failure:
        line = end("failed", failure.reason, str(failure), full_path=failure.full_path)
    except Exception as error:
        if is_out_of_memory(error):
            words = str(error).splitlines() or [type(error).__name__]  # Python's own has none
            line = end("failed", FailureReason.OUT_OF_MEMORY, f"out of memory: {words[0]}")
        elif is_disk_full(error):
            name = getattr(error, "filename", None)
            where = f" ({name})" if name else ""
            line = end(
                "failed",
                FailureReason.DISK_FULL,
                f"the disk is full{where}; free some and start again",
                full_path=os.path.abspath(os.fsdecode(name)) if isinstance(name, str | bytes) else None,
            )
        else:
            with contextlib.suppress(OSError):  # the end is told, if nothing else
                events.log(traceback.format_exc())
            line = end("failed", FailureReason.TRAINER_ERROR, f"{type(error).__name__}: {error}"[:4000])
    if line.outcome == "failed":
        with contextlib.suppress(OSError):
            events.log(f"failed ({line.reason}): {line.message}")
    # The first rank that fails knows why; for the others a collective breaks. Rank 0 may hang in one and be killed, so
    # the rank that failed speaks for the run, whichever it is. A divergence is seen by all at once: rank 0 tells it.
    speaks = is_main or (line.outcome == "failed" and line.reason != FailureReason.DIVERGED)
    if speaks and not _has_ended(logs / "events.jsonl", begins_at):
        (events if is_main else Events(logs, attempt=job.attempt)).end(line)
    if world is not None and line.outcome != "failed":
        leave_world(world)
    return line


def run_and_end(job: TrainerJob, *, signals: Signals, notices: Sequence[str] = ()) -> NoReturn:
    """Do a run and end this process with its exit code: 0 unless it failed. Does not return, whatever happens."""
    code = 1
    try:
        code = int(run(job, signals=signals, notices=notices).outcome == "failed")
    except BaseException:  # the process ends here
        traceback.print_exc()
    finally:
        end_process(code)


def end_process(code: int) -> NoReturn:
    """End this process without the interpreter's own end. Does not return.

    While that goes on, threads of libraries (gloo's among them) that let go of a tensor ask for Python's lock and abort:
    a run that had succeeded would count as failed, under torchrun with all its ranks.
    """
    # W&B ends its service there, and would wait for ever for one that hangs.
    tidy = threading.Thread(target=atexit._run_exitfuncs, name="exit", daemon=True)
    tidy.start()
    tidy.join(_TIDY_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _has_ended(path: Path, begins_at: int) -> bool:
    """Has another rank already said how this attempt ended, behind what was there when it began?

    Without a server every start of a run is attempt 1: the number alone does not tell one end from another.
    """
    if not path.exists():
        return False
    with path.open("rb") as file:
        file.seek(max(begins_at, _size(path) - 65536))
        tail = file.read().splitlines()
    for raw in reversed(tail):
        try:
            line = TRAINER_LINE.validate_json(raw)
        except ValueError:
            continue
        if isinstance(line, EndLine):
            return True
    return False
