"""Disks that are really full."""

import os
from pathlib import Path

MIB = 1024**2


def fill(disk: Path, *, leaving: int = 0) -> Path:
    """Take what is free now, but for so many bytes; what is freed while this goes on stays free. Returns the filler."""
    filler = disk / "filler"
    free = os.statvfs(disk)
    left = free.f_bavail * free.f_frsize - leaving
    with filler.open("ab", buffering=0) as file:
        while left > 0:
            asked = min(left, MIB)
            try:
                written = file.write(b"\0" * asked)
            except OSError:  # somebody else was faster
                break
            left -= written
            if written < asked:
                break
    return filler
