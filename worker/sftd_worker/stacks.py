"""Where a trainer hangs: the stacks of all its processes, as far as they answer, and what the kernel says of the rest.

A trainer writes its Python stacks to a file on SIGUSR2 (`trainer/signals.py`), without help of the interpreter. What
hangs in the kernel or is stopped does not answer; /proc tells its state and what it waits in.
"""

import signal
import time
from pathlib import Path

from sftd_worker import family

MAX_PROCESSES = 64
MAX_THREADS = 32
MAX_LINES = 1000  # of one process
ANSWER_SECONDS = 2.0
ALL_SECONDS = 8.0
_POLL_SECONDS = 0.02
_QUIET_SECONDS = 0.1  # then an answer is taken to be whole


def collect(pid: int, stacks_file: Path) -> list[str]:
    """Lines for the log on a trainer and all that descends from it. Takes some seconds at most, whatever hangs."""
    deadline = time.monotonic() + ALL_SECONDS
    lines: list[str] = []
    for one in [pid, *family.descendants(pid)][:MAX_PROCESSES]:
        lines += _states(one)
        if family.handles(one, signal.SIGUSR2):
            answer = _ask(one, stacks_file, min(ANSWER_SECONDS, deadline - time.monotonic()))
            lines += answer or ["  It does not answer: it is stopped, or hangs in the kernel."]
    return lines


def _ask(pid: int, stacks_file: Path, seconds: float) -> list[str]:
    """The stacks of one process, one at a time: all write to one file."""
    if seconds <= 0:
        return []
    start = size = _size(stacks_file)
    family.send(pid, signal.SIGUSR2)
    asked_at = grown_at = time.monotonic()
    while time.monotonic() - asked_at < seconds:
        time.sleep(_POLL_SECONDS)  # another process's file: there is nothing to wait on
        now = _size(stacks_file)
        if now != size:
            size, grown_at = now, time.monotonic()
        elif size > start and time.monotonic() - grown_at > _QUIET_SECONDS:
            break
    try:
        with stacks_file.open("rb") as file:
            file.seek(start)
            text = file.read(size - start).decode("utf-8", errors="replace")
    except OSError:
        return []
    return [f"  {line}" for line in text.splitlines() if line.strip()][:MAX_LINES]


def _states(pid: int) -> list[str]:
    """A process and its threads as the kernel sees them. Threads in the same state stand on one line."""
    folder = Path(f"/proc/{pid}")
    command = _read(folder / "cmdline").replace("\0", " ").strip() or _read(folder / "comm")
    if not command:
        return []  # gone
    alike: dict[str, list[str]] = {}
    threads = sorted((folder / "task").iterdir(), key=lambda path: int(path.name)) if folder.exists() else []
    for thread in threads[:MAX_THREADS]:
        state = next(
            (
                line.split(":", 1)[1].strip()
                for line in _read(thread / "status").splitlines()
                if line.startswith("State")
            ),
            "gone",
        )
        where = _read(thread / "wchan")
        name = _read(thread / "comm")
        waits = f", in {where}" if where not in ("", "0") else ""
        alike.setdefault(f"{name}: {state}{waits}", []).append(thread.name)
    lines = [f"process {pid} ({command[:200]}), {len(threads)} threads"]
    lines += [
        f"  thread {', '.join(numbers[:4])}{' …' * (len(numbers) > 4)} {what}"
        for what, numbers in alike.items()
    ]
    return lines


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
