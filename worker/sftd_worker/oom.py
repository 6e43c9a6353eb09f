"""Was a trainer killed because memory ran out? The kernel counts such kills: for the cgroup (v2 and v1) and for the
machine. A count that rose in the seconds before the death tells it from a kill by hand.
"""

import signal
from dataclasses import dataclass
from pathlib import Path

from sftd_worker import family

SAMPLE_SECONDS = 5.0
_NO_LIMIT = 2**60  # cgroup v1 writes a number near 2**63 where there is none


@dataclass(frozen=True)
class Kills:
    """How often the kernel has killed for want of memory. None: it does not tell."""

    in_group: int | None
    on_machine: int | None


class MemoryWatch:
    """Samples the kernel's counts and the memory of a trainer while it lives."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0  # of one process of it, when last looked at
        self._pid = pid
        self._group = memory_group(pid)
        self._latest = self._before = self._kills()
        self._sampled_at = float("-inf")  # monotonic

    def look(self, now: float) -> None:
        """Call it every second or so."""
        self._note_peak(self._pid)
        if now - self._sampled_at < SAMPLE_SECONDS:
            return
        self._sampled_at = now
        for pid in family.descendants(self._pid):
            self._note_peak(pid)
        # Two samples back: the newest one may have been taken between the kill and its being noticed.
        self._before, self._latest = self._latest, self._kills()

    def verdict(self, returncode: int | None, *, has_ranks: bool) -> str | None:
        """What to tell of a trainer that died, if it was killed for want of memory; else None.

        With ranks, one is killed and its launcher ends with an exit code.
        """
        killed = returncode == -signal.SIGKILL or (has_ranks and returncode not in (0, None))
        if not killed:
            return None
        now = self._kills()
        if _rose(self._before.in_group, now.in_group):
            whose = "memory of the worker's cgroup" + _of(group_limit(self._group))
        elif _rose(self._before.on_machine, now.on_machine):
            whose = "machine's memory" + _of(_machine_bytes())
        else:
            return None
        held = f"; a process of it held {_gib(self.peak_bytes)} or more" if self.peak_bytes else ""
        return (
            f"The trainer was killed by the system: the {whose} ran out{held}. Lower max_seq_length, batch_size or "
            "max_tokens_per_step, turn on gradient_checkpointing, use lora or qlora, or give the worker more memory."
        )

    def _kills(self) -> Kills:
        return Kills(group_kills(self._group), _counter(Path("/proc/vmstat"), "oom_kill"))

    def _note_peak(self, pid: int) -> None:
        try:
            status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        except OSError:  # gone
            return
        line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            self.peak_bytes = max(self.peak_bytes, int(line.split()[1]) * 1024)


def memory_group(pid: int) -> Path | None:
    """The folder of the memory cgroup that a process is in, as it is mounted here; None where there is none."""
    try:
        groups = [
            line.split(":", 2)
            for line in Path(f"/proc/{pid}/cgroup").read_text(errors="replace").splitlines()
        ]
        mounts = [
            line.split(" - ")
            for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
        ]
    except OSError:
        return None
    v1 = next((path for _, names, path in groups if "memory" in names.split(",")), None)
    v2 = next((path for number, names, path in groups if number == "0" and not names), None)
    for wanted, path in (("cgroup", v1), ("cgroup2", v2)):
        if path is None:
            continue
        for left, right in mounts:
            kind, _, options = right.split(" ", 2)
            if kind != wanted or (kind == "cgroup" and "memory" not in options.split(",")):
                continue
            root, mounted_at = left.split(" ")[3:5]
            # In a container the mount may begin at its own group, or show no more than that.
            inside = path.removeprefix(root) if root != "/" else path
            for folder in (Path(mounted_at + "/" + inside.strip("/")), Path(mounted_at)):
                if group_kills(folder) is not None:
                    return folder
    return None


def group_kills(group: Path | None) -> int | None:
    """Processes of a cgroup that were killed for want of memory."""
    if group is None:
        return None
    found = _counter(group / "memory.events", "oom_kill")
    return _counter(group / "memory.oom_control", "oom_kill") if found is None else found


def group_limit(group: Path | None) -> int | None:
    """The most bytes that a cgroup may hold; None where there is no limit."""
    for name in ("memory.max", "memory.limit_in_bytes") if group is not None else ():
        assert group is not None
        try:
            limit = int((group / name).read_text(errors="replace"))  # "max" where there is none
        except (OSError, ValueError):
            continue
        return limit if limit < _NO_LIMIT else None
    return None


def _counter(path: Path, name: str) -> int | None:
    """The number behind a name in a file of such lines."""
    try:
        pairs = dict(
            line.split(maxsplit=1) for line in path.read_text(errors="replace").splitlines() if " " in line
        )
        return int(pairs[name])
    except (OSError, ValueError, KeyError):
        return None


def _machine_bytes() -> int | None:
    try:
        lines = dict(
            line.split(":", 1) for line in Path("/proc/meminfo").read_text(errors="replace").splitlines()
        )
        return int(lines["MemTotal"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


def _rose(before: int | None, now: int | None) -> bool:
    return before is not None and now is not None and now > before


def _of(limit: int | None) -> str:
    return f" ({_gib(limit)})" if limit else ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
