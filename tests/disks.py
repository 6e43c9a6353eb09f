"""Disks that are really full."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 1024**2


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A disk of its own, mounted at `folder`; skips the test where that may not be."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "sftd-test", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, *, leaving: int = 0) -> Path:
    """Take what is free now, but for so many bytes; what is freed while this goes on stays free. Returns the filler."""
    filler = disk / "filler"
    left = shutil.disk_usage(disk).free - leaving
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
