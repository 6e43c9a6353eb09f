"""The attempts that run side by side, each in a thread of its own, and the slots that they take.

All but the threads themselves is the main thread's. A slot is taken from the moment that a job is claimed until its
attempt's thread has ended. A mistake in one attempt ends that one alone: the kernel kills a trainer with the thread that
started it.
"""

import logging
import threading

from sftd.errors import SftdError
from sftd.protocol import Finish, Lease, Release
from sftd.schemas import FailureReason
from sftd_worker.attempt import run_attempt
from sftd_worker.claimer import say_without_attempt
from sftd_worker.lease import Outdated
from sftd_worker.worker import Bell, Worker

log = logging.getLogger("sftd.worker")


class Crew:
    """The attempts of one worker."""

    def __init__(self, worker: Worker) -> None:
        self.outdated: str | None = None  # the server's word, where it does not serve this version any more
        self._worker = worker
        self._members: tuple[_Member, ...] = ()

    @property
    def busy(self) -> bool:
        """Do any attempts run?"""
        return bool(self._members)

    def free_slots(self) -> int:
        """Devices that no claimed job counts on. Safe to call from any thread."""
        taken = sum(member.lease.spec.gpus for member in self._members)
        return max(0, self._worker.devices.num_slots - taken)

    def wanted_slots(self) -> int:
        """Devices to ask jobs for. Safe to call from any thread.

        None while the server takes this worker's jobs away; once it has them, it gives out none here as long as it
        wants that.
        """
        draining = any(member.draining for member in self._members)
        return 0 if draining else self.free_slots()

    def start(self, lease: Lease) -> None:
        """Run a job that was claimed, or give it back if its devices were lost meanwhile."""
        where = f"{lease.job_id}, attempt {lease.attempt}"
        if lease.spec.gpus > self.free_slots():
            log.warning("%s: given back, its devices are not there any more", where)
            message = f"{lease.spec.gpus} devices are wanted, but {self.free_slots()} are free now."
            word = Release(attempt=lease.attempt, message=message, reason="busy")
            threading.Thread(target=_say, args=(self._worker, lease, word), daemon=True).start()
            return
        log.info("%s: claimed", where)
        member = _Member(self._worker, lease)
        with self._worker.files_lock:
            self._members = (*self._members, member)
            self._tell_worker()
        member.thread.start()

    def look(self) -> None:
        """Let go of the attempts that are over."""
        over = [member for member in self._members if not member.thread.is_alive()]
        if not over:
            return
        self._members = tuple(member for member in self._members if member not in over)
        self._tell_worker()
        for member in over:
            self.outdated = self.outdated or member.outdated

    def _tell_worker(self) -> None:
        self._worker.attempt_bells = tuple(member.bell for member in self._members)


class _Member:
    """One attempt and its thread."""

    def __init__(self, worker: Worker, lease: Lease) -> None:
        self.lease = lease
        self.bell = Bell()
        self.draining = False
        self.outdated: str | None = None
        self._worker = worker
        self.thread = threading.Thread(target=self._run, name=f"attempt-{lease.job_id}", daemon=True)

    def _run(self) -> None:
        try:
            run_attempt(self._worker, self.lease, self.bell, on_draining=self._drain)
        except Outdated as error:
            self.outdated = str(error)
        except Exception as error:  # the edge of a thread: the other attempts go on
            log.exception("%s, attempt %d: ended by a mistake of ours", self.lease.job_id, self.lease.attempt)
            word = Finish(
                attempt=self.lease.attempt,
                state="failed",
                reason=FailureReason.WORKER_ERROR,
                message=f"On the worker: {error!r}",
            )
            _say(self._worker, self.lease, word)
        finally:
            self._worker.bell.ring()

    def _drain(self) -> None:
        self.draining = True
        self._worker.bell.ring()


def _say(worker: Worker, lease: Lease, word: Release | Finish) -> None:
    try:
        say_without_attempt(worker, lease, word)
    except SftdError as error:
        log.warning("%s: the server was not told (%s); the lease will run out", lease.job_id, error)
