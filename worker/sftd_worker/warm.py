"""The agent's side of the warm parent: a process that has imported torch and the rest, and forks trainers off itself.

It saves a job the seconds of its imports. It never stands between a job and its trainer: where it is not there, has
died, hangs or cannot fork, the trainer is started the cold way. What it does is in `trainer/warm.py`.
"""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sftd.protocol import TRAINER_GO, WARM_READY, TrainerStart
from sftd.tether import tethered
from sftd_worker import family

log = logging.getLogger("sftd.worker")

IMPORT_SECONDS = 60.0  # then it is taken to hang
FORK_SECONDS = 5.0
END_SECONDS = 2.0  # then it hangs in the kernel, and is buried when it goes
ROOM = " " * 512  # an argument that is overwritten with the trainer's, for ps
MAX_FAILURES = 3  # without a fork between them: then every job is started the cold way


class CannotFork(Exception):
    """There is no trainer by this way, and none will come of it. Nothing has been trained."""


@dataclass(frozen=True)
class ForkedTrainer:
    """A trainer that the warm parent forked: a child of this process, as if it had been started here."""

    pid: int

    def wait(self) -> int:
        """Wait for its end and bury it. Its exit code, or the negative number of the signal that killed it."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


class WarmParent:
    """One warm parent after another. `keep` is the main thread's alone: their lives are bound to that thread's. Forks may
    be asked for from any thread, one at a time; what is forked dies with the agent's main thread, since the kernel gives
    what is adopted to a process's first thread.

    The agent must be the next of kin of its descendants (`family.adopt_orphans`), else nothing is ever forked.
    """

    def __init__(self, argv: Sequence[str], *, environment: Mapping[str, str]) -> None:
        self._argv = list(argv)
        # NVML, asked instead of CUDA, leaves processes able to fork.
        self._environment = {**environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        self._process: subprocess.Popen[bytes] | None = None
        self._dying: list[subprocess.Popen[bytes]] = []  # killed, and not gone yet
        self._socket: socket.socket | None = None
        self._started_at = 0.0  # monotonic
        self._ready = False
        self._num_failures = 0

    @property
    def pid(self) -> int | None:
        """Its process id, while there is one."""
        return self._process.pid if self._process else None

    def keep(self) -> None:
        """Start one if there is none. Returns at once; call it again and again."""
        if not family.births_and_deaths.acquire(blocking=False):
            return  # a trainer is born or buried, which may take seconds: the main thread has other things to do
        try:
            self._look()
            if self._process is None and self._num_failures < MAX_FAILURES and sys.platform == "linux":
                try:
                    self._start()
                except OSError as error:  # no memory or process number is to be had
                    self._lose(f"it could not be started ({error})")
        finally:
            family.births_and_deaths.release()

    @property
    def starting(self) -> bool:
        """It is at its imports: to wait for it takes less time than to begin anew."""
        with family.births_and_deaths:
            self._look()
            return self._process is not None and not self._ready

    def fork(
        self, folder: Path, *, environment: Mapping[str, str], output_fd: int, lock_fds: Sequence[int]
    ) -> ForkedTrainer:
        """A trainer on this folder, in a session of its own, that holds the locks. Raises CannotFork."""
        with family.births_and_deaths:
            self._look()
            if self._socket is None or not self._ready:
                raise CannotFork("it is not there")
            try:
                start = TrainerStart(folder=str(folder), environment=dict(environment))
                trainer = _fork(self._socket, start.model_dump_json().encode(), [output_fd, *lock_fds])
            except (OSError, ValueError) as error:
                self._lose(f"it did not give a trainer ({error})")
                raise CannotFork(str(error)) from error
            self._num_failures = 0
            return trainer

    def end(self) -> None:
        """End it, and wait for that a moment. Safe to call twice; its trainers live on."""
        with family.births_and_deaths:
            if self._process is not None:
                self._process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(END_SECONDS)
                self._dying.append(self._process)
                self._bury()
            if self._socket is not None:
                self._socket.close()
            self._process, self._socket, self._ready = None, None, False

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours  # closed with it, also where it never comes to life
        with theirs:
            self._process = subprocess.Popen(
                tethered([*self._argv, str(theirs.fileno()), ROOM]),
                cwd="/",
                env=self._environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )
            family.living.add(self._process.pid)
        ours.setblocking(False)  # until it has said that it is ready
        self._started_at = time.monotonic()

    def _look(self) -> None:
        """Notice that it is ready, has died or hangs."""
        self._bury()
        if self._process is None or self._socket is None:
            return
        code = self._process.poll()
        if code is not None:
            self._lose(f"it ended with {code}")
        elif not self._ready:
            self._listen(self._socket)

    def _bury(self) -> None:
        gone = [process for process in self._dying if process.poll() is not None]
        family.living.difference_update(process.pid for process in gone)
        self._dying = [process for process in self._dying if process not in gone]

    def _listen(self, parent: socket.socket) -> None:
        seconds = time.monotonic() - self._started_at
        try:
            self._ready = parent.recv(len(WARM_READY)) == WARM_READY
        except BlockingIOError:
            if seconds > IMPORT_SECONDS:
                self._lose(f"its imports took more than {IMPORT_SECONDS:.0f} s")
            return
        if self._ready:
            parent.settimeout(FORK_SECONDS)
            log.info("the warm parent is ready after %.1f s", seconds)
        else:
            self._lose("it ended")

    def _lose(self, why: str) -> None:
        self.end()
        self._num_failures += 1
        then = (
            "another follows"
            if self._num_failures < MAX_FAILURES
            else "jobs are started the cold way from now on"
        )
        log.warning("the warm parent is lost: %s; %s", why, then)


def _fork(parent: socket.socket, request: bytes, fds: list[int]) -> ForkedTrainer:
    """Ask for a trainer, make sure that it is a child of this process, and let it go. Raises OSError or ValueError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            socket.send_fds(parent, [request], [theirs.fileno(), *fds])
        ours.settimeout(FORK_SECONDS)
        pid = int(ours.recv(32) or b"0")
        if not pid:
            raise ChildProcessError("what it forked died at once")
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)  # raises if it is nobody's child here
        with contextlib.suppress(OSError):  # it is dead: that is how it ended, then
            ours.send(TRAINER_GO)
    return ForkedTrainer(pid)
