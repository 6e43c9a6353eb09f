"""Importing what a run needs, and no more of it: most of a cold start is spent here.

bitsandbytes is a second of it. peft imports it wherever it is installed, to know its layers when it sees them, so a run
that cannot have such layers keeps it out of sight. It would also ask the driver for its devices, after which no process
can be forked that uses them.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sftd.protocol import TrainerJob

_BITSANDBYTES = "bitsandbytes"


def import_run(job: TrainerJob) -> None:
    """Import `run.py` and all below it, for this job: what it does not need stays hidden, until the next call."""
    if needs_bitsandbytes(job):
        show_bitsandbytes()
    else:
        hide_bitsandbytes()
    with quick_imports():
        import sftd_worker.trainer.run  # noqa: F401


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without collecting garbage: modules are not any, and each look at all of them takes a quarter second.

    What is there in the end is left out of later looks as well.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def needs_bitsandbytes(job: TrainerJob) -> bool:
    """May this run meet a layer or an optimizer of bitsandbytes? Yes, where it cannot be told from here."""
    if job.spec.method == "qlora" or job.spec.optimizer != "adamw" or job.trust_remote_code:
        return True
    config = _config_file(job.model_path)
    return config is None or "quantization_config" in config.read_text("utf-8", errors="replace")


def hide_bitsandbytes() -> None:
    """From now on it cannot be imported, as if it were not installed. Does nothing once it has been imported."""
    sys.modules.setdefault(_BITSANDBYTES, None)  # type: ignore[arg-type]  # None: what Python takes for "not there"


def show_bitsandbytes() -> None:
    """Take `hide_bitsandbytes` back."""
    if sys.modules.get(_BITSANDBYTES, sys) is None:
        del sys.modules[_BITSANDBYTES]


def _config_file(model_path: str) -> Path | None:
    """config.json of the base, where it lies on this machine already."""
    if model_path.startswith("/"):
        path = Path(model_path) / "config.json"
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_path, "config.json")
    return Path(found) if isinstance(found, str) else None
