"""How a run ends: always with a last word, and with an exit code that nothing behind it can change."""

import errno
import subprocess
import sys
from collections.abc import Callable

import pytest

from sftd.protocol import TrainerJob
from sftd_worker.trainer import run as run_module
from sftd_worker.trainer.run import run
from sftd_worker.trainer.signals import Signals

MakeJob = Callable[..., TrainerJob]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/config.yaml"), "disk_full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full"),
        (OSError(errno.EIO, "Input/output error"), "trainer_error"),
        (ValueError(), "trainer_error"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_whatever_a_run_raises_becomes_its_last_word(
    error: Exception, reason: str, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(run_module, "train", fail)

    end = run(make_job(), signals=Signals())

    assert (end.outcome, end.reason) == ("failed", reason)
    assert end.message
    assert end.full_path == getattr(error, "filename", None)


ENDS = """
import atexit, sys, threading, time
from pathlib import Path
from sftd_worker.trainer import run as module

module._TIDY_SECONDS = 0.5
how = sys.argv[1]
if how == "a hook that hangs":
    atexit.register(time.sleep, 3600)
if how == "a hook that tidies":
    atexit.register(lambda: print("tidied"))
if how == "a run that raises":
    def run(*_, **__):
        raise KeyboardInterrupt("nobody expects it")
    module.run = run
else:
    module.run = lambda *_, **__: type("Line", (), {"outcome": "failed" if how == "a failure" else "succeeded"})
threading.Thread(target=time.sleep, args=[3600]).start()  # no daemon: the interpreter's own end would wait for it
print("last words", end="")
module.run_and_end(None, signals=None)
"""


@pytest.mark.parametrize(
    ("how", "code", "output"),
    [
        ("a success", 0, "last words"),
        ("a failure", 1, "last words"),
        ("a hook that hangs", 0, "last words"),
        ("a hook that tidies", 0, "last wordstidied\n"),
        ("a run that raises", 1, "last words"),
    ],
)
def test_the_process_ends_at_once_with_the_code_of_its_run(how: str, code: int, output: str) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS, how], capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (code, output), done.stderr
    assert ("nobody expects it" in done.stderr) == (how == "a run that raises")
