"""Is there room for the next checkpoint? A run is put aside before one would fail, and what its last save left half
written is cleared, so that the space is there for whoever needs it.

What it takes to go on is twice what was needed, with the reserve: so no job comes back only to be put aside again.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sftd.protocol import CheckpointLine, EventLine, TrainerLine

LOOKS = 2  # in a row: files come and go while a checkpoint is published
_NAMED = re.compile(r"No space left on device: ['\"]([^'\"\n]+)['\"]")  # as Python prints it
UNKNOWN_BYTES = 64 * 1024 * 1024  # what is asked for where no size is known


@dataclass(frozen=True)
class Hold:
    """A job that is put aside for want of space: what its user is told, and how much must be free to go on."""

    message: str
    needs_disk_bytes: int


def free_bytes(path: Path) -> int | None:
    """Free space where a path lies, or will lie: of its nearest folder that is there. None where nothing tells."""
    for folder in (path, *path.parents):
        try:
            return shutil.disk_usage(folder).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def bytes_of_checkpoint(folder: Path) -> int:
    """The size of a checkpoint by its manifest; 0 where it has none that can be read."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return sum(int(file["bytes"]) for file in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0


def stage_bytes(folder: Path, attempt: int) -> int:
    """What an attempt has written of a checkpoint that is not whole yet."""
    total = 0
    for parent, _, names in os.walk(folder / "checkpoints" / f".stage-{attempt}"):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:  # published or given up just now
                continue
    return total


def clear_stages(folder: Path, attempt: int) -> None:
    """Remove what this attempt and earlier ones left half written. Only while no trainer of theirs runs."""
    for stage in [*folder.glob("checkpoints/.stage-*"), *folder.glob(".stage-results-*")]:
        number = stage.name.rsplit("-", 1)[1]
        if number.isascii() and number.isdigit() and int(number) <= attempt:  # a later attempt may be at work
            shutil.rmtree(stage, ignore_errors=True)


def is_full(error: OSError) -> bool:
    """Is it for want of space, or of quota?"""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What is written here is this file: an error of a write does not say so by itself."""
    try:
        yield
    except OSError as error:
        if is_full(error) and error.filename is None:
            error.filename = str(path)
        raise


def after_full(folder: Path, *, what: str, path: str | None, needed: int, reserve: int) -> Hold | str:
    """What is to become of a job that a write has failed for, for want of space.

    It is put aside where the file system is the one of its `folder`; the server looks for room there. Another one would
    be waited for in vain: then this is what to tell. `path`: what was written; None where nothing tells.
    """
    free = free_bytes(folder)
    if free is None or free <= needed + reserve:
        return hold_after_full(folder, what=what, needed=needed, reserve=reserve)
    if path is None:
        return (
            f"{what} {_mib(free)} are free in {folder}, so it is another file system: look with `df` at that of temporary "
            f"files ({tempfile.gettempdir()}) and at /dev/shm, and free some space there, or set TMPDIR for the worker."
        )
    if _device(Path(path)) == _device(folder):
        return hold_after_full(folder, what=what, needed=needed, reserve=reserve)
    return (
        f"{what} It is the file system of {path}, where {_mib(free_bytes(Path(path)) or 0)} are free, not that of "
        f"{folder}: free some space there; for temporary files, or set TMPDIR for the worker."
    )


def _device(path: Path) -> int | None:
    """Of the file system where a path lies, or would."""
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            return folder.stat().st_dev
    return None


def hold_after_full(folder: Path, *, what: str, needed: int, reserve: int) -> Hold:
    """A write has failed for want of space. More must be free than is now: with a quota the disk does not tell."""
    free = free_bytes(folder) or 0
    needs = max(2 * needed + reserve, free + (needed or UNKNOWN_BYTES))
    return Hold(f"{what} The job goes on by itself when {_mib(needs)} are free.", needs)


class DiskWatch:
    """Compares what is free with what the next checkpoint needs. `low` is set once, and stays."""

    def __init__(
        self,
        folder: Path,
        *,
        attempt: int,
        reserve: int,
        settle_seconds: float,
        resume_from: Path | None = None,
    ) -> None:
        self.needed = bytes_of_checkpoint(resume_from) if resume_from else 0  # 0: not known yet
        self.low: Hold | None = None
        self.free: int | None = None  # at the last look
        self.fits = False  # when it was found low: one more checkpoint had room
        self._folder = folder
        self._attempt = attempt
        self._reserve = reserve
        # Older checkpoints are removed when a new one has been recorded: until then both are there.
        self._settle_seconds = settle_seconds
        self._settles_until = float("-inf")
        self._low_since: float | None = None
        self._num_low = 0
        self._total_steps: int | None = None
        self._last_saved = False

    def heard(self, line: TrainerLine, now: float) -> None:
        """A line of the trainer has come by."""
        if isinstance(line, CheckpointLine):
            self.needed = sum(file.bytes for file in line.files.values()) or self.needed
            self._settles_until = now + self._settle_seconds
            self._last_saved = self._total_steps is not None and line.step >= self._total_steps
        elif isinstance(line, EventLine) and line.type == "run":
            total, expected = line.data.get("total_steps"), line.data.get("checkpoint_bytes")
            self._total_steps = total if isinstance(total, int) else None
            if not self.needed and isinstance(expected, int):
                self.needed = max(0, expected)

    def look(self, now: float) -> None:
        """Look once. Behind the last checkpoint there is no next one to make room for."""
        if self.low is not None or self._last_saved:
            return
        staged = stage_bytes(
            self._folder, self._attempt
        )  # before the free space: what is published between is both
        self.free = found = free_bytes(self._folder)
        if found is None or found + staged >= self.needed + self._reserve:
            self._low_since, self._num_low = None, 0
            return
        self._num_low += 1
        self._low_since = now if self._low_since is None else self._low_since
        if self._num_low < LOOKS:
            return
        if now < self._settles_until and now - self._low_since < self._settle_seconds:
            return
        self.fits = found + staged >= self.needed
        needs = 2 * self.needed + self._reserve
        then = "one more is saved" if self.fits else "there is no room for one"
        self.low = Hold(
            f"The disk is nearly full: {_mib(found)} are free in {self._folder}, the next checkpoint needs "
            f"{_mib(self.needed)} and {_mib(self._reserve)} are kept in reserve; {then}. The job goes on by itself when "
            f"{_mib(needs)} are free.",
            needs,
        )

    def after_full(self, what: str, path: str | None) -> Hold | str:
        """A write of this run has failed for want of space; as `after_full`."""
        return after_full(self._folder, what=what, path=path, needed=self.needed, reserve=self._reserve)


def speaks_of_full_disk(text: str) -> bool:
    """Do the last words of a process say that a disk was full, in the words of the system or of libraries?"""
    return any(words in text for words in ("No space left on device", "Disk quota exceeded", "os error 28"))


def full_path(text: str) -> str | None:
    """The file that those words name last, if they do."""
    found = _NAMED.findall(text)
    return found[-1] if found else None


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
