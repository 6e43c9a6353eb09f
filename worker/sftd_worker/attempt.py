"""One attempt at one job, from the lease to the last call.

The main thread runs it. What the user wants (`keeper.want`), whether the lease is held (`keeper.still_held()`), whether
the worker is being stopped (`stops.count`) and how the trainer stands are plain states; every thread that changes one
rings the bell, and the main thread looks at all of them again.
"""

import contextlib
import errno
import logging
import os
import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sftd._transport import Transport
from sftd.errors import SequenceGap
from sftd.protocol import (
    MAX_LINE_CHARS,
    TRAINER_LINES_FILE,
    EndLine,
    EventLine,
    Finish,
    Lease,
    LogTextLine,
    Release,
)
from sftd.schemas import FailureReason, Want
from sftd_worker.disk import Hold, hold_after_full
from sftd_worker.files import Prepared, PrepareFailed, job_folder, prepare, write_job
from sftd_worker.gpus import Devices, Locks
from sftd_worker.lease import LeaseKeeper
from sftd_worker.outbox import Fenced, Outbox, Refused
from sftd_worker.process import Order, Trainer, secrets_of, trainer_environment
from sftd_worker.settings import WorkerSettings
from sftd_worker.shipper import TAIL_LINES, Shipper, cut, scrubbed
from sftd_worker.spool import Spool
from sftd_worker.warm import WarmParent
from sftd_worker.watch import Watch

log = logging.getLogger("sftd.worker")

TRAINER_LOCK = ".trainer.lock"
TAIL_LINE_CHARS = 2000
MAX_MESSAGE_CHARS = 8000
HURRIED_SECONDS = 3.0  # for the last calls once the worker was told to stop a second time


class Bell:
    """Wakes the main thread. Ringing is safe from any thread and from a signal handler; an Event's set() is not.

    The main thread waits here again and again, whatever it does: so this is where it shows that it lives.
    """

    def __init__(self) -> None:
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.alive_file: Path | None = None  # set once the worker is registered

    def ring(self) -> None:
        self._rings.put(None)

    def wait(self, seconds: float) -> None:
        """Wait for a ring, at most so long. Rings that came before count."""
        self.show_life()
        try:
            self._rings.get(timeout=max(0.0, seconds))
            while True:
                self._rings.get_nowait()
        except queue.Empty:
            return

    def show_life(self) -> None:
        """Touch the file that health checks look at."""
        if self.alive_file is not None:
            with contextlib.suppress(OSError):  # an unhealthy mark is no reason to end a job
                self.alive_file.touch()


@dataclass
class Stops:
    """How often the worker was told to stop: once, it saves and gives its job back; twice, it hurries."""

    count: int = 0


@dataclass(frozen=True)
class Worker:
    """What all attempts of this process share."""

    settings: WorkerSettings
    devices: Devices
    transport: Transport
    bell: Bell = field(default_factory=Bell)
    stops: Stops = field(default_factory=Stops)
    warm: WarmParent | None = None


class _Interrupted(Exception):
    """The attempt ends before its trainer runs: cancelled, paused, lease lost, or the worker is being stopped."""


def run_attempt(worker: Worker, lease: Lease) -> None:
    """Claimed → prepare → spawn → stream → clean up → finish. The last call is the last thing that happens."""
    attempt = _Attempt(worker, lease)
    attempt.keeper.start()
    try:
        last_call = attempt.run()
        lost = (
            not attempt.keeper.still_held()
        )  # asked before the last call: behind it the lease is gone as it should
        if last_call is not None and not lost:
            attempt.say_last(last_call)
    finally:
        attempt.keeper.close()
    if lost:
        log.warning("%s, attempt %d: lease lost (%s)", lease.job_id, lease.attempt, attempt.keeper.lost)


class _Attempt:
    def __init__(self, worker: Worker, lease: Lease) -> None:
        self.worker = worker
        self.lease = lease
        self.settings = worker.settings
        self.keeper = LeaseKeeper(
            lease,
            worker.transport,
            wait_seconds=worker.settings.heartbeat_wait_seconds,
            on_news=worker.bell.ring,
        )
        self.outbox = Outbox(worker.transport, self.keeper)
        self.locks = Locks()
        environment = dict(os.environ)
        self.secrets = secrets_of({**environment, "SFTD_WORKER_KEY": worker.settings.read_key()})

    def run(self) -> Finish | Release | None:
        """The attempt itself. Returns the last call to make, or None if the lease is lost: then nothing is published."""
        try:
            self._await_first_answer()
            prepared = prepare(self.lease, self.settings, check=self._check)
            folder = job_folder(self.settings.data, self.lease)
            if not self._take_locks(folder):
                return self._release("An earlier trainer still holds the device or the job's folder.")
            self._await_warm()
            self._check()
            return self._train(prepared, folder)
        except _Interrupted:
            return self._verdict_before_training()
        except PrepareFailed as failed:
            return self._failed(failed.reason, str(failed))
        except Exception as error:  # the edge of the attempt: the job must hear of it
            log.exception("%s: the attempt could not be run", self.lease.job_id)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                data, reserve = self.settings.data, self.settings.disk_reserve_bytes
                return self._held(hold_after_full(data, what=f"{error}.", needed=0, reserve=reserve))
            return self._failed(FailureReason.WORKER_ERROR, f"On the worker: {error!r}")
        finally:
            self.locks.let_go()

    def say_last(self, call: Finish | Release) -> None:
        """Send the last call until it is answered, the lease is lost, or a stopped worker has to go."""
        since = time.monotonic()
        name, what = ("finish", call.state) if isinstance(call, Finish) else ("release", "released")
        where = f"{self.lease.job_id}, attempt {self.lease.attempt}"
        try:
            self.outbox.send(
                name, call, pause=self.worker.bell.wait, given_up=lambda: self._out_of_patience(since)
            )
            log.info("%s: %s", where, what)
        except Fenced as fenced:
            log.warning("%s: %s was not heard (%s)", where, what, fenced)
        except (Refused, SequenceGap) as refused:
            log.error("%s: the server refused %s: %s", where, what, refused)
            self._say_instead(call, str(refused))

    def _say_instead(self, refused: Finish | Release, why: str) -> None:
        """The server does not take the last call: say what it will take, so that the job does not hang in the lease."""
        if isinstance(refused, Finish) and refused.state in ("cancelled", "paused"):
            self.say_last(self._release("The job is wanted again."))  # the wish was taken back meanwhile
        elif isinstance(refused, Finish) and refused.reason is not FailureReason.WORKER_ERROR:
            self.say_last(self._failed(FailureReason.WORKER_ERROR, f"The server refused the result: {why}"))

    # ------------------------------------------------------------ before training

    def _await_first_answer(self) -> None:
        """Nothing is begun before the server has confirmed the lease: the job may be cancelled already."""
        while not self.keeper.heard:
            self._check()
            self.worker.bell.wait(0.1)
        self._check()

    def _check(self) -> None:
        """Raise _Interrupted if the attempt should not go on. Called between pieces of preparation."""
        self.worker.bell.show_life()
        if not self.keeper.still_held() or self.keeper.want is not Want.RUN or self.worker.stops.count:
            raise _Interrupted

    def _take_locks(self, folder: Path) -> bool:
        """Wait for earlier trainers on these devices and in this folder to be gone. False: they did not go in time."""
        deadline = time.monotonic() + self.settings.lock_wait_seconds
        names = self.worker.devices.lock_names()
        while time.monotonic() <= deadline:
            if self.locks.take(folder, [TRAINER_LOCK], 1):
                if self.locks.take(self.settings.data / "locks", names, self.lease.spec.gpus):
                    return True
                self.locks.let_go()
            self._check()
            self.worker.bell.wait(0.1)
        return False

    def _await_warm(self) -> None:
        """A warm parent at its imports is waited for: they would take no less time in a trainer of its own."""
        while not self._cold and self.worker.warm is not None and self.worker.warm.starting:
            self._check()
            self.worker.bell.wait(0.05)

    @property
    def _cold(self) -> bool:
        """Ranks are started by torchrun, which imports for itself."""
        return self.lease.spec.gpus > 1

    def _verdict_before_training(self) -> Finish | Release | None:
        if not self.keeper.still_held():
            return None
        if self.keeper.want is Want.CANCEL:
            return Finish(attempt=self.lease.attempt, state="cancelled")
        if self.keeper.want is Want.PAUSE:
            return Finish(attempt=self.lease.attempt, state="paused")
        return self._release_as_things_stand()

    # ------------------------------------------------------------ training

    def _train(self, prepared: Prepared, folder: Path) -> Finish | Release | None:
        spool = Spool(folder / TRAINER_LINES_FILE, attempt=self.lease.attempt)
        for notice in prepared.notices:
            now = time.time()
            spool.append(LogTextLine(attempt=self.lease.attempt, at=now, text=notice[:MAX_LINE_CHARS]))
            spool.append(EventLine(type="notice", attempt=self.lease.attempt, at=now, message=notice))
        write_job(prepared.job)
        trainer_start = spool.size()
        trainer = self._spawn(folder)
        watch = Watch(trainer, spool, job=prepared.job, settings=self.settings)
        self.locks.let_go()  # the trainer holds them now, and only it
        shipper = Shipper(
            spool,
            self.outbox,
            self.keeper,
            folder=folder,
            secrets=self.secrets,
            first=prepared.corrupt,
            on_done=self.worker.bell.ring,
        )
        shipper.start()
        ended_at: float | None = None  # when its last word came by
        may_save = False  # before the trainer's first word there is nothing to save
        try:
            while trainer.running and not trainer.hangs:
                may_save = may_save or spool.has_whole_line_after(trainer_start)
                if shipper.end is not None and ended_at is None:
                    ended_at = time.monotonic()
                over = ended_at is not None and time.monotonic() - ended_at > self.settings.last_word_seconds
                order = self._order(may_save=may_save, broken=over or shipper.error is not None)
                trainer.obey(max(order, watch.look(may_save=may_save)))
                self.worker.bell.wait(self._seconds_until_next_look(trainer))
        finally:
            trainer.kill()  # of use only if the lines above raised
            watch.leave_word()
            shipper.finish()
        self._await_shipper(shipper)
        return self._verdict(trainer, shipper, watch)

    def _spawn(self, folder: Path) -> Trainer:
        environment = trainer_environment(
            os.environ,
            cuda_visible_devices=self.worker.devices.visible(self.locks.names),
            offline=self.settings.offline,
        )
        return Trainer(
            self.settings.trainer_argv,
            folder=folder,
            attempt=self.lease.attempt,
            environment=environment,
            lock_fds=self.locks.fds,
            save_grace_seconds=self.settings.checkpoint_grace_seconds,
            stop_grace_seconds=self.settings.cancel_grace_seconds,
            on_exit=self.worker.bell.ring,
            warm=self.worker.warm,
            cold=self._cold,
        )

    def _order(self, *, may_save: bool, broken: bool) -> Order:
        """What the trainer is to do, as things stand."""
        if not self.keeper.still_held() or broken or self.worker.stops.count > 1:
            return Order.KILL
        if self.keeper.want is Want.CANCEL:
            return Order.STOP
        if self.keeper.want is Want.PAUSE or self.worker.stops.count:
            return Order.SAVE_AND_STOP if may_save else Order.STOP
        return Order.RUN

    def _seconds_until_next_look(self, trainer: Trainer) -> float:
        next_look = min(self.keeper.fence_at, trainer.deadline or self.keeper.fence_at)
        return min(1.0, max(0.01, next_look - time.monotonic()))

    def _await_shipper(self, shipper: Shipper) -> None:
        """Everything is sent before the last call; a worker that is being stopped waits only so long."""
        since = time.monotonic()
        while not shipper.done.is_set() and self.keeper.still_held():
            if self._out_of_patience(since):
                self.outbox.call_off()
            self.worker.bell.wait(0.5)

    def _out_of_patience(self, since: float) -> bool:
        if not self.worker.stops.count:
            return False
        allowed = HURRIED_SECONDS if self.worker.stops.count > 1 else self.settings.checkpoint_grace_seconds
        return time.monotonic() - since > allowed

    # ------------------------------------------------------------ the last call

    def _verdict(self, trainer: Trainer, shipper: Shipper, watch: Watch) -> Finish | Release | None:
        """How the attempt ended. The trainer's own last word comes before what it was told."""
        if not self.keeper.still_held():
            return None
        end = shipper.end
        tail = _tail(shipper, trainer)
        if shipper.error is not None:
            return self._failed(FailureReason.WORKER_ERROR, f"Reporting failed: {shipper.error}", tail)
        if end is not None and end.outcome == "succeeded":
            return self._succeeded(end)
        if self.keeper.want is Want.CANCEL:
            return Finish(attempt=self.lease.attempt, state="cancelled")
        found = watch.verdict(end)
        if isinstance(found, Hold):
            return self._held(found)
        if found is not None:
            return self._failed(found.reason, found.message, tail)
        if end is not None and end.outcome == "failed":
            reason = end.reason or FailureReason.TRAINER_ERROR
            return self._failed(reason, end.message or trainer.describe_exit(), tail)
        if end is None and trainer.order is Order.RUN:  # nobody told it to stop
            return self._failed(FailureReason.TRAINER_DIED, trainer.describe_exit(), tail)
        if self.keeper.want is Want.PAUSE:
            return Finish(attempt=self.lease.attempt, state="paused")
        return self._release_as_things_stand()

    def _succeeded(self, end: EndLine) -> Finish:
        message = self._clean(end.message) if end.message else None
        return Finish(attempt=self.lease.attempt, state="succeeded", message=message, files=end.files)

    def _failed(self, reason: FailureReason, message: str, tail: Sequence[str] = ()) -> Finish:
        lines = [cut(scrubbed(line, self.secrets), TAIL_LINE_CHARS) for line in tail]
        return Finish(
            attempt=self.lease.attempt,
            state="failed",
            reason=reason,
            message=self._clean(message),
            log_tail=lines,
        )

    def _held(self, hold: Hold) -> Finish:
        """Put aside for want of disk space, until the server sees some."""
        return Finish(
            attempt=self.lease.attempt,
            state="paused",
            message=self._clean(hold.message),
            pause_reason="disk_low",
            needs_disk_bytes=hold.needs_disk_bytes,
        )

    def _release_as_things_stand(self) -> Release:
        if self.worker.stops.count:
            return self._release("The worker is being stopped.")
        return self._release("The trainer was stopped, but is wanted again.")

    def _release(self, message: str) -> Release:
        return Release(attempt=self.lease.attempt, message=message)

    def _clean(self, text: str) -> str:
        return cut(scrubbed(text, self.secrets), MAX_MESSAGE_CHARS)


def _tail(shipper: Shipper, trainer: Trainer) -> list[str]:
    """The end of the log and of what was printed. The trainer prints its log too: what stands in both comes once."""
    printed = trainer.output_tail(TAIL_LINES)
    logged = [line for line in shipper.log_tail if line not in printed]
    return (logged + printed)[-TAIL_LINES:]
