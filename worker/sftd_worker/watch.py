"""Watches over a running trainer: that it gets on, that its next checkpoint will find room, and what it died of.

A trainer gets on when its pulse or its lines move (`trainer/pulse.py`). One that does not for far longer than a step
takes has stalled: where it hangs is asked, and it is killed. What is said of the attempt then is `verdict`.
"""

import contextlib
import math
import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sftd.protocol import (
    MAX_LINE_CHARS,
    TRAINER_PULSE_FILE,
    TRAINER_STACKS_FILE,
    EndLine,
    LogTextLine,
    StepLine,
    TrainerJob,
    TrainerLine,
)
from sftd.schemas import FailureReason
from sftd_worker import family, stacks
from sftd_worker.disk import DiskWatch, Hold, clear_stages, full_path, speaks_of_full_disk
from sftd_worker.oom import MemoryWatch
from sftd_worker.process import Order
from sftd_worker.settings import WorkerSettings
from sftd_worker.spool import Spool

LOOK_SECONDS = 0.1  # no more often: the attempt wakes for other things too
MOST_COUNTED_SECONDS = 2.0  # between two looks; longer, and this process itself did not run
RECENT_STEPS = 20
MOVED_BYTES = (
    16 * 1024 * 1024
)  # to or from disks: a long library call that reads or writes a model is no stall


@dataclass(frozen=True)
class Failed:
    """An attempt that failed, and why."""

    reason: FailureReason
    message: str


class Quiet:
    """How long a trainer has shown no life, not counting time in which this process did not run itself."""

    def __init__(self, *, seconds: float, start_seconds: float, factor: float, now: float) -> None:
        self.seconds = 0.0
        self.step: int | None = None  # the newest, once there was one
        self._seconds = seconds
        self._start_seconds = start_seconds
        self._factor = factor
        self._looked_at = now
        self._last: tuple[int, float] | None = None  # step, and its time by the trainer's clock
        self._took: deque[float] = deque(maxlen=RECENT_STEPS)

    @property
    def allowed(self) -> float:
        """For how long it may be quiet now: the longer of the setting and so many usual steps; inf where it is off."""
        most = self._start_seconds if self.step is None else self._seconds
        if most <= 0:
            return math.inf
        usual = statistics.median(self._took) if self._took else 0.0
        return max(most, self._factor * usual)

    def heard(self, line: StepLine) -> None:
        """A step is done: how long do steps take?"""
        seconds = line.values.get("seconds", math.nan)
        if self._last is not None and line.step > self._last[0] and not math.isfinite(seconds):
            seconds = (line.at - self._last[1]) / (line.step - self._last[0])
        if math.isfinite(seconds) and seconds > 0:
            self._took.append(seconds)
        self._last = line.step, line.at
        self.step = line.step if self.step is None else max(self.step, line.step)

    def look(self, now: float, *, moved: bool) -> None:
        """Note whether there was a sign of life since the last look."""
        gap, self._looked_at = now - self._looked_at, now
        self.seconds = 0.0 if moved else self.seconds + min(gap, MOST_COUNTED_SECONDS)

    def forgive(self) -> None:
        """It gets on after all."""
        self.seconds = 0.0


class Watched(Protocol):
    """What is asked of a trainer."""

    order: Order
    returncode: int | None

    @property
    def pid(self) -> int: ...
    @property
    def running(self) -> bool: ...
    def output_tail(self, num_lines: int) -> list[str]: ...


class Watch:
    """Of one attempt. Call `look` about once a second while the trainer runs, `leave_word` when it is gone."""

    def __init__(self, trainer: Watched, spool: Spool, *, job: TrainerJob, settings: WorkerSettings) -> None:
        now = time.monotonic()
        self._trainer = trainer
        self._spool = spool
        self._folder = Path(job.output_dir)
        self._attempt = job.attempt
        self._has_ranks = job.spec.gpus > 1
        self._quiet = Quiet(
            seconds=settings.stall_seconds,
            start_seconds=settings.start_stall_seconds,
            factor=settings.stall_factor,
            now=now,
        )
        self._disk = DiskWatch(
            self._folder,
            attempt=job.attempt,
            reserve=settings.disk_reserve_bytes,
            settle_seconds=settings.disk_settle_seconds,
            resume_from=Path(job.resume_from) if job.resume_from else None,
        )
        self._memory = MemoryWatch(trainer.pid)
        self._looked_at = now
        self._read_upto = spool.start
        self._signs: Any = self._signs_of_life()  # compared as a whole
        self._moved_bytes: int | None = None  # when half of the patience was over
        self._has_ended = False
        self._stalled: Failed | None = None
        self._stacks: list[str] = []

    @property
    def disk_free_bytes(self) -> int | None:
        """Where checkpoints are written, at the last look."""
        return self._disk.free

    def look(self, *, may_save: bool) -> Order:
        """What the trainer is to do, as far as it goes by itself. `may_save`: it has begun, and can save."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_SECONDS and self._trainer.running and not self._has_ended:
            self._looked_at = now
            self._read_lines(now)
            self._memory.look(now)
            self._disk.look(now)
            self._look_for_life(now)
        if self._stalled is not None:
            return Order.KILL
        if self._disk.low is not None:
            return Order.SAVE_AND_STOP if may_save and self._disk.fits else Order.STOP
        return Order.RUN

    def leave_word(self) -> None:
        """The trainer is gone: clear what it left half written, and write down where it hung."""
        if self._trainer.running:  # it hangs in the kernel, and may still write
            return
        self._read_lines(time.monotonic())
        clear_stages(self._folder, self._attempt)
        if self._stalled is not None:
            now = time.time()
            lines = [self._stalled.message, "Where it hung:", *self._stacks]
            told = [LogTextLine(attempt=self._attempt, at=now, text=line[:MAX_LINE_CHARS]) for line in lines]
            with contextlib.suppress(OSError):  # a full disk: the last call tells the most of it
                self._spool.append_behind(told)

    def verdict(self, end: EndLine | None) -> Failed | Hold | None:
        """How the attempt is to end, where this watch knows better than the trainer's last word; else None."""
        stopped_by_us = self._disk.low is not None and (end is None or end.outcome == "stopped")
        if end is not None and end.outcome == "failed" and end.reason is FailureReason.DISK_FULL:
            return self._after_full(f"{end.message or 'The disk is full'}.", end.full_path)
        if end is None and self._stalled is not None:
            return self._stalled
        if stopped_by_us:
            return self._disk.low
        # The other ranks see nothing but a connection that breaks when one is killed.
        unsure = end is None or (self._has_ranks and end.reason is FailureReason.TRAINER_ERROR)
        if not unsure or self._trainer.order is not Order.RUN:
            return None
        out_of_memory = self._memory.verdict(self._trainer.returncode, has_ranks=self._has_ranks)
        if out_of_memory is not None:
            return Failed(FailureReason.OUT_OF_MEMORY, out_of_memory)
        said = "" if end is not None else "\n".join(self._trainer.output_tail(40))
        if speaks_of_full_disk(said):
            return self._after_full("The trainer ended for want of disk space.", full_path(said))
        return None

    def _after_full(self, what: str, path: str | None) -> Failed | Hold:
        found = self._disk.after_full(what, path)
        return Failed(FailureReason.DISK_FULL, found) if isinstance(found, str) else found

    def _read_lines(self, now: float) -> None:
        for found in self._spool.lines(self._read_upto):
            self._read_upto = found.end
            self._heard(found.line, now)

    def _heard(self, line: TrainerLine, now: float) -> None:
        self._disk.heard(line, now)
        if isinstance(line, StepLine):
            self._quiet.heard(line)
        elif isinstance(line, EndLine):
            self._has_ended = True

    def _look_for_life(self, now: float) -> None:
        signs = self._signs_of_life()
        moved, self._signs = signs != self._signs, signs
        self._quiet.look(now, moved=moved)
        if moved:
            self._moved_bytes = None
        if self._trainer.order is not Order.RUN:  # it has been told to stop: that has a deadline of its own
            return
        quiet, allowed = self._quiet.seconds, self._quiet.allowed
        if quiet >= allowed / 2 and self._moved_bytes is None and math.isfinite(allowed):
            self._moved_bytes = self._bytes_moved()
        if quiet >= allowed and self._stalled is None:
            if self._bytes_moved() - (self._moved_bytes or 0) >= MOVED_BYTES:
                self._moved_bytes = None
                self._quiet.forgive()
            else:
                self._stall(quiet)

    def _stall(self, quiet: float) -> None:
        at = "before its first step" if self._quiet.step is None else f"after step {self._quiet.step}"
        self._stalled = Failed(
            FailureReason.STALLED,
            f"The trainer showed no life for {quiet:,.0f} s {at} and was killed; the log says where it hung.",
        )
        self._stacks = stacks.collect(self._trainer.pid, self._folder / TRAINER_STACKS_FILE)

    def _signs_of_life(self) -> tuple[int, int]:
        """What moves while a trainer gets on. Compared with what it was, never with a clock."""
        try:
            pulse = (self._folder / TRAINER_PULSE_FILE).stat().st_mtime_ns
        except OSError:  # none yet
            pulse = 0
        return pulse, self._spool.size()

    def _bytes_moved(self) -> int:
        """Bytes that all its processes have read from disks or written to them."""
        total = 0
        for pid in (self._trainer.pid, *family.descendants(self._trainer.pid)):
            with contextlib.suppress(OSError, ValueError):
                text = Path(f"/proc/{pid}/io").read_text(errors="replace")
                counts = dict(line.split(": ") for line in text.splitlines())
                total += int(counts.get("read_bytes", 0)) + int(counts.get("write_bytes", 0))
        return total
