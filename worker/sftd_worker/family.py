"""A process and all that descend from it, by /proc. torchrun gives each rank a session of its own, so that signals to
one process group reach the launcher only; and what outlives its parent would otherwise be nobody's. Linux only.
"""

import ctypes
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path

# What this process has started and that lives, by process id. Something that hangs in the kernel may die when other
# things run already: what it left behind is all below this process but these. The lock keeps a process from being
# neither known nor yet started.
living: set[int] = set()
births_and_deaths = threading.RLock()

BURY_SECONDS = 5.0
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Descendants of this process whose parent dies become its children, not init's: so they can be found."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run(argv: Sequence[str], *, timeout_seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a short command and read what it says, both streams together. Raises OSError or subprocess.TimeoutExpired.

    For commands that may run while trainers do: what this process starts and does not know is taken for an orphan.
    """
    with births_and_deaths:
        process = subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        living.add(process.pid)
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except BaseException:
        process.kill()
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()
        with births_and_deaths:  # one that hangs in the kernel is an orphan from here on
            process.poll()
            living.discard(process.pid)
    return subprocess.CompletedProcess(process.args, process.returncode, output, "")


def descendants(pid: int, *, besides: Collection[int] = ()) -> list[int]:
    """All processes below `pid`, parents before children, without `besides` and all below those.

    What comes and goes meanwhile may be missed.
    """
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = [child for child in children.get(waiting.pop(0), []) if child not in besides]
        found += below
        waiting += below
    return found


def handles(pid: int, number: signal.Signals) -> bool:
    """Has the process a handler of its own for this signal? Without one, SIGUSR1 would end it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return False
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone already."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def end_orphans() -> None:
    """Kill and bury what dead children left to this process: all that descends from it but what is `living` and what
    descends from that. One that hangs in the kernel is not waited for.

    What a trainer that lives has left to itself stays below it: each is its own descendants' next of kin."""
    left = descendants(os.getpid(), besides=living)
    for pid in left:
        send(pid, signal.SIGKILL)
    deadline = time.monotonic() + BURY_SECONDS
    for pid in left:
        _bury(pid, deadline - time.monotonic())


def _bury(pid: int, seconds: float) -> None:
    try:
        handle = os.pidfd_open(pid)
    except OSError:  # gone, and buried by its own parent
        return
    try:
        select.select([handle], [], [], max(0.0, seconds))
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return
    finally:
        os.close(handle)


def _parent(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError, ValueError):
        return None
