"""The trainer as a process: how it is started, how it is told to stop, and that nothing of it is left.

It runs in a session of its own, dies with the agent, sees an environment made from an allow-list, and holds the locks
of its devices and its folder for as long as any of its processes lives. What it writes is the shipper's business.
"""

import enum
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from sftd.tether import tethered
from sftd_worker import family
from sftd_worker.disk import naming
from sftd_worker.warm import CannotFork, WarmParent

log = logging.getLogger("sftd.worker")

OUTPUT_FILE = "logs/trainer_output.txt"

# fmt: off
_ALLOWED = {
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV",
    "HUGGING_FACE_HUB_TOKEN", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "REQUESTS_CA_BUNDLE", "XDG_CACHE_HOME",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
}
_ALLOWED_PREFIXES = (
    "LC_", "HF_", "TRANSFORMERS_", "WANDB_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "MKL_", "ONEDNN_", "TORCH_",
    "PYTORCH_", "SSL_CERT_",
)
# fmt: on
_SECRET_ENDINGS = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")
HUB_SECRETS = ("HF_", "HUGGING_FACE_")  # for models of the hub that are not open to all
WANDB_SECRETS = ("WANDB_",)
KILL_WAIT_SECONDS = 20.0
MIN_SECRET_CHARS = 8  # shorter values would blot out ordinary words


class Order(enum.IntEnum):
    """What the trainer is to do. It only ever gets more severe."""

    RUN = 0
    SAVE_AND_STOP = 1  # a checkpoint at the next step boundary, then the end
    STOP = 2  # the end at the next step boundary
    KILL = 3


class Started(Protocol):
    """A child of this process, however it came about."""

    @property
    def pid(self) -> int: ...

    def wait(self) -> int:
        """Wait for its end and bury it. Its exit code, or the negative number of the signal that killed it."""
        ...


class Trainer:
    """A running trainer. It dies with the thread that spawns it, or with the agent where it is forked.

    It is forked off `warm`, or started as `argv`: where there is no warm parent, where it fails, or if `cold` says so.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        folder: Path,
        attempt: int,
        environment: Mapping[str, str],
        lock_fds: Sequence[int],
        save_grace_seconds: float,
        stop_grace_seconds: float,
        on_exit: Callable[[], None],
        on_started: Callable[["Trainer"], None] = lambda trainer: None,
        warm: WarmParent | None = None,
        cold: bool = False,
    ) -> None:
        self._graces = {
            Order.SAVE_AND_STOP: save_grace_seconds,
            Order.STOP: stop_grace_seconds,
            Order.KILL: KILL_WAIT_SECONDS,
        }
        self._on_exit = on_exit
        self._process: Started | None = None
        self.order = Order.RUN
        self.deadline: float | None = None  # monotonic; when patience with the order ends
        self.returncode: int | None = None
        # Of orders, and of its burial: none goes to whoever has its number next.
        self._lock = threading.Lock()
        self._output = folder / OUTPUT_FILE
        self._watch = threading.Thread(target=self._await_exit, name="trainer-exit", daemon=True)
        try:
            self._start(argv, attempt, environment, lock_fds, on_started, warm=None if cold else warm)
            self._watch.start()
        except BaseException:
            # No thread is to be had, or its output cannot be closed: nobody would hear of its end.
            if self._process is not None:
                family.send(self.pid, signal.SIGKILL)
                self._await_exit()
            raise

    def _start(
        self,
        argv: Sequence[str],
        attempt: int,
        environment: Mapping[str, str],
        lock_fds: Sequence[int],
        on_started: Callable[["Trainer"], None],
        *,
        warm: WarmParent | None,
    ) -> None:
        folder = self._output.parent.parent
        with naming(self._output), self._output.open("ab") as output:
            output.write(f"--- attempt {attempt}, {time.strftime('%Y-%m-%d %H:%M:%S %z')} ---\n".encode())
            output.flush()
            self.output_start = output.tell()
            with family.births_and_deaths:
                forked = _fork(warm, folder, environment, output.fileno(), lock_fds)
                self._process = forked or subprocess.Popen(
                    tethered([*argv, str(folder)], adopts=True),
                    cwd=folder,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=tuple(lock_fds),
                )
                family.living.add(self._process.pid)
            on_started(self)  # before the file is closed, which hangs where its file system does

    @property
    def pid(self) -> int:
        """Of the trainer, or of the launcher of its ranks."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self.returncode is None

    def obey(self, order: Order) -> None:
        """Carry out an order; a milder or repeated one changes nothing. Past its deadline any order becomes KILL.

        Safe to call from any thread. It touches no files."""
        with self._lock:
            if not self.running:
                return
            if self.deadline is not None and time.monotonic() >= self.deadline:
                order = Order.KILL
            if order <= self.order:
                return
            self._tell(order)
            self.order = order
            self.deadline = time.monotonic() + self._graces[order]

    def kill(self) -> None:
        """Kill it and all its processes. Safe to call twice, and when it is gone."""
        self.obey(Order.KILL)

    @property
    def hangs(self) -> bool:
        """Killed, and still there: it hangs in the kernel. Its locks keep the device from others until it goes."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return self.running and self.order is Order.KILL and late

    def describe_exit(self) -> str:
        """How it ended, for a person."""
        if self.returncode is not None and self.returncode < 0:
            number = -self.returncode
            often = " (often the machine ran out of memory)" if number == signal.SIGKILL else ""
            return f"The trainer was killed by signal {number}{often}."
        return f"The trainer ended with exit code {self.returncode}, without a last word."

    def output_tail(self, num_lines: int) -> list[str]:
        """The last lines that it printed in this attempt."""
        with self._output.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self.output_start, end - 64 * 1024))
            text = file.read().decode("utf-8", errors="replace")
        return text.splitlines()[-num_lines:]

    def _await_exit(self) -> None:
        # WNOWAIT leaves the dead leader in place, so that its number cannot be anybody else's while what is left of
        # it is killed.
        assert self._process is not None
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self._kill_group()
        with family.births_and_deaths:
            family.end_orphans()  # this one's; it is buried below
            with self._lock:
                self.returncode = self._process.wait()
            family.living.discard(self.pid)
        self._on_exit()

    def _tell(self, order: Order) -> None:
        """Signal the trainer and all its processes: the ranks of a launcher are in sessions of their own."""
        try:
            everybody = [self.pid, *family.descendants(self.pid)]
        except OSError as error:  # no file descriptor is to be had: those below it end as orphans
            log.warning("the processes of a trainer could not be looked for: %s", error)
            everybody = [self.pid]
        for pid in everybody:
            if order is Order.SAVE_AND_STOP and family.handles(pid, signal.SIGUSR1):
                family.send(pid, signal.SIGUSR1)
            elif order is Order.STOP:
                family.send(pid, signal.SIGTERM)
            elif order is Order.KILL:
                family.send(pid, signal.SIGKILL)
        if order is Order.KILL:
            self._kill_group()

    def _kill_group(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return  # gone already


def _fork(
    warm: WarmParent | None,
    folder: Path,
    environment: Mapping[str, str],
    output_fd: int,
    lock_fds: Sequence[int],
) -> Started | None:
    """A trainer by the warm way; None where that is not to be had."""
    if warm is None:
        return None
    try:
        return warm.fork(folder, environment=environment, output_fd=output_fd, lock_fds=lock_fds)
    except CannotFork as error:
        log.warning("the trainer is started the cold way: the warm parent failed (%s)", error)
        return None


def trainer_environment(
    environment: Mapping[str, str],
    *,
    cuda_visible_devices: str,
    offline: bool,
    threads: int | None = None,
    secrets: Collection[str] = (),
) -> dict[str, str]:
    """What the trainer may see of the worker's environment. No SFTD_ name is on the list: keys stay here.

    `threads`: its share of the machine's cores, unless the worker's environment says OMP_NUM_THREADS. `secrets`: the
    beginnings of the names of secrets that it needs; others are left out, since /proc shows them to whoever is this user.
    """
    allowed = {
        name: value
        for name, value in environment.items()
        if (name in _ALLOWED or name.startswith(_ALLOWED_PREFIXES))
        and (not _is_secret(name) or name.startswith(tuple(secrets)))
    }
    # Unbuffered, so that the last words before a kill are on disk; the fault handler names the line of a crash.
    allowed |= {
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "CUDA_VISIBLE_DEVICES": cuda_visible_devices,
        # Threads that libraries start when they are imported, which training never uses: a process that others are
        # forked off should have none.
        "OPENBLAS_NUM_THREADS": "1",
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
    }
    if threads:
        allowed.setdefault("OMP_NUM_THREADS", str(threads))
    # Every step has other sizes: blocks that cannot grow would leave holes, and run out of memory that is there.
    if not any(name in allowed for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        allowed["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if offline:
        allowed["HF_HUB_OFFLINE"] = "1"
    return allowed


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Values of the environment that must never reach a log, longest first."""
    values = {value for name, value in environment.items() if _is_secret(name)}
    values |= {_password(value) for name, value in environment.items() if name.lower().endswith("_proxy")}
    return sorted((value for value in values if len(value) >= MIN_SECRET_CHARS), key=len, reverse=True)


def _is_secret(name: str) -> bool:
    return name.upper().endswith(_SECRET_ENDINGS)


def _password(url: str) -> str:
    """That of a proxy's address, if it holds one."""
    try:
        return urlsplit(url).password or ""
    except ValueError:
        return ""
