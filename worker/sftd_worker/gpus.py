"""What this machine can train on: GPUs by nvidia-smi, or CPU slots. No torch: it is slow to import and holds memory.

A trainer holds one lock per device under `<data>/locks` for as long as any of its processes lives, so that no two
trainings ever share a GPU, however late the first one dies.
"""

import csv
import fcntl
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sftd_worker import family

NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=index,uuid,memory.total,name,pci.bus_id",
    "--format=csv,noheader,nounits",
)
SMI_SECONDS = 30.0
SPARE_CPU_LOCKS = 64  # several workers may share a machine's CPU; each takes free slots


class NoDevice(Exception):
    """The device that was asked for is not there."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver names it."""

    index: int
    uuid: str
    memory_mib: int
    name: str
    bus_id: str = field(default="", compare=False)  # PCI address; "" where it is not told


@dataclass(frozen=True)
class Devices:
    """What a worker may use."""

    kind: Literal["cuda", "cpu"]
    gpus: tuple[Gpu, ...]
    num_slots: int

    def lock_names(self) -> list[str]:
        """Locks of which a trainer takes one per device, in order of preference."""
        if self.kind == "cuda":
            return [f"gpu-{gpu.uuid}.lock" for gpu in self.gpus]
        return [f"cpu-{slot}.lock" for slot in range(self.num_slots + SPARE_CPU_LOCKS)]

    def with_gpus(self, gpus: tuple[Gpu, ...]) -> "Devices":
        """The same worker with other GPUs."""
        return Devices(self.kind, gpus, len(gpus))

    def behind(self, lock_names: Sequence[str]) -> tuple[Gpu, ...]:
        """The GPUs whose locks these are."""
        return tuple(gpu for gpu in self.gpus if f"gpu-{gpu.uuid}.lock" in lock_names)

    @property
    def gpu_memory_gb(self) -> float | None:
        """Memory of the smallest GPU in GiB; None where it is not known."""
        smallest = min((gpu.memory_mib for gpu in self.gpus), default=0)
        return round(smallest / 1024, 3) if smallest else None

    def visible(self, lock_names: list[str]) -> str:
        """CUDA_VISIBLE_DEVICES for the devices behind these locks; empty hides all GPUs."""
        return ",".join(gpu.uuid for gpu in self.behind(lock_names))


def find_devices(*, device: str, num_wanted: int | None, environment: Mapping[str, str]) -> Devices:
    """The devices this worker may use: `device` is auto, cuda or cpu; `num_wanted` bounds or, on CPU, sets them."""
    gpus = () if device == "cpu" else visible_gpus(list_gpus(), environment.get("CUDA_VISIBLE_DEVICES"))
    if device == "cuda" and not gpus:
        raise NoDevice("device is cuda, but no GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES.")
    if not gpus:
        return Devices("cpu", (), num_wanted or 1)
    if num_wanted and num_wanted > len(gpus):
        raise NoDevice(f"{num_wanted} GPUs are asked for, but only {len(gpus)} are visible; lower SFTD_GPUS.")
    gpus = gpus[: num_wanted or len(gpus)]
    return Devices("cuda", gpus, len(gpus))


def list_gpus() -> tuple[Gpu, ...]:
    """All GPUs of the machine, or none where there is no driver."""
    return _look().gpus


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """The rows that nvidia-smi prints. Memory is unknown (0) where the driver does not tell. A GPU of whose fields one
    says that it is lost is left out."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if len(row) >= 4]
    return tuple(
        Gpu(int(index), uuid, int(memory) if memory.isdigit() else 0, name, *more[:1])
        for index, uuid, memory, name, *more in rows
        if index.isdigit() and not _LOST.search(" ".join([uuid, memory, name, *more]))
    )


def find_lost(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Those of these GPUs that the driver does not list any more, or says to have lost.

    None of them where nvidia-smi does not answer, or fails for another reason: that says nothing about a GPU.
    """
    sight = _look()
    complains = _LOST.search(sight.text) is not None
    if not gpus or not (sight.ok or complains):
        return ()
    unlisted = tuple(gpu for gpu in gpus if gpu.uuid not in {found.uuid for found in sight.gpus})
    # It may give up at the lost one, and not list the healthy ones behind it: then its complaint tells which.
    named = {
        _bus(found) for line in sight.text.splitlines() if _LOST.search(line) for found in _BUS.findall(line)
    }
    if complains and named and all(gpu.bus_id for gpu in unlisted):
        return tuple(gpu for gpu in unlisted if _bus(gpu.bus_id) in named)
    return unlisted


@dataclass(frozen=True)
class _Sight:
    """What nvidia-smi showed."""

    ok: bool
    gpus: tuple[Gpu, ...] = ()
    text: str = ""


_LOST = re.compile(r"is lost|fallen off the bus|unable to determine the device handle", re.IGNORECASE)
_BUS = re.compile(r"\b[0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9]\b")


def _look() -> _Sight:
    try:
        done = family.run(NVIDIA_SMI, timeout_seconds=SMI_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return _Sight(ok=False)
    return _Sight(done.returncode == 0, parse_gpus(done.stdout), done.stdout)


def _bus(bus_id: str) -> str:
    """A PCI address in one form: nvidia-smi writes its first part with four digits or with eight."""
    domain, _, rest = bus_id.partition(":")
    return f"{int(domain, 16):x}:{rest.lower()}"


def visible_gpus(gpus: tuple[Gpu, ...], visible: str | None) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES lets through, in its order. As CUDA does, stop at the first unknown entry."""
    if visible is None:
        return gpus
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in visible.split(",")):
        found = [gpu for gpu in gpus if entry and (str(gpu.index) == entry or gpu.uuid.startswith(entry))]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen.append(found[0])
    return tuple(chosen)


class Locks:
    """Locks held together: all of them, or none. The trainer inherits them and holds them until it is gone."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.fds: list[int] = []

    def take(self, folder: Path, candidates: list[str], count: int) -> bool:
        """Take `count` of the candidates that are free. False, and none of them, if there are too few."""
        folder.mkdir(parents=True, exist_ok=True)
        names: list[str] = []
        fds: list[int] = []
        for name in candidates:
            if len(fds) == count:
                break
            fd = _locked(folder / name)
            if fd is not None:
                names.append(name)
                fds.append(fd)
        if len(fds) < count:
            _close(fds)
            return False
        self.names += names
        self.fds += fds
        return True

    def let_go(self) -> None:
        """Close this process's copies. Whoever inherited them holds the locks on."""
        _close(self.fds)
        self.names, self.fds = [], []


def _locked(path: Path) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def share_of_cores(num_slots: int) -> int | None:
    """Threads of a trainer that shares this machine's CPU with others; None where it has all of it to itself.

    Cores count, not their hyperthreads: that is what torch goes by too.
    """
    if num_slots == 1:
        return None
    cores = {_siblings(cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, len(cores) // num_slots)


def _siblings(cpu: int) -> str:
    """The CPUs that are one core together with this one."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)
