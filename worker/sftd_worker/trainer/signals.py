"""What the outside may ask of a run: stop, or save and stop. Both are obeyed between two steps.

SIGTERM stops without saving (a cancel). SIGUSR1 saves a checkpoint first (a pause, a worker that is being stopped).
Installed before torch is imported, so that an early signal is not fatal. SIGUSR2 writes the stacks of all threads, at
once and from wherever they hang.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
from pathlib import Path
from types import FrameType

OBEYED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Signals:
    """Flags that signal handlers raise and the loop reads."""

    def __init__(self) -> None:
        self.stop = False
        self.save_and_stop = False

    def install(self, *, interrupt_saves: bool = False) -> "Signals":
        """Take over SIGTERM, SIGUSR1 and SIGINT (Ctrl-C): it stops, or saves first; a second one ends at once."""
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_interrupt_saving if interrupt_saves else self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_save_and_stop)
        return self

    def _on_stop(self, _: int, __: FrameType | None) -> None:
        self.stop = True

    def _on_interrupt_saving(self, _: int, __: FrameType | None) -> None:
        if self.save_and_stop:
            os._exit(130)
        self.save_and_stop = True

    def _on_save_and_stop(self, _: int, __: FrameType | None) -> None:
        self.save_and_stop = True


def show_stacks_on_signal(path: Path) -> None:
    """Let SIGUSR2 append the Python stacks of all threads to a file. It needs no help of the interpreter."""
    with contextlib.suppress(OSError, ValueError):  # a run without this is still a run
        path.parent.mkdir(parents=True, exist_ok=True)
        faulthandler.register(signal.SIGUSR2, file=path.open("a"), all_threads=True)  # which keeps it open


def die_with_parent() -> None:
    """Be killed when the parent dies, however it dies: no training goes on unseen. Linux only; survives exec."""
    die_with(os.getppid())


def die_with(parent: int) -> None:
    """The same, where the parent is known: be killed at once if it is another by now."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call took effect
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Keep what this process's children leave behind below it, so that the agent can tell it from other trainers'."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
