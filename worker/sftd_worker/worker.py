"""What the main thread of a worker and its attempts share: bells that wake them, how far the worker is to stop, and the
devices that it may use.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sftd._transport import Transport
from sftd_worker.gpus import Devices, Gpu
from sftd_worker.settings import WorkerSettings
from sftd_worker.warm import WarmParent

log = logging.getLogger("sftd.worker")


class Bell:
    """Wakes the thread that waits at it. Ringing is safe from any thread and from a signal handler; an Event's set() is
    not.

    The main thread waits at its own again and again, whatever it does: so this is where it shows that it lives.
    """

    def __init__(self) -> None:
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.alive_file: Path | None = None  # the main thread's alone, once the worker is registered

    def ring(self) -> None:
        self._rings.put(None)

    def wait(self, seconds: float) -> None:
        """Wait for a ring, at most so long. Rings that came before count."""
        self._show_life()
        try:
            self._rings.get(timeout=max(0.0, seconds))
            while True:
                self._rings.get_nowait()
        except queue.Empty:
            return

    def _show_life(self) -> None:
        """Touch the file that health checks look at."""
        if self.alive_file is not None:
            with contextlib.suppress(OSError):  # an unhealthy mark is no reason to end a job
                self.alive_file.touch()


class Stops:
    """How the worker was told to stop. From the first time on it takes no job.

    Without a time to drain, the first time means: save and give back; the second: hurry. With one, jobs may first go on
    for that long; the second time cuts it short, the third hurries.
    """

    def __init__(self, drain_seconds: float = 0) -> None:
        self.count = 0
        self._drain_seconds = drain_seconds
        self._save_at: float | None = None  # monotonic

    def add(self) -> None:
        """Told once more. Called by a signal handler, in the main thread."""
        now = time.monotonic()
        if self._save_at is None:
            self._save_at = now + self._drain_seconds
        else:
            self._save_at = min(self._save_at, now)
        self.count += 1

    def save_now(self) -> None:
        """The worker cannot go on: its jobs are saved and given back, without a time to drain."""
        self._save_at = 0.0

    @property
    def asked(self) -> bool:
        """No new jobs."""
        return self.count > 0

    @property
    def saves(self) -> bool:
        """Running jobs are saved and given back now."""
        return self._save_at is not None and time.monotonic() >= self._save_at

    @property
    def hurries(self) -> bool:
        """There is no time to save."""
        return self.count > (2 if self._drain_seconds else 1)


@dataclass
class Worker:
    """What all attempts of this process share."""

    settings: WorkerSettings
    devices: Devices  # those it may use now: a lost GPU is not among them
    transport: Transport
    boot_id: str
    bell: Bell = field(default_factory=Bell)  # the main thread's
    stops: Stops = field(default_factory=Stops)
    warm: WarmParent | None = None
    threads: int | None = None  # of one trainer on CPU; None: as many as torch likes
    refused_means_down: bool = True  # what the server said of that (docs/decisions/0007)
    is_changed: bool = False  # the server does not know yet which devices there are
    lost_gpus: tuple[Gpu, ...] = ()
    attempt_bells: tuple[Bell, ...] = ()  # replaced as a whole: a signal handler reads it

    def __post_init__(self) -> None:
        self.files_lock = threading.Lock()  # held while files go that no attempt uses, and while one begins
        self._all_gpus = self.devices.gpus
        self._lock = threading.Lock()

    def ring_all(self) -> None:
        """Wake the main thread and every attempt."""
        for bell in (self.bell, *self.attempt_bells):
            bell.ring()

    def lose(self, gpus: Sequence[Gpu]) -> None:
        """Use these GPUs no more, until they are back. Safe to call twice."""
        with self._lock:
            gone = tuple(gpu for gpu in self._all_gpus if gpu in gpus and gpu not in self.lost_gpus)
            if not gone:
                return
            self._set_lost((*self.lost_gpus, *gone))
        for gpu in gone:
            log.error("GPU %s (%s) is lost: %s", gpu.uuid, gpu.name, _left(self.devices.num_slots))
        self.bell.ring()

    def regain(self, gpus: Sequence[Gpu]) -> None:
        """Use these GPUs again."""
        with self._lock:
            back = tuple(gpu for gpu in self.lost_gpus if gpu in gpus)
            if not back:
                return
            self._set_lost(tuple(gpu for gpu in self.lost_gpus if gpu not in back))
        for gpu in back:
            log.warning("GPU %s (%s) is back: %s", gpu.uuid, gpu.name, _left(self.devices.num_slots))
        self.bell.ring()

    def _set_lost(self, lost: tuple[Gpu, ...]) -> None:
        self.lost_gpus = lost
        self.devices = self.devices.with_gpus(tuple(gpu for gpu in self._all_gpus if gpu not in lost))
        self.is_changed = True


def _left(num_gpus: int) -> str:
    if num_gpus:
        return f"{num_gpus} GPU(s) are used now"
    return "no GPU is left, so no job is taken; look at `nvidia-smi` and `dmesg`, most often the machine must restart"
