"""Our trainer with a look at its resident memory: `python -m bench.resident WORKDIR`.

WORKDIR/resident.json says what the process held before the model was loaded, and the most that it held afterwards.
"""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sftd.protocol import TRAINER_JOB_FILE, TrainerJob
from sftd_worker.trainer import train
from sftd_worker.trainer.events import Events
from sftd_worker.trainer.imports import import_run


def main() -> None:
    """Put the looks in, then be the trainer."""
    folder = Path(sys.argv[1])
    import_run(TrainerJob.model_validate_json((folder / TRAINER_JOB_FILE).read_text()))
    seen: dict[str, int] = {}
    load: Callable[..., Any] = train.load_model
    log = Events.log

    def load_model(*arguments: Any, **options: Any) -> Any:
        seen["baseline_bytes"] = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark counts from here
        return load(*arguments, **options)

    def tell(self: Events, text: str) -> None:
        log(self, text)
        if "baseline_bytes" in seen:
            seen["peak_bytes"] = _status("VmHWM")
            (folder / "resident.json").write_text(json.dumps(seen))

    train.load_model = load_model
    Events.log = tell  # type: ignore[method-assign]  # told at every step, and at the end
    runpy.run_module("sftd_worker.trainer", run_name="__main__", alter_sys=True)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
