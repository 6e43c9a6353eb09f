"""What this machine can train on: GPUs by nvidia-smi, or CPU slots. No torch: it is slow to import and holds memory.

A trainer holds one lock per device under `<data>/locks` for as long as any of its processes lives, so that no two
trainings ever share a GPU, however late the first one dies.
"""

import csv
import fcntl
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,uuid,memory.total,name", "--format=csv,noheader,nounits")
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

    def visible(self, lock_names: list[str]) -> str:
        """CUDA_VISIBLE_DEVICES for the devices behind these locks; empty hides all GPUs."""
        return ",".join(gpu.uuid for gpu in self.gpus if f"gpu-{gpu.uuid}.lock" in lock_names)


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
    try:
        done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """The rows that nvidia-smi prints. Memory is unknown (0) where the driver does not tell."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if len(row) >= 4]
    return tuple(
        Gpu(int(index), uuid, int(memory) if memory.isdigit() else 0, name)
        for index, uuid, memory, name, *_ in rows
        if index.isdigit()
    )


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
